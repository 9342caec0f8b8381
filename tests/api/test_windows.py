"""How far a text looks back: a prompt longer than the training window is used whole, is said, and
changes no other text."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import bdlm
from bdlm.api import LM
from bdlm.core.errors import BdlmWarning

# of a model that was trained on 32 tokens
LONG = "the cat sat on the mat and the dog saw the cat; a bird sang"
SAID = f"the prompt has {1 + len(LONG)} tokens, more than the 32"


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LM:
    return bdlm.load(tiny_model)


def test_a_prompt_longer_than_the_window_is_said_and_recorded(lm: LM) -> None:
    with pytest.warns(BdlmWarning, match=SAID) as found:
        text = lm.generate(LONG, max_new_tokens=8)
    assert found[0].filename == __file__, "the warning points at the caller's line"
    assert text.context_window == 1 + len(LONG)
    with pytest.warns(BdlmWarning, match=SAID):
        *_, last = lm.stream(LONG, max_new_tokens=8)
    assert last.result is not None
    assert (last.result.context_window, last.result.text) == (text.context_window, text.text)


def test_other_texts_are_not_warned_of(lm: LM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BdlmWarning)
        assert lm.generate("the", max_new_tokens=8).context_window is None
        assert lm.generate("the", max_new_tokens=60).context_window == 32
        assert lm.generate("the", max_new_tokens=60, context_window=16).context_window == 16
        assert lm.generate(LONG, max_new_tokens=8, context_window=0).context_window is None


def test_a_long_prompt_leaves_its_neighbours_alone(lm: LM) -> None:
    """A text is a function of its prompt, options and seed: a window widened for one prompt is not
    widened for another."""
    alone = lm.generate("the", max_new_tokens=60, seed=3)
    with pytest.warns(BdlmWarning):
        _, long, beside = lm.generate(["a", LONG, "the"], max_new_tokens=60, seed=1)
        assert long.token_ids == lm.generate(LONG, max_new_tokens=60, seed=2).token_ids
    assert (beside.token_ids, beside.context_window) == (alone.token_ids, 32)


def test_a_row_says_its_own_window_in_any_company(lm: LM) -> None:
    long = LONG[:25]
    alone = [
        lm.generate(prompt, max_new_tokens=10, seed=i) for i, prompt in enumerate(["the", long])
    ]
    assert [text.context_window for text in alone] == [None, 32]
    beside = lm.generate(["the", long], max_new_tokens=10)
    assert [(t.context_window, t.token_ids) for t in beside] == [
        (t.context_window, t.token_ids) for t in alone
    ]
    assert beside[0].engine_steps == beside[1].engine_steps, "they share their calls"
