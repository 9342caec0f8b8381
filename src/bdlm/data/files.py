"""Writes files so that a reader never sees half of one, and nothing is replaced unless
requested."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bdlm.core.errors import DataError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` under a temporary name in its folder, then rename it: it appears whole or not at
    all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # renaming a file over a device or a pipe would destroy it
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write values as indented JSON, by `write_atomically`."""
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def write_figure(path: Path, figure: Any, tight: bool = False) -> None:
    """Write a matplotlib figure as a PNG, 120 dots an inch, by `write_atomically`. tight: include
    what is outside the axes."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", bbox_inches="tight" if tight else None)
    write_atomically(path, content.getvalue())


def write_new(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Write by `write_atomically`, but raise `DataError` for an existing file of other content
    unless `overwrite` is set."""
    if path.exists() and not overwrite:
        if path.read_bytes() == content:
            return
        raise DataError(
            f"{path} exists with other content; choose another folder or pass overwrite=True"
        )
    write_atomically(path, content)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
