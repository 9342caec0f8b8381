"""Links and anchors of Markdown and HTML files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

FENCED = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$", re.DOTALL | re.MULTILINE)
OUTSIDE = ("http:", "https:", "mailto:", "data:", "javascript:")


def markdown_links(text: str) -> list[str]:
    """The targets of the links and images of a page, code left out."""
    plain = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", plain) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", plain
    )
    return [link for link in found if not link.startswith(OUTSIDE)]


def markdown_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page, and those that it sets itself."""
    plain = FENCED.sub("", text)
    found = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", plain))
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", plain, re.MULTILINE):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = seen.get(slug, 0)
        seen[slug] = again + 1
        found.add(f"{slug}-{again}" if again else slug)
    return found


def broken_markdown_links(page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere, with the reason."""
    for link in markdown_links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif (
            anchor
            and target.suffix == ".md"
            and anchor not in markdown_anchors(target.read_text(encoding="utf-8"))
        ):
            yield f"{link}: no such heading"


class Page(HTMLParser):
    """What a page of HTML links to, and what can be linked in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)


def broken_site_links(site: Path) -> list[str]:
    """The links between the pages of a built site that lead nowhere."""
    pages = {
        path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")
    }
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, for a server
            continue
        for link in page.links:
            if link.startswith((*OUTSIDE, "//")) or link in ("#", "."):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / unquote(name.partition("?")[0])).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                wrong.append(f"{path.relative_to(site.resolve())}: {link}")
            elif (
                anchor
                and target in pages
                and unquote(anchor) not in pages[target].anchors
                and not anchor.startswith("__")
            ):
                wrong.append(f"{path.relative_to(site.resolve())}: {link}: no such anchor")
    return wrong
