"""The scripts and the notebook of examples/ run, on a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_short_and_tested() -> None:
    scripts = {p.stem: len(p.read_text().splitlines()) for p in EXAMPLES.glob("*.py")}
    assert set(scripts) == {"train_tiny", "score", "stream", "own_decoder"}
    assert max(scripts.values()) < 60


def test_train_tiny(text_file: Path, tmp_path: Path) -> None:
    model = script("train_tiny").main(str(text_file), str(tmp_path / "run"), steps=3)
    assert (Path(model) / "config.json").is_file()


def test_score(tiny_model: Path, text_file: Path) -> None:
    scores = script("score").main(str(tiny_model))
    assert set(scores) == {1, 2, 4}
    assert all(0 < s.nats_per_token < 20 for s in scores.values())


def test_stream(tiny_model: Path) -> None:
    import bdlm

    text = script("stream").main(str(tiny_model), "the ", 10)
    assert text == bdlm.load(tiny_model).generate("the ", max_new_tokens=10).text


def test_own_decoder(tiny_model: Path) -> None:
    results = script("own_decoder").main(str(tiny_model), 12)
    calls = [r.forward_passes for r in results]
    assert calls == sorted(calls, reverse=True)
    assert calls[0] > calls[-1]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(
    notebook: Path,
    tiny_model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("BDLM_MODEL", str(tiny_model))
    monkeypatch.setenv("BDLM_TEXT", str(text_file))
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    nbclient.NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error"]


def test_there_is_a_notebook() -> None:
    assert list(EXAMPLES.glob("*.ipynb"))
