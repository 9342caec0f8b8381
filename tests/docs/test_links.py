"""Every link and anchor of every Markdown page leads somewhere, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.links import broken_markdown_links, broken_site_links, markdown_anchors

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(
        p
        for folder in ("docs", "results", "tests", "src", "examples")
        for p in (ROOT / folder).rglob("*.md")
    ),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_markdown_links(page))


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "[x](b.md#two-words) [y](b.md#none) [z](c.md) `[w](d.md)`\n```\n[v](e.md)\n```\n"
    )
    (tmp_path / "b.md").write_text("# Two *words*\n")
    assert list(broken_markdown_links(tmp_path / "a.md")) == [
        "b.md#none: no such heading",
        "c.md: no such file",
    ]


def test_headings_alike_are_numbered() -> None:
    assert markdown_anchors("# A `b`, c!\n## A b c\n```\n# no\n```\n") == {"a-b-c", "a-b-c-1"}


def test_a_dead_link_of_a_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="b.html#y"></a><a href="b.html#z"></a>'
        '<a href="c.html"></a><a href="#x"></a>'
    )
    (tmp_path / "b.html").write_text('<p id="y"></p>')
    assert broken_site_links(tmp_path) == ["a.html: b.html#z: no such anchor", "a.html: c.html"]
