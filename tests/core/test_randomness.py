"""Uniforms lie strictly inside (0, 1), so that their Gumbels are finite."""

from __future__ import annotations

import torch

from bdlm.core.randomness import Rarity, bits, follow, uniform_of


def test_the_ends_of_the_hash_are_inside_the_open_interval() -> None:
    ends = uniform_of(torch.tensor([0, -1, 1 << 62, -(1 << 63)]))
    assert ends.tolist() == [2.0**-53, 1 - 2.0**-53, 0.25 + 2.0**-53, 0.5 + 2.0**-53]
    assert bool((-(-ends.log()).log()).isfinite().all())


def test_rarity_is_the_distance_to_one() -> None:
    state, tokens = bits(torch.arange(50)), 400
    rare = Rarity(tokens, 50, torch.device("cpu"))(state).double() * 2.0**-63
    exact = 1 - uniform_of(follow(state[:, None], torch.arange(tokens)))
    assert (
        bool((rare <= exact * (1 + 2.0**-23)).all()) and float((exact - rare).max()) < 2.0**-23
    ), "single precision"
