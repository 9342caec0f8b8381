"""Whether arguments and fields are of the kind that their annotations name, and in range; one line
says which is not.

In: values with annotations, functions to guard. Out: the values (a whole number as a float, one
item as a list of it, where that is asked for), or a `ConfigError` with the name, the value and what
to use instead. A range stands in the annotation, `Annotated[int, AtLeast(1)]`; what depends on
several values or on a model is checked where it is used. Strict for Python; lenient for YAML and
words of a command line, where numbers may come as text and records as mappings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    runtime_checkable,
)

from bdlm.core.errors import ConfigError, nearest, shown

P = ParamSpec("P")
T = TypeVar("T")


# -- ranges ----------------------------------------------------------------------------------------


@runtime_checkable
class Rule(Protocol):
    """A condition on a value that is of the right kind already; it stands in `Annotated` beside the
    kind."""

    @property
    def suggestion(self) -> str:
        """What to use instead, for messages: `use 1 or more`."""
        ...

    def holds(self, value: Any) -> bool:
        """Whether the value is allowed."""
        ...


@dataclass(frozen=True)
class AtLeast:
    """A finite number of `low` or more. said: the suggestion in other words than `use 1 or
    more`."""

    low: float
    said: str = ""

    @property
    def suggestion(self) -> str:
        return self.said or f"use {self.low} or more"

    def holds(self, value: Any) -> bool:
        return bool(self.low <= value < math.inf)


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`. ends: which ends belong to the range, "[]", "(]", "[)" or
    "()". said: as in `AtLeast`."""

    low: float
    high: float
    ends: Literal["[]", "(]", "[)", "()"] = "[]"
    said: str = ""

    @property
    def suggestion(self) -> str:
        return self.said or f"use a value in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"

    def holds(self, value: Any) -> bool:
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        return bool(above and (value <= self.high if self.ends[1] == "]" else value < self.high))


@dataclass(frozen=True)
class Utf8:
    """Text that UTF-8 can store, so without lone surrogates, which no tokenizer takes. Not for
    names of files."""

    suggestion: str = "leave out what is not UTF-8 text (a lone surrogate)"

    def holds(self, value: Any) -> bool:
        return not any("\ud800" <= sign <= "\udfff" for sign in value)


Count = Annotated[int, AtLeast(1)]
Size = Annotated[int, Between(1, 2**24, said="use 1 to 2^24")]  # of what is in memory all at once
Positive = Annotated[float, Between(0, math.inf, "()", "use a positive number")]


# -- functions and records -------------------------------------------------------------------------


@functools.cache
def hints(owner: Any) -> dict[str, Any]:
    """The annotations of a function or class, as types, with their ranges."""
    return typing.get_type_hints(owner, include_extras=True)


