"""Paths as users write them. In: text or a path. Out: a `Path` with its home folder written out, or
a `ConfigError` in one line."""

from __future__ import annotations

import os
from pathlib import Path

from bdlm.core.errors import ConfigError, shown


def user_path(name: str | os.PathLike[str], what: str = "path") -> Path:
    """The path of a name in which a leading `~` or `~user` stands for a home folder; nothing has to
    exist there.

    what: how messages name it ("--out", "judge"). Raises ConfigError for a user that does not
    exist, and for text that no file system takes as a name (a NUL byte, a lone surrogate)."""
    text = os.fspath(name)
    try:
        if b"\0" in os.fsencode(text):
            raise ConfigError(
                f"{what} is {shown(text)}, which holds a NUL byte; use the name of a file or folder"
            )
        whole = os.path.expanduser(text)
    except UnicodeEncodeError:
        raise ConfigError(
            f"{what} is {shown(text)}, which no file can be named; use the name of a file or folder"
        ) from None
    if whole.startswith("~"):
        raise ConfigError(
            f"{what} is '{text}', but there is no such user's home folder; write the path out, or"
            " ./~ for such a name"
        )
    return Path(whole)
