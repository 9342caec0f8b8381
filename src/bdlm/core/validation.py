"""Checks that arguments and fields have the types of their annotations, and are in range; one line
names the wrong one.

In: values with annotations, functions to guard. Out: the values (a whole number as a float, one
item as a list of it, if the annotation says so), or a `ConfigError` with the name, the value and
the suggested fix. A range is part of the annotation, `Annotated[int, AtLeast(1)]`; conditions on
several values or on a model are checked where they are used. Strict for Python; lenient for YAML
and the command line, where numbers may be text and records mappings."""

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
    """State a condition on a value of the right type; goes into `Annotated` next to the type."""

    @property
    def suggestion(self) -> str:
        """Say what to use instead, for messages: `use 1 or more`."""
        ...

    def holds(self, value: Any) -> bool:
        """Return whether the value is allowed."""
        ...


@dataclass(frozen=True)
class AtLeast:
    """Require a finite number of `low` or more. said: other words for the suggestion."""

    low: float
    said: str = ""

    @property
    def suggestion(self) -> str:
        return self.said or f"use {self.low} or more"

    def holds(self, value: Any) -> bool:
        return bool(self.low <= value < math.inf)


@dataclass(frozen=True)
class Between:
    """Require a number from `low` to `high`.

    ends: which ends belong to the range, "[]", "(]", "[)" or "()". said: as in `AtLeast`."""

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
    """Require text that UTF-8 can store, so without lone surrogates, which no tokenizer accepts.
    Not for names of files."""

    suggestion: str = "leave out what is not UTF-8 text (a lone surrogate)"

    def holds(self, value: Any) -> bool:
        return not any("\ud800" <= sign <= "\udfff" for sign in value)


Count = Annotated[int, AtLeast(1)]
Size = Annotated[
    int, Between(1, 2**24, said="use 1 to 2^24")
]  # of things that are in memory at once
Positive = Annotated[float, Between(0, math.inf, "()", "use a positive number")]


# -- functions and records -------------------------------------------------------------------------


@functools.cache
def hints(owner: Any) -> dict[str, Any]:
    """Return the annotations of a function or class, as types, with their ranges."""
    return typing.get_type_hints(owner, include_extras=True)