def validated(
    options: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a public function: what does not exist, is missing, or is of another kind is a
    `ConfigError` in one line.

    The signature stays visible to `help`, `inspect` and type checkers. options: the function that
    its `**options` go to, so that they are checked too; None leaves them to the function. A
    function that lists all its options needs neither."""

    def guard(function: Callable[P, T]) -> Callable[P, T]:
        signature, where = (
            inspect.signature(function),
            f"{function.__module__}.{function.__qualname__}".replace("bdlm.api.", "bdlm."),
        )
        named = {p.name: p.kind for p in signature.parameters.values() if p.name != "self"}
        own = [name for name, kind in named.items() if kind is not inspect.Parameter.VAR_KEYWORD]
        more = (
            [
                p.name
                for p in inspect.signature(options).parameters.values()
                if p.kind is p.KEYWORD_ONLY
            ]
            if options
            else []
        )
        takes_any = options is None and len(own) < len(named)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            kinds = {**(hints(options) if options else {}), **hints(function)}
            place = where
            if "self" in signature.parameters and args:  # the class that the user knows
                place = f"bdlm.{type(args[0]).__name__}.{function.__name__}"
            for name, value in kwargs.items():
                if not takes_any and name not in own and name not in more:
                    raise ConfigError(
                        f"{place} has no argument '{name}'{nearest(name, {*own, *more})}"
                    )
                if name not in own:
                    kwargs[name] = coerce(name, value, kinds.get(name, Any))
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ConfigError(f"{place}: {error}; help({place}) shows its arguments") from None
            for name in given.arguments.keys() & set(own):
                given.arguments[name] = coerce(name, given.arguments[name], kinds.get(name, Any))
            return function(*given.args, **given.kwargs)

        return call

    return guard


def validate_fields(record: Any, path: str = "") -> None:
    """The fields of a frozen dataclass as its annotations want them, for its `__post_init__`. path:
    what messages put before a name."""
    owner: Any = type(record)
    for name, hint in hints(owner).items():
        object.__setattr__(record, name, coerce(f"{path}{name}", getattr(record, name), hint))


def read_record(record: type[T], values: Any, path: str = "") -> T:
    """A dataclass from a mapping of plain values (YAML, JSON, words of a command line), records in
    records included.

    path: of the record itself, for messages that name a field: `optim.lr`, `block_sizes[0][1]`.
    Raises ConfigError for a field that does not exist, is missing, or does not fit, with the
    nearest name."""
    kind: Any = record
    where, dot = path or "config", f"{path}." if path else ""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {shown(values)}; use a mapping of fields")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown field {shown(f'{dot}{key}')}{nearest(str(key)[:80], known)}"
            )
    for f in known.values():
        if (
            f.name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise ConfigError(f"{where} has no field '{f.name}'; it needs one")
    kinds = hints(kind)
    made: T = kind(
        **{
            key: coerce(f"{dot}{key}", value, kinds[key], lenient=True)
            for key, value in values.items()
        }
    )
    return made


# -- the one walk ----------------------------------------------------------------------------------

# numpy's numbers are numbers too; a bool is none
PLAIN: dict[Any, type] = {bool: bool, str: str, int: Integral, float: Real}
WORDS = {
    bool: ("true or false",) * 2,
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    Path: ("a path", "paths"),
}


class _Misfit(Exception):
    """A value that does not fit. ruled: it is of the right kind, but breaks a rule."""

    def __init__(self, name: str, value: Any, said: str, ruled: bool = False) -> None:
        self.name, self.value, self.said, self.ruled = name, value, said, ruled


def coerce(name: str, value: Any, hint: Any, lenient: bool = False) -> Any:
    """The value as its annotation wants it. Raises ConfigError, under that name, where it is of
    another kind or out of range.

    lenient: numbers may come as text, text as numbers and records as mappings; messages then name
    the innermost item that is wrong."""
    try:
        return _fit(name, value, hint, lenient)
    except _Misfit as wrong:
        if lenient:
            raise ConfigError(f"{wrong.name} is {shown(wrong.value)}; {wrong.said}") from None
        raise ConfigError(
            f"{name} is {shown(value)}; {wrong.said if wrong.ruled else f'use {wanted(hint)}'}"
        ) from None


def _fit(name: str, value: Any, hint: Any, lenient: bool) -> Any:
    """The value as the annotation has it. Raises _Misfit."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        found = _fit(name, value, inner[0], lenient)
        for rule in inner[1:]:
            if isinstance(rule, Rule) and not rule.holds(found):
                raise _Misfit(name, value, rule.suggestion, ruled=True)
        return found
    if kind in (Union, types.UnionType):
        return _either(name, value, inner, lenient)
    if kind is Literal:
        if any(type(value) is type(each) and value == each for each in inner):
            return value
        raise _Misfit(name, value, nearest(str(value), map(str, inner)).removeprefix("; "))
    if kind in (tuple, Sequence):
        return _several(name, value, hint, lenient)
    if kind in (dict, Mapping):
        return _mapping(name, value, hint, lenient)
    if kind in PLAIN:
        return _plain(name, value, kind, lenient)
    if lenient and dataclasses.is_dataclass(kind) and not isinstance(value, kind):  # type: ignore[arg-type]
        return read_record(kind, {} if value is None else value, name)  # type: ignore[arg-type]
    fits = (
        callable(value)
        if kind is Callable
        else kind is Any or not isinstance(kind, type) or isinstance(value, kind)
    )
    if not fits:
        raise _Misfit(name, value, f"use {wanted(hint)}")
    return value


def _either(name: str, value: Any, kinds: tuple[Any, ...], lenient: bool) -> Any:
    """As the first kind that takes the value. Of several refusals a broken rule is told before
    another kind."""
    if lenient and value is None:
        return None
    refused = []
    for hint in kinds:
        try:
            return _fit(name, value, hint, lenient)
        except _Misfit as wrong:
            refused.append(wrong)
    raise next((wrong for wrong in refused if wrong.ruled), refused[0])


def _several(name: str, value: Any, hint: Any, lenient: bool) -> Any:
    """Each item as it should be. Where a tuple is asked for, one item stands for a tuple of it, as
    in recipes."""
    kind, inner = get_origin(hint), get_args(hint)
    fixed = kind is tuple and inner[-1:] != (...,)
    if not isinstance(value, Sequence | Set) or isinstance(value, str | bytes):
        if kind is not tuple or fixed or isinstance(value, Mapping) or value is None:
            raise _Misfit(name, value, f"use {wanted(hint)}")
        return (_fit(f"{name}[0]", value, inner[0], lenient),)
    each = inner if fixed else inner[:1] * len(value)
    if len(each) != len(value):
        raise _Misfit(name, value, f"use {wanted(hint)}")
    items = [
        _fit(f"{name}[{i}]", item, one, lenient)
        for i, (item, one) in enumerate(zip(value, each, strict=True))
    ]
    return tuple(items) if kind is tuple else items


def _mapping(name: str, value: Any, hint: Any, lenient: bool) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _Misfit(name, value, "use a mapping")
    of_keys, of_values = get_args(hint)
    return {
        _fit(f"a key of {name}", k, of_keys, lenient): _fit(f"{name}.{k}", v, of_values, lenient)
        for k, v in value.items()
    }


def _plain(name: str, value: Any, kind: Any, lenient: bool) -> Any:
    """Truth values, text and numbers."""
    found: Any = _from_text(value, kind) if lenient else value
    if not isinstance(found, PLAIN[kind]) or (kind is not bool and isinstance(found, bool)):
        raise _Misfit(name, value, f"use {wanted(kind)}")
    try:
        plain: Any = found if type(found) is kind or kind is str else kind(found)
    except OverflowError:
        raise _Misfit(name, value, "use a number that 64 bits can hold", ruled=True) from None
    if kind is int and not -(2**63) <= plain < 2**63:
        raise _Misfit(name, value, "use a whole number of 64 bits", ruled=True)
    return plain


def _from_text(value: Any, kind: Any) -> Any:
    """A number that stands as text (YAML reads 3e-4 so) or the text of a number; None for a number
    that is none (nan, 2.5 of a whole)."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or kind is bool:
        return value
    if kind is str:
        return str(value)
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if kind is int and isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    return None if value != value else value


def wanted(hint: Any, many: bool = False) -> str:
    """The annotation in words: `text or a list of texts`."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return wanted(inner[0], many)
    if kind in (Union, types.UnionType, Literal):
        *rest, last = (
            map(repr, inner) if kind is Literal else [wanted(each, many) for each in inner]
        )
        return f"{', '.join(rest)} or {last}" if rest else last
    if kind in (tuple, Sequence):
        return (
            f"{len(inner)} values"
            if kind is tuple and inner[-1:] != (...,)
            else f"a list of {wanted(inner[0], many=True)}"
        )
    if kind in (dict, Mapping):
        return f"a dictionary of {wanted(inner[0], many=True)} to {wanted(inner[1], many=True)}"
    if kind in WORDS:
        return WORDS[kind][many]
    if kind is Callable:
        return "a function"
    return {types.NoneType: "None", Any: "anything"}.get(
        kind
    ) or f"a {getattr(kind, '__name__', kind)}"
