"""From plain values (YAML, JSON, words of a command line) to frozen dataclasses, with messages that name the field and the nearest name.

In: a dataclass type and a mapping. Out: the dataclass. Knows nothing about which fields there are.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from bdlm.core.errors import ConfigError, nearest, shown
from bdlm.core.kinds import hints


def build(kind: Any, values: Any, path: str) -> Any:
    """A dataclass from a mapping, field by field."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'} is {shown(values)}; use a mapping of fields")
    known = {f.name for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            name = shown(f"{path}{'.' if path else ''}{key}")
            raise ConfigError(f"unknown field {name}{nearest(str(key)[:80], known)}")
    for f in dataclasses.fields(kind):
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path or 'config'} has no field '{f.name}'; it needs one")
    inner = {key: _coerce(hints(kind)[key], value, f"{path}{'.' if path else ''}{key}") for key, value in values.items()}
    return kind(**inner)


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """A plain value as the field's type; numbers may come as text (YAML reads 3e-4 so)."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(kind, {} if value is None else value, path)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _coerce(next(t for t in inner if t is not type(None)), value, path)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{path} is {shown(value)}{nearest(str(value), map(str, inner))}")
        return value
    if origin is tuple:
        return _tuple(inner, value, path)
    if origin is dict:  # of any values: read by whoever knows what they mean
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {shown(value)}; use a mapping")
        return dict(value)
    return _scalar(kind, value, path)


def _tuple(inner: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, (str, int)) and inner[-1] is ...:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path} is {shown(value)}; use a list")
    if inner[-1] is ...:
        return tuple(_coerce(inner[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(value) != len(inner):
        raise ConfigError(f"{path} is {shown(value)}; use {len(inner)} values")
    return tuple(_coerce(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(inner, value, strict=True)))


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        found = _number(kind, value)
        if found is not None:
            return found
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ConfigError(f"{path} is {shown(value)}; use {wanted}")


def _number(kind: type, value: str | int | float) -> int | float | None:
    """The value as a number of that kind; None if it is none. 1e3 and 1000.0 are whole numbers
    too."""
    if kind is int and isinstance(value, int):
        return value
    try:
        number = float(value)
        if kind is float:
            return None if number != number else number
        if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)  # exact, where a float would round
        return int(number) if number == int(number) else None
    except (ValueError, OverflowError):
        return None
