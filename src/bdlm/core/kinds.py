"""Whether arguments and fields are of the kind that their annotations name; one line says which is not.

In: values with annotations, functions to guard. Out: the values (a whole number as a float, one item as a list of it, where that is asked
for), or a `ConfigError` with the name, the value and what to use instead. Ranges are their owners' business: this knows kinds alone.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from bdlm.core.errors import ConfigError, nearest, shown

P = ParamSpec("P")
T = TypeVar("T")


@functools.cache
def hints(owner: Any) -> dict[str, Any]:
    """The annotations of a function or class, as types."""
    return typing.get_type_hints(owner)


MISFIT: Any = object()
PLAIN: dict[Any, type] = {bool: bool, str: str, int: Integral, float: Real}  # numpy's numbers are numbers too; a bool is none
WORDS = {
    bool: ("true or false",) * 2,
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    Path: ("a path", "paths"),
}


def checked(options: Callable[..., Any] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a public function: what does not exist, is missing, or is of another kind is a `ConfigError` in one line.

    options: the function that its `**options` go to, so that they are checked too; None leaves them to the function.
    """

    def guard(function: Callable[P, T]) -> Callable[P, T]:
        signature, where = inspect.signature(function), f"{function.__module__}.{function.__qualname__}".replace("bdlm.api.", "bdlm.")
        named = {p.name: p.kind for p in signature.parameters.values() if p.name != "self"}
        own = [name for name, kind in named.items() if kind is not inspect.Parameter.VAR_KEYWORD]
        more = [p.name for p in inspect.signature(options).parameters.values() if p.kind is p.KEYWORD_ONLY] if options else []
        takes_any = options is None and len(own) < len(named)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            kinds = {**(hints(options) if options else {}), **hints(function)}
            for name, value in kwargs.items():
                if not takes_any and name not in own and name not in more:
                    raise ConfigError(f"{where} has no argument '{name}'{nearest(name, {*own, *more})}")
                kwargs[name] = of_kind(name, value, kinds.get(name, Any))
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ConfigError(f"{where}: {error}; help({where}) shows its arguments") from None
            for name in given.arguments.keys() & set(own):
                given.arguments[name] = of_kind(name, given.arguments[name], kinds.get(name, Any))
            return function(*given.args, **given.kwargs)

        return call

    return guard


def check_fields(record: Any, path: str = "") -> None:
    """The fields of a frozen dataclass as its annotations want them, for its `__post_init__`. path: what messages put before a name."""
    owner: Any = type(record)
    for name, hint in hints(owner).items():
        object.__setattr__(record, name, of_kind(f"{path}{name}", getattr(record, name), hint))


def of_kind(name: str, value: Any, hint: Any) -> Any:
    """The value as its annotation wants it. Raises ConfigError, under that name, where it is of another kind."""
    found = _fit(value, hint)
    if found is MISFIT:
        raise ConfigError(f"{name} is {shown(value)}; use {wanted(hint)}")
    return found


def _fit(value: Any, hint: Any) -> Any:
    """The value as the annotation has it, or MISFIT."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return next((found for each in inner if (found := _fit(value, each)) is not MISFIT), MISFIT)
    if kind is Literal:
        return value if any(type(value) is type(each) and value == each for each in inner) else MISFIT
    if kind in (tuple, Sequence):
        return _several(value, kind, inner)
    if kind in (dict, Mapping):
        return _mapping(value, inner)
    if kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind is not bool and isinstance(value, bool)):
            return MISFIT
        return value if type(value) is kind or kind is str else kind(value)
    if kind is Callable:
        return value if callable(value) else MISFIT
    return value if kind is Any or not isinstance(kind, type) or isinstance(value, kind) else MISFIT


def _several(value: Any, kind: Any, inner: tuple[Any, ...]) -> Any:
    """Each item as it should be. Where a tuple is asked for, one item stands for a tuple of it, as in recipes."""
    if not isinstance(value, Sequence | Set) or isinstance(value, str | bytes):
        one = MISFIT if kind is not tuple or inner[-1:] != (...,) else _fit(value, inner[0])
        return one if one is MISFIT else (one,)
    each = inner if kind is tuple and inner[-1:] != (...,) else inner[:1] * len(value)
    if len(each) != len(value):
        return MISFIT
    items = [_fit(item, hint) for item, hint in zip(value, each, strict=True)]
    if any(item is MISFIT for item in items):
        return MISFIT
    return tuple(items) if kind is tuple else items


def _mapping(value: Any, inner: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        return MISFIT
    items = {_fit(k, inner[0]): _fit(v, inner[1]) for k, v in value.items()}
    return MISFIT if MISFIT in items or any(v is MISFIT for v in items.values()) else items


def wanted(hint: Any, many: bool = False) -> str:
    """The annotation in words: `text or a list of texts`."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType, Literal):
        *rest, last = map(repr, inner) if kind is Literal else [wanted(each, many) for each in inner]
        return f"{', '.join(rest)} or {last}" if rest else last
    if kind in (tuple, Sequence):
        return f"{len(inner)} values" if kind is tuple and inner[-1:] != (...,) else f"a list of {wanted(inner[0], many=True)}"
    if kind in (dict, Mapping):
        return f"a dictionary of {wanted(inner[0], many=True)} to {wanted(inner[1], many=True)}"
    if kind in WORDS:
        return WORDS[kind][many]
    if kind is Callable:
        return "a function"
    return {types.NoneType: "None", Any: "anything"}.get(kind) or f"a {getattr(kind, '__name__', kind)}"
