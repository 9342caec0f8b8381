"""What the suites of the outer layers share: a tiny trained model in a folder, and a small text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network

WORDS = (
    "the cat sat on the mat and the dog saw the cat; a bird sang, the sun rose, and all the town"
    " was glad of it.\n"
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 8 kB."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(WORDS * 75, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The folder of a byte model (2 layers, width 32, blocks of 4) trained for a few steps by the
    project's own recipe."""
    from bdlm.training.config import load_config
    from bdlm.training.loop import train

    out = tmp_path_factory.mktemp("run") / "tiny"
    sizes = [
        "model.hidden_dim=32",
        "model.length=32",
        "optim.batch_size=8",
        "limits.steps=12",
        "valid.every_steps=null",
        "valid.rows=4",
    ]
    result = train(
        load_config("tiny", [*sizes, f"data.train={text_file}", f"out={out}", "log.progress=false"])
    )
    assert result.model is not None
    return Path(result.model)
