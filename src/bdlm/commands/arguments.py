"""Read the words of a command line into an `Options` dataclass.

In: a dataclass whose fields are the flags (tyro reads their types, defaults and docstrings), and
the words after the command's name. Out: an instance, or a one-line error that names the nearest
flag. Knows nothing about what the commands do, and loads tyro only when called.

A flag with a list value takes several words and may be repeated: `--stop a b --stop c` is the list
(a, b, c). Of other repeated flags the last one counts."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bdlm.core.errors import ConfigError, nearest
from bdlm.core.validation import coerce, hints

T = TypeVar("T")
MESSAGES = (  # pattern of a message of tyro, and the message to show instead
    (
        r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.+)",
        "{} is {}; use a whole number",
    ),
    (r"Error parsing (--\S+): could not convert string to float: (.+)", "{} is {}; use a number"),
    (
        r"Error parsing (--\S+): Could not find valid parse for arguments: (.+)",
        "{} cannot be read from {}",
    ),
    (
        r"Missing value for argument '(--\S+)'.*",
        "{0} needs a value; write one that begins with a dash as {0}=...",
    ),
    (
        r"Unrecognized options: (.+)",
        "there is no option {0}; write a value that begins with a dash as --name={0}",
    ),
)


def flags(kind: type[Any]) -> list[str]:
    """List the flags of an options class as they are typed, without dashes: `max-new-tokens`."""
    return [
        f.name.replace("_", "-")
        for f in dataclasses.fields(kind)
        if "Positional" not in str(f.type)
    ]


def parse(kind: type[T], words: Sequence[str], prog: str) -> T:
    """Read the words into an instance of `kind`.

    prog: the command's name, for messages. `--help` prints the help and exits with code 0. Raises
    ConfigError for words that do not fit, and for a value outside the range of its annotation."""
    _known(kind, words, prog)
    owner: Any = kind
    first, repeats = _without_repeats(kind, words)
    options: Any = _read(kind, first, prog)
    for name, again in repeats:
        more = getattr(options, name) + getattr(_read(kind, again, prog), name)
        options = dataclasses.replace(options, **{name: more})
    for name, hint in hints(owner).items():
        coerce(f"--{name.replace('_', '-')}", getattr(options, name), hint)
    made: T = options
    return made


def _read(kind: type[T], words: Sequence[str], prog: str) -> T:
    """Let tyro read the words; turn its message into a `ConfigError`."""
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind, prog=prog, args=list(words), config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    raise ConfigError(f"{_one_line(errors.getvalue())}; see `{prog} --help`")


def _without_repeats(
    kind: Any, words: Sequence[str]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Take repeated flags with list values apart, since tyro keeps only the last of them.

    Returns the words with the first occurrence of each such flag, and for each further occurrence
    the field's name and the words with that occurrence in place of the first.
    """
    lists = {name for name, hint in hints(kind).items() if get_origin(hint) is tuple}
    groups: list[list[str]] = [[]]  # what stands before the first flag, then a group for each flag
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    first: dict[str, int] = {}
    kept: list[list[str]] = []
    repeated: list[tuple[str, list[str]]] = []
    for group in groups:
        name = _field_of(group[0]) if group else ""
        if name in lists and name in first:
            repeated.append((name, group))
            continue
        first.setdefault(name, len(kept))
        kept.append(group)
    variants = [
        (name, [*kept[: first[name]], group, *kept[first[name] + 1 :]]) for name, group in repeated
    ]
    return _joined(kept), [(name, _joined(variant)) for name, variant in variants]


def _joined(groups: Sequence[Sequence[str]]) -> list[str]:
    return [word for group in groups for word in group]


def _field_of(word: str) -> str:
    """Name the field that a flag sets: `--held-out=x` sets `held_out`."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _known(kind: type[Any], words: Sequence[str], prog: str) -> None:
    """Refuse unknown flags and missing required flags in one line, before tyro does."""
    known = flags(kind)
    given = {
        re.split("=", w[2:], maxsplit=1)[0].replace("_", "-")
        for w in words
        if w.startswith("--") and len(w) > 2
    }
    if "help" in given or "-h" in words:
        return
    for name in sorted(given - set(known)):
        near = nearest("--" + name, ["--" + k for k in known])
        hint = near if "did you mean" in near else _as_value(kind, words, name) or near
        raise ConfigError(f"{prog} has no option '--{name}'{hint}")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and "Positional" not in str(f.type) and f.name.replace("_", "-") not in given:
            raise ConfigError(f"{prog} needs --{f.name.replace('_', '-')}; see `{prog} --help`")
        if required and "Positional" in str(f.type):
            _chosen(get_args(get_type_hints(kind)[f.name]), words, prog)


def _as_value(kind: type[Any], words: Sequence[str], name: str) -> str:
    """Say how to write `--name` as the value of the option before it, if that one lacks a value;
    else an empty string."""
    takes_value = {
        "--" + f.name.replace("_", "-")
        for f in dataclasses.fields(kind)
        if f.type not in ("bool", bool)
    }
    for before, word in pairwise(words):
        looks = word.startswith("--") and word[2:].partition("=")[0].replace("_", "-") == name
        if looks and before.replace("_", "-") in takes_value:
            return f"; write a value that begins with a dash as {before}={shlex.quote(word)}"
    return ""


def _chosen(choices: Sequence[str], words: Sequence[str], prog: str) -> None:
    """Refuse a first word that is missing or is not one of the choices."""
    if set(choices) & set(words):
        return
    if words and not words[0].startswith("-"):
        raise ConfigError(f"{prog} has no '{words[0]}'{nearest(words[0], choices)}")
    raise ConfigError(f"{prog} needs a word after it: {', '.join(choices)}")


def _one_line(text: str) -> str:
    """Take the first message out of the box that tyro draws around it, without the box's title.

    Outside UTF-8 the box has no sides, and a line below its title."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        inside = line.strip("│ ")
        if len(inside) >= 10 and not inside.strip("─-"):
            parts.append([])
        elif not inside.startswith(("╭", "╰")):
            parts[-1].append(inside)
    said = " ".join(parts[0] if text.startswith("╭") or len(parts) == 1 else parts[1]).strip()
    for theirs, ours in MESSAGES:
        if found := re.match(theirs, said):
            said = ours.format(*map(_short, found.groups()))
    return said or "the options could not be read"


def _short(value: str, most: int = 80) -> str:
    return value if len(value) <= most else f"{value[: most - 3]}..."
