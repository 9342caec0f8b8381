"""A saved model knows its files: one flipped bit anywhere in them is seen before anything is
used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import bdlm
from bdlm.core import manifest
from bdlm.core.errors import CheckpointError
from bdlm.data.tokenizers import train_bpe
from bdlm.models.model_folder import load, packaged, save
from tests.models.test_model_folder import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and its tokenizer, saved one after the other as a training run does."""
    tokenizer = train_bpe(["the cat sat on the mat"] * 4, 264)
    sizes = {"vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id}
    made = save(tiny(**sizes), tmp_path / "model")
    tokenizer.save(made)
    return made


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_every_flipped_bit_is_refused(folder: Path) -> None:
    bdlm.load(folder)
    draw = random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    assert manifest.MANIFEST in names and "tokenizer.json" in names
    for name in names:
        original = (folder / name).read_bytes()
        for _ in range(40):
            flip(folder / name, draw.randrange(8 * len(original)))
            with pytest.raises(CheckpointError, match=name) as caught:
                bdlm.load(folder)
            assert "\n" not in str(caught.value)
            (folder / name).write_bytes(original)
    bdlm.load(folder)


def test_a_lost_file_is_named(folder: Path) -> None:
    (folder / "bdlm_tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"bdlm_tokenizer\.json: is missing"):
        bdlm.load(folder)


def test_a_folder_without_checksums_loads_with_a_note(folder: Path) -> None:
    assert not any("manifest" in note for note in bdlm.load(folder).notes)
    (folder / manifest.MANIFEST).unlink()
    assert any("no manifest.json" in note for note in bdlm.load(folder).notes)


def test_checksums_can_be_left_out(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(
        CheckpointError, match=r"config\.json: has changed .* delete .*manifest\.json"
    ):
        bdlm.load(folder)
    assert any("not compared" in note for note in bdlm.load(folder, verify=False).notes)


def test_saving_over_a_model_lists_the_new_files(folder: Path) -> None:
    save(tiny(seed=3), folder, overwrite=True)
    assert load(folder)
    assert manifest.verify(folder)


def test_the_shipped_model_is_whole(tmp_path: Path) -> None:
    found = packaged()
    if not found:
        pytest.skip("this tree holds no packaged model")
    for name, source in found.items():
        assert manifest.verify(source), name
        copy = tmp_path / name
        shutil.copytree(source, copy)
        flip(copy / "model.safetensors", 8 * (copy / "model.safetensors").stat().st_size - 100)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: has changed"):
            bdlm.load(copy)
