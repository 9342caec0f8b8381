"""Build the documentation site: `make docs`, or `python -m docs.site.build`.

Copies the pages of `docs/` and `results/` and the project's own to `build/docs`, points their links
to where things are on the site (or in the repository), adds the reference, and runs Zensical on
`mkdocs.yml`, which mkdocs reads too. The site is in `build/site`; git ignores all of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/bdlm/bdlm"
PROJECT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")  # at the repository's root
PAGES = (".md", ".svg", ".png")  # what is copied; programs and records stay out
CONTENTS = "<!-- reference -->"  # in docs/index.md: where the list of reference pages goes
LINK = re.compile(r"(\]\(|src=\"|href=\")(?!https?:|mailto:|#)([^)#\"\s]+)")


def sources() -> Iterator[tuple[Path, PurePosixPath]]:
    """(file, its place on the site) of every file that is copied."""
    for folder, above in (("docs", ROOT / "docs"), ("results", ROOT)):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in PAGES:
                yield path, PurePosixPath(path.relative_to(above).as_posix())
    for name in PROJECT_PAGES:
        if (ROOT / name).is_file():
            yield ROOT / name, PurePosixPath(name)


def stage(folder: Path) -> list[PurePosixPath]:
    """Write the Markdown and pictures of the site below `folder`; returns the pages."""
    from docs.site.reference import contents, pages

    shutil.rmtree(folder, ignore_errors=True)
    places = {path: inner for path, inner in sources()}
    written = []
    for path, inner in places.items():
        target = folder / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(path, target)
            continue
        text = _linked(path.read_text(encoding="utf-8"), path, inner, places)
        target.write_text(text.replace(CONTENTS, contents()), encoding="utf-8")
        written.append(inner)
    for name, text in pages().items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("repository:", f"{REPOSITORY}/blob/main/"), encoding="utf-8")
        written.append(PurePosixPath(name))
    return written


def _linked(text: str, path: Path, inner: PurePosixPath, places: dict[Path, PurePosixPath]) -> str:
    """The page with links that hold on the site: to a page there, else into the repository."""

    def moved(match: re.Match[str]) -> str:
        target = (path.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        place = places.get(target)
        if place is not None:
            return match[1] + os.path.relpath(place, inner.parent).replace(os.sep, "/")
        if not target.exists():  # a page of the reference, which exists on the site only
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}"

    return LINK.sub(moved, text)


def build(folder: Path) -> Path:
    """Build the site below `folder`; returns the folder of its HTML. Raises CalledProcessError."""
    stage(folder / "docs")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config.replace("_dir: build/", "_dir: ")  # Zensical takes relative paths only
    (folder / "mkdocs.yml").write_text(config, encoding="utf-8")
    shutil.rmtree(folder / "site", ignore_errors=True)
    program = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    subprocess.run([*program, "-f", str(folder / "mkdocs.yml")], check=True, cwd=folder)
    return folder / "site"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "build")
    chosen = parser.parse_args()
    try:
        import zensical  # noqa: F401
    except ImportError:
        sys.exit("Zensical is not installed; install it with: pip install 'bdlm[docs]'")
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(build(chosen.out.resolve()) / "index.html")


if __name__ == "__main__":
    main()
