"""Mistakes end in one line and exit code 2, before any file is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import Run
from tests.cli.mistakes import MISTAKES


def weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def facts(folder: Path, name: str, **changed: Any) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04}.")


NORM = "backbone.blocks.0.norm1.weight"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "nan": lambda folder: weights(folder, lambda tensors: tensors[NORM].fill_(float("nan"))),
    "partial": lambda folder: weights(folder, lambda tensors: tensors.pop(NORM)),
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-9]
        )
    ),
    "pickled": pickled,
    "code": lambda folder: facts(folder, "config.json", backbone="os:system"),
    "blockless": lambda folder: facts(folder, "config.json", block_size=0),
    "foreign": lambda folder: facts(
        folder, "bdlm_tokenizer.json", vocab_size=257, mask_id=256, eos_id=None, bos_id=None
    ),
    "mute": lambda folder: (folder / "bdlm_tokenizer.json").unlink(),
}


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path
) -> dict[str, Path]:
    """Files that the mistakes name."""
    folder = tmp_path_factory.mktemp("bad")
    contents = {
        "empty.txt": b"",
        "binary.txt": b"\xff\xfe\x00abc",
        "short.txt": b"a",
        "pickle.bin": b"\x80\x04}.",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name, damage in DAMAGES.items():
        shutil.copytree(tiny_model, folder / name)
        (folder / name / "manifest.json").unlink()  # without checksums the damage itself is found
        damage(folder / name)
    shutil.copytree(tiny_model, folder / "changed")
    DAMAGES["nan"](folder / "changed")
    named = {name.split(".")[0]: folder / name for name in [*contents, *DAMAGES, "changed"]}
    return {"model": tiny_model, "text": text_file} | named


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(
    bdlm: Run,
    places: dict[str, Path],
    mistake: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    code, out, err = bdlm(*(w.format(**places) for w in words))
    assert code == 2, err
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("bdlm: "), err
    assert expected in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], (
        "nothing is written before the options are checked"
    )
