"""From command-line words to an `Options` dataclass, with one-line errors that name the nearest
flag.

In: a dataclass whose fields are the flags (tyro reads their types, defaults and docstrings) and the
words after the command's name.
Out: an instance. Knows nothing about what the commands do, and loads tyro only when called."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_type_hints

from bdlm.core.errors import ConfigError, nearest
from bdlm.core.validation import coerce, hints

T = TypeVar("T")
IN_OUR_WORDS = (  # what tyro says, and what we say
    (
        r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.+)",
        "{} is {}; use a whole number",
    ),
    (r"Error parsing (--\S+): could not convert string to float: (.+)", "{} is {}; use a number"),
    (
        r"Missing value for argument '(--\S+)'.*",
        "{0} needs a value; one that begins with a dash is written {0}=...",
    ),
    (
        r"Unrecognized options: (.+)",
        "there is no option {0}; a value that begins with a dash is written --name={0}",
    ),
)


def flags(kind: type[Any]) -> list[str]:
    """The flags of an options class, without dashes, as typed: `max-new-tokens`."""
    return [
        f.name.replace("_", "-")
        for f in dataclasses.fields(kind)
        if "Positional" not in str(f.type)
    ]


def parse(kind: type[T], words: Sequence[str], prog: str) -> T:
    """Read the words into `kind`. `--help` prints and exits 0; anything that does not fit is a
    `ConfigError`."""
    import tyro

    _known(kind, words, prog)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return _in_range(
                tyro.cli(kind, prog=prog, args=list(words), config=(tyro.conf.FlagCreatePairsOff,))
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    raise ConfigError(f"{_one_line(errors.getvalue())}; see `{prog} --help`")


def _in_range(options: T) -> T:
    """The options themselves, if each is in the range of its annotation; messages name the flag."""
    kind: Any = type(options)
    for name, hint in hints(kind).items():
        coerce(f"--{name.replace('_', '-')}", getattr(options, name), hint)
    return options


def _known(kind: type[Any], words: Sequence[str], prog: str) -> None:
    """Refuse unknown flags and missing required ones before tyro does, in one line."""
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
    """How to write what looks like the option `--name` as the value of the option before it, if
    that one lacks a value; else nothing."""
    takes_value = {
        "--" + f.name.replace("_", "-")
        for f in dataclasses.fields(kind)
        if f.type not in ("bool", bool)
    }
    for before, word in pairwise(words):
        looks = word.startswith("--") and word[2:].partition("=")[0].replace("_", "-") == name
        if looks and before.replace("_", "-") in takes_value:
            return f"; a value that begins with a dash is written {before}={shlex.quote(word)}"
    return ""


def _chosen(choices: Sequence[str], words: Sequence[str], prog: str) -> None:
    """Refuse a command's first word if it is none of the choices, or missing."""
    if set(choices) & set(words):
        return
    if words and not words[0].startswith("-"):
        raise ConfigError(f"{prog} has no '{words[0]}'{nearest(words[0], choices)}")
    raise ConfigError(f"{prog} needs a word after it: {', '.join(choices)}")


def _one_line(text: str) -> str:
    """The first message in tyro's box, without the box and its title. Outside UTF-8 the box has no
    sides, and its title a rule below."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        inside = line.strip("│ ")
        if len(inside) >= 10 and not inside.strip("─-"):
            parts.append([])
        elif not inside.startswith(("╭", "╰")):
            parts[-1].append(inside)
    said = " ".join(parts[0] if text.startswith("╭") or len(parts) == 1 else parts[1]).strip()
    for theirs, ours in IN_OUR_WORDS:
        if found := re.match(theirs, said):
            said = ours.format(*map(_short, found.groups()))
    return said or "the options could not be read"


def _short(value: str, most: int = 80) -> str:
    return value if len(value) <= most else f"{value[: most - 3]}..."
