"""Tiny runs: a text of made-up words, a model of two layers, seconds on one core."""

import random

import pytest
import torch
from training_runs import arguments

from bdlm.training.config import load_config


@pytest.fixture(autouse=True)
def one_thread():
    """Sums have one order with one thread, so equal means equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 4,000 made-up words: enough windows for two epochs in the runs here."""
    chance = random.Random(3)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 6))) for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text(" ".join(chance.choices(words, k=900)) + "\n")
    return path


@pytest.fixture
def small(text, tmp_path):
    """`small("field=value", ..., out="name")` -> a config for a tiny run into a folder of this
    test."""
    return lambda *overrides, out="run": load_config(
        None, arguments(text, tmp_path / out, *overrides)
    )
