"""Writing files so that a reader never meets half of one, and nothing is replaced unasked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bdlm.core.errors import DataError


def write_beside(path: Path, content: bytes) -> None:
    """Write `path` under another name in its folder, then rename it: it appears whole or not at
    all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a device or a pipe; renaming a file over it would destroy it
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Values as indented JSON, by `write_beside`."""
    write_beside(path, (json.dumps(values, indent=1) + "\n").encode())


def write_figure(path: Path, figure: Any, tight: bool = False) -> None:
    """A matplotlib figure as a PNG, 120 dots an inch, by `write_beside`. tight: with what stands
    outside it."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", bbox_inches="tight" if tight else None)
    write_beside(path, content.getvalue())


def write_new(path: Path, content: bytes, overwrite: bool = False) -> None:
    """`write_beside`, but a file of other content is kept and a `DataError` raised unless
    `overwrite` is set."""
    if path.exists() and not overwrite:
        if path.read_bytes() == content:
            return
        raise DataError(
            f"{path} exists with other content; choose another folder or pass overwrite=True"
        )
    write_beside(path, content)


def sha256(content: bytes) -> str:
    """The SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
