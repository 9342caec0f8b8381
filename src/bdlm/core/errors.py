"""What a user can get wrong, as exceptions with one-line messages that name the field, the value
and the suggested fix.

The command line prints the message and exits with code 2; asserts are for what only the project
itself can get wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class BdlmError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(BdlmError):
    """An option is unknown, out of range, or does not fit another one."""


class DataError(BdlmError):
    """A text, a file or a tokenizer cannot be used as it is."""


class CheckpointError(BdlmError):
    """A checkpoint is missing, damaged, of another shape, or unsafe to load."""


class UnsupportedError(BdlmError):
    """A model does not have what was asked of it."""


class DecoderError(BdlmError):
    """A decoder broke a rule that every decision keeps, for instance by filling a cell that was not
    masked."""


class TrainingError(BdlmError):
    """Training cannot go on, for instance because the loss is not finite."""


class BdlmWarning(UserWarning):
    """Something that is done, but may not be what was wanted; said once. The command line prints it
    in one line."""


def shown(value: object, most: int = 80) -> str:
    """A value as messages show it: its repr in one line of at most so many characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # Python refuses to write out numbers of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'steps'?"` when a known name is close, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def pick(kind: str, name: str, registry: Mapping[str, T]) -> T:
    """The registry's entry of that name; an unknown name is a `ConfigError` with the nearest one.

    kind: what is picked, for the message ("schedule", "decoder").
    """
    if name not in registry:
        raise ConfigError(f"{kind} '{name}' is unknown{nearest(name, registry)}")
    return registry[name]
