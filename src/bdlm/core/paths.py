"""Reads paths as users write them. In: text or a path. Out: a `Path` with its home folder written
out, or a `ConfigError` in one line."""

from __future__ import annotations

import os
from pathlib import Path

from bdlm.core.errors import ConfigError, shown


def user_path(name: str | os.PathLike[str], what: str = "path") -> Path:
    """Return the path of a name; a leading `~` or `~user` is replaced by a home folder. The path
    need not exist.

    what: how messages name it ("--out", "judge").
    Raises ConfigError for a user that does not exist, and for text that no file system accepts as a
    name (a NUL byte, a lone surrogate)."""
    text = os.fspath(name)
    try:
        if b"\0" in os.fsencode(text):
            raise ConfigError(
                f"{what} is {shown(text)}, which holds a NUL byte; use the name of a file or folder"
            )
        expanded = os.path.expanduser(text)
    except UnicodeEncodeError:
        raise ConfigError(
            f"{what} is {shown(text)}, which no file can be named; use the name of a file or folder"
        ) from None
    if expanded.startswith("~"):
        raise ConfigError(
            f"{what} is '{text}', but there is no such user's home folder; write the path out, or"
            " ./~ for such a name"
        )
    return Path(expanded)
