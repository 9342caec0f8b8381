"""Guides and tutorials repeat measured figures: each is one of the page that they cite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.links import FENCED

DOCS = Path(__file__).parents[2] / "docs"
CITED = {
    "guides/which-decoder.md": ("decoders.md", "performance.md"),
    "tutorials/what-is-a-bound.md": ("results.md",),
}


def figures(text: str) -> set[str]:
    """The numbers with a decimal point of a page's prose and tables, code left out."""
    plain = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", plain))


@pytest.mark.parametrize("page", CITED)
def test_figures_are_those_of_the_cited_page(page: str) -> None:
    known = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in CITED[page])
    shown = figures((DOCS / page).read_text(encoding="utf-8"))
    assert len(shown) > 8
    found = set(re.findall(r"\d+\.\d+", known))
    assert shown <= found


def test_figures_are_found() -> None:
    assert figures("0.25 nats, `0.5`\n```text\n0.75\n```\n| 1.5 | arXiv 2.") == {"0.25", "1.5"}
