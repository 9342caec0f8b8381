"""Exceptions for what a user can get wrong, with one-line messages that name the field, the value
and the suggested fix.

The command line prints the message and exits with code 2. Asserts are for mistakes of the project
itself."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from bdlm.core.removed_names import successor

T = TypeVar("T")


class BdlmError(Exception):
    """Base of every error that a user can cause and fix."""


class ConfigError(BdlmError):
    """An option is unknown, out of range, or does not fit another one."""


class DataError(BdlmError):
    """A text, a file or a tokenizer cannot be used as it is."""


class CheckpointError(BdlmError):
    """A checkpoint is missing, damaged, of another shape, or unsafe to load."""


class UnsupportedError(BdlmError):
    """A model does not support what was asked of it."""


class DecoderError(BdlmError):
    """A decoder broke a rule of every decision, for instance by filling a cell that was not
    masked."""


class TrainingError(BdlmError):
    """Training cannot go on, for instance because the loss is not finite."""


class BdlmWarning(UserWarning):
    """Behaviour that may surprise. The command line prints it in one line."""


def shown(value: object, most: int = 80) -> str:
    """A value as messages show it: its repr in one line of at most so many characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # Python refuses to write out numbers of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `"; did you mean 'steps'?"` where a known name is
    close, `"; 'x' is now called 'y'"` where it was removed, else the known names."""
    names = sorted(known)
    if (new := successor(name, names)) is not None:
        return f"; '{name}' is now called '{new}'"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def pick(kind: str, name: str, registry: Mapping[str, T]) -> T:
    """The registry's entry of that name; an unknown name is a `ConfigError` with the nearest one.

    kind: what is picked, for the message ("schedule", "decoder").
    """
    if name not in registry:
        raise ConfigError(f"{kind} '{name}' is unknown{nearest(name, registry)}")
    return registry[name]


def public_record(record: type[T]) -> type[T]:
    """Class decorator of a public dataclass: an argument or attribute that does not exist is
    answered with the nearest or new name, by a `ConfigError` or an `AttributeError`."""
    kind: Any = record
    make, known = kind.__init__, [f.name for f in dataclasses.fields(kind) if f.init]

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"{kind.__name__} has no argument '{name}'{nearest(name, known)}")
        make(self, *args, **kwargs)

    kind.__init__, kind.__getattr__ = init, _no_attribute
    return record


def _no_attribute(record: Any, name: str) -> Any:
    """`__getattr__` of a record, which Python calls for a missing attribute. Private names get a
    short answer: copying and pickling ask for them often."""
    if name.startswith("_"):
        raise AttributeError(name)
    kind = type(record)
    known = {f.name for f in dataclasses.fields(kind)} | {n for n in dir(kind) if n[0] != "_"}
    raise AttributeError(f"{kind.__name__} has no attribute '{name}'{nearest(name, known)}")
