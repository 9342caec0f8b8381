"""Test that docs/architecture.md names modules and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Where things are", 1)[1].split("\n## ", 1)[0]
TABLE = SECTION[SECTION.index("| what | where |") :]
PATHS = sorted(set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", TABLE)))


def test_the_table_was_read() -> None:
    assert len(PATHS) >= 30
    for word in ("decoder", "scheduler", "loss", "cache"):
        assert re.search(rf"^\| [^|]*\b{word}", TABLE, re.MULTILINE | re.IGNORECASE), word


@pytest.mark.parametrize("path", PATHS)
def test_a_named_path_exists(path: str) -> None:
    # `base.py` and `__init__.py` are named after their folder in the same row
    folders = ("", "generation/decoders/")
    assert any((ROOT / "src" / "bdlm" / folder / path).exists() for folder in folders)


def test_the_forward_functions_exist() -> None:
    source = (ROOT / "src" / "bdlm" / "core" / "forward.py").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    assert len(rows) == 4
    assert all(f"def {name}(" in source for name in rows)
