"""Every fenced bash and python example of the guides and tutorials runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.fences import Fence, assert_close, fences, run, smaller

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "docs" / "index.md",
    *(p for f in ("guides", "tutorials") for p in sorted((ROOT / "docs" / f).glob("*.md"))),
]
SHIPPED = {
    "what-is-a-bound.md"
}  # shows numbers of the shipped model; elsewhere a tiny one has its name

LONG = {"command-line.md", "which-decoder.md"}  # compare decoders, which takes many short texts


@pytest.fixture
def folder(
    tmp_path: Path, tiny_model: Path, text_file: Path, request: pytest.FixtureRequest
) -> Path:
    """A reader's folder: a text and, unless the page needs the shipped one, a tiny model."""
    shutil.copy(text_file, tmp_path / "my.txt")
    if request.node.callspec.params["page"].name not in SHIPPED:
        shutil.copytree(tiny_model, tmp_path / "shakespeare")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in LONG), id=p.stem) for p in PAGES],
)
def test_the_examples_of_a_page_run(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(page, folder, capsys, monkeypatch, small_python=page.name not in SHIPPED) > 0


def test_there_are_guides_and_tutorials() -> None:
    assert {page.stem for page in PAGES} >= {"your-own-text", "what-is-a-bound", "which-decoder"}


# -- the runner itself -----------------------------------------------------------------


def test_a_failing_example_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nbdlm info --modle x\n```\n")
    with pytest.raises(AssertionError, match="modle"):
        run(page, tmp_path, capsys, monkeypatch)
    page.write_text("```python\nprint(1 / 0)\n```\n")
    with pytest.raises(ZeroDivisionError):
        run(page, tmp_path, capsys, monkeypatch)


def test_shown_output_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint('loss', 2.0)\n```\n\n<!-- output -->\n```text\nloss 2.01\n```\n"
    )
    assert run(page, tmp_path, capsys, monkeypatch) == 1
    page.write_text(page.read_text().replace("2.01", "2.1"))
    with pytest.raises(AssertionError):
        run(page, tmp_path, capsys, monkeypatch)
    with pytest.raises(AssertionError):
        assert_close("loss 1", "lost 1")


def test_continued_lines_are_one_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\n# a remark\nbdlm info \\\n    --json\n```\n```text\nno example\n```\n"
    )
    assert fences(page) == [Fence("bash", "# a remark\nbdlm info \\\n    --json\n", "")]
    assert [command.split() for command in fences(page)[0].commands()] == [
        ["bdlm", "info", "--json"]
    ]


def test_sizes_are_reduced() -> None:
    assert smaller("bdlm eval --model m --data f").endswith("--max-tokens 200")
    assert "--max-new-tokens 10 " in smaller("bdlm generate --max-new-tokens 60 --live")