def validated(
    options: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a public function: an unknown, missing or wrongly typed argument is a `ConfigError`
    in one line.

    The signature stays visible to `help`, `inspect` and type checkers.
    options: the function that its `**options` go to, so that they are checked too; None leaves them
    to the function. A function that lists all its options needs neither."""

    def guard(function: Callable[P, T]) -> Callable[P, T]:
        signature, full_name = (
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
            place = full_name
            if "self" in signature.parameters and args:  # the class that the user knows
                place = f"bdlm.{type(args[0]).__name__}.{function.__name__}".removesuffix(
                    ".__init__"
                )
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
    """Convert the fields of a frozen dataclass to their annotations, for its `__post_init__`. path:
    put before a field's name in messages. Raises ConfigError."""
    owner: Any = type(record)
    for name, hint in hints(owner).items():
        object.__setattr__(record, name, coerce(f"{path}{name}", getattr(record, name), hint))


def read_record(record: type[T], values: Any, path: str = "") -> T:
    """Build a dataclass from a mapping of plain values (YAML, JSON, command line), nested records
    included.

    path: of the record itself, for messages that name a field: `optim.lr`, `block_sizes[0][1]`.
    Raises ConfigError for a field that is unknown (with the nearest name), missing, or of a wrong
    value."""
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


# -- conversion ------------------------------------------------------------------------------------

# numpy's numbers are numbers too; a bool is not a number
PLAIN: dict[Any, type] = {bool: bool, str: str, int: Integral, float: Real}
WORDS = {
    bool: ("true or false",) * 2,
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    Path: ("a path", "paths"),
}


class _Mismatch(Exception):
    """Report a value that does not match. ruled: it has the right type, but breaks a rule."""

    def __init__(self, name: str, value: Any, said: str, ruled: bool = False) -> None:
        self.name = name
        self.value = value
        self.said = said
        self.ruled = ruled


def coerce(name: str, value: Any, hint: Any, lenient: bool = False) -> Any:
    """Convert a value to its annotation. Raises ConfigError, with that name, for another type or a
    value out of range.

    lenient: numbers may be text, text numbers, and records mappings; messages then name the
    innermost wrong item."""
    try:
        return _convert(name, value, hint, lenient)
    except _Mismatch as wrong:
        if lenient:
            raise ConfigError(f"{wrong.name} is {shown(wrong.value)}; {wrong.said}") from None
        fix = wrong.said if wrong.ruled else f"use {describe_type(hint)}"
        raise ConfigError(f"{name} is {shown(value)}; {fix}") from None


def _convert(name: str, value: Any, hint: Any, lenient: bool) -> Any:
    """Convert the value to the annotation. Raises _Mismatch."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        found = _convert(name, value, inner[0], lenient)
        for rule in inner[1:]:
            if isinstance(rule, Rule) and not rule.holds(found):
                raise _Mismatch(name, value, rule.suggestion, ruled=True)
        return found
    if kind in (Union, types.UnionType):
        return _convert_union(name, value, inner, lenient)
    if kind is Literal:
        if any(type(value) is type(each) and value == each for each in inner):
            return value
        raise _Mismatch(name, value, nearest(str(value), map(str, inner)).removeprefix("; "))
    if kind in (tuple, Sequence):
        return _convert_sequence(name, value, hint, lenient)
    if kind in (dict, Mapping):
        return _convert_mapping(name, value, hint, lenient)
    if kind in PLAIN:
        return _convert_scalar(name, value, kind, lenient)
    if (
        lenient
        and dataclasses.is_dataclass(kind)
        and not isinstance(value, typing.cast(type, kind))
    ):
        return read_record(kind, {} if value is None else value, name)  # type: ignore[arg-type]
    fits = (
        callable(value)
        if kind is Callable
        else kind is Any or not isinstance(kind, type) or isinstance(value, kind)
    )
    if not fits:
        raise _Mismatch(name, value, f"use {describe_type(hint)}")
    return value


def _convert_union(name: str, value: Any, kinds: tuple[Any, ...], lenient: bool) -> Any:
    """Convert to the first type that accepts the value. Of several failures, a broken rule is
    reported before a wrong type."""
    if lenient and value is None:
        return None
    refused = []
    for hint in kinds:
        try:
            return _convert(name, value, hint, lenient)
        except _Mismatch as wrong:
            refused.append(wrong)
    raise next((wrong for wrong in refused if wrong.ruled), refused[0])


def _convert_sequence(name: str, value: Any, hint: Any, lenient: bool) -> Any:
    """Convert each item. Where a tuple is expected, a single item becomes a tuple of it, as in
    recipes."""
    kind, inner = get_origin(hint), get_args(hint)
    fixed = kind is tuple and inner[-1:] != (...,)
    if not isinstance(value, Sequence | Set) or isinstance(value, str | bytes):
        if kind is not tuple or fixed or isinstance(value, Mapping) or value is None:
            raise _Mismatch(name, value, f"use {describe_type(hint)}")
        return (_convert(f"{name}[0]", value, inner[0], lenient),)
    each = inner if fixed else inner[:1] * len(value)
    if len(each) != len(value):
        raise _Mismatch(name, value, f"use {describe_type(hint)}")
    items = [
        _convert(f"{name}[{i}]", item, one, lenient)
        for i, (item, one) in enumerate(zip(value, each, strict=True))
    ]
    return tuple(items) if kind is tuple else items


def _convert_mapping(name: str, value: Any, hint: Any, lenient: bool) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _Mismatch(name, value, "use a mapping")
    of_keys, of_values = get_args(hint)
    return {
        _convert(f"a key of {name}", k, of_keys, lenient): _convert(
            f"{name}.{k}", v, of_values, lenient
        )
        for k, v in value.items()
    }


def _convert_scalar(name: str, value: Any, kind: Any, lenient: bool) -> Any:
    """Convert truth values, text and numbers."""
    found: Any = _from_text(value, kind) if lenient else value
    if not isinstance(found, PLAIN[kind]) or (kind is not bool and isinstance(found, bool)):
        raise _Mismatch(name, value, f"use {describe_type(kind)}")
    try:
        plain: Any = found if type(found) is kind or kind is str else kind(found)
    except OverflowError:
        raise _Mismatch(name, value, "use a number that 64 bits can hold", ruled=True) from None
    if kind is int and not -(2**63) <= plain < 2**63:
        raise _Mismatch(name, value, "use a whole number of 64 bits", ruled=True)
    return plain


def _from_text(value: Any, kind: Any) -> Any:
    """Convert text that spells a number (YAML reads 3e-4 as text) or a number to text; None for a
    value that is not such a number (nan, 2.5 for an int)."""
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


def describe_type(hint: Any, many: bool = False) -> str:
    """Describe the annotation in words: `text or a list of texts`."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return describe_type(inner[0], many)
    if kind in (Union, types.UnionType, Literal):
        *rest, last = (
            map(repr, inner) if kind is Literal else [describe_type(each, many) for each in inner]
        )
        return f"{', '.join(rest)} or {last}" if rest else last
    if kind in (tuple, Sequence):
        return (
            f"{len(inner)} values"
            if kind is tuple and inner[-1:] != (...,)
            else f"a list of {describe_type(inner[0], many=True)}"
        )
    if kind in (dict, Mapping):
        keys, values = (describe_type(each, many=True) for each in inner)
        return f"a dictionary of {keys} to {values}"
    if kind in WORDS:
        return WORDS[kind][many]
    if kind is Callable:
        return "a function"
    return {types.NoneType: "None", Any: "anything"}.get(
        kind
    ) or f"a {getattr(kind, '__name__', kind)}"
