"""Reads JSON from untrusted files. Uses the standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bdlm.core.errors import BdlmError, CheckpointError

DEEPEST, LONGEST = 64, 40  # most levels of nesting and digits of a number


def parse_json(
    text: str, source: str | Path, error: type[BdlmError] = CheckpointError
) -> dict[str, Any]:
    """Return the object that `text` holds.

    Raises `error` in one line, naming `source`, for text that is not JSON, nests too deeply, holds
    a number of thousands of digits, or is not an object.
    """
    try:
        value = json.loads(text, parse_int=_short_int)
        _check_depth(value)
    except (ValueError, RecursionError) as failure:
        raise error(
            f"{source}: is damaged: not readable JSON ({' '.join(str(failure).split())})"
        ) from None
    if not isinstance(value, dict):
        raise error(f"{source}: holds a JSON {type(value).__name__}; it must hold an object")
    return value


def _short_int(digits: str) -> int:
    if len(digits) > LONGEST:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Raise ValueError for what nests too deeply for code that walks it by recursion."""
    level = [value]
    for _ in range(DEEPEST):
        containers = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in containers for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise ValueError(f"it nests more than {DEEPEST} levels deep")


def read_json(file: Path, error: type[BdlmError] = CheckpointError) -> dict[str, Any]:
    """Read a UTF-8 file by `parse_json`; a file that cannot be read is an `error` too."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise error(f"{file}: not readable ({' '.join(str(failure).split())})") from None
    return parse_json(text, file, error)
