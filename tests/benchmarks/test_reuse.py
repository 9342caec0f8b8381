"""The watch that the benchmark of caches puts on a decoder: it changes nothing, and notes what
moved."""

from __future__ import annotations

import pytest
import torch

from bdlm.generation.full_sequence.engine import generate_full_sequence
from bdlm.generation.sampling_params import SamplingParams
from benchmarks.reuse import Watch, rank_correlation
from tests.contracts.builders import randomised, tiny_dit


def test_the_watch_writes_the_exact_text_and_notes_every_layer_and_call() -> None:
    model, watch, params = (
        randomised(tiny_dit("mdlm"), std=0.5).double(),
        Watch(),
        SamplingParams(max_new_tokens=9),
    )
    texts = [
        generate_full_sequence(model, [[1, 2, 3]], params, cache, block=3)[0].token_ids
        for cache in ("none", watch)
    ]  # type: ignore[arg-type]
    assert texts[0] == texts[1]
    assert [m.shape for m in watch.drift.moved] == [(12, 4)] * 2 * 8
    first = watch.drift.moved[0]
    assert (first[:, 1] > 1e-9).sum() == 1, (
        "in the first layer, the key of the one filled cell moves"
    )


def test_rank_correlation_is_that_of_ranks() -> None:
    a = torch.tensor([0.1, 3.0, 0.2, 9.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    assert rank_correlation(a, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(0.4)
