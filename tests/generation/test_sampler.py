"""Large vocabularies: the quick ways to draw and to cut give what the plain ways give, token for
token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdlm.core import randomness
from bdlm.generation.sampling import logits_filters
from bdlm.generation.sampling import sampler as ours

VOCAB = 20_011  # above every switch, and no multiple of a run


def plain(logits: Tensor, state: Tensor) -> Tensor:
    """Gumbel-max in float64 over all tokens."""
    u = randomness.uniform_of(randomness.extend_hash(state[:, None], torch.arange(logits.shape[1])))
    return (logits.double() - (-u.log()).log()).argmax(-1)


def cells(
    count: int, spread: float, kept: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits [count, VOCAB] of which a random share is kept, and the state of each cell's noise."""
    generator = torch.Generator().manual_seed(count)
    logits = spread * torch.randn(count, VOCAB, generator=generator, dtype=dtype)
    removed = torch.rand(count, VOCAB, generator=generator) >= kept
    place = torch.arange(count)
    return logits.masked_fill_(removed, float("-inf")), ours.token_state(
        place + 7, place, torch.zeros_like(place)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("spread", [0.05, 3.0, 30.0])
def test_a_quick_draw_is_the_draw_in_float64(
    spread: float, kept: float, dtype: torch.dtype
) -> None:
    logits, state = cells(40, spread, kept, dtype)
    assert torch.equal(ours.draw_hashed(logits, state), plain(logits, state))
    assert torch.equal(ours.draw_hashed(logits[:1], state[:1]), plain(logits[:1], state[:1]))


def test_what_was_removed_is_not_drawn_where_a_look_at_some_tokens_misleads() -> None:
    logits, state = cells(4, 3.0)
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[:: ours.RUN] = True
    # the tokens that are looked at are all removed, or the only ones kept
    for removed in (seen, ~seen):
        cut = logits.masked_fill(removed, float("-inf"))
        assert torch.equal(ours.draw_hashed(cut, state), plain(cut, state))


def test_greedy_cells_take_the_likeliest_token_beside_others_that_draw() -> None:
    logits, state = cells(4, 3.0)
    greedy = torch.tensor([True, False, True, False])
    expected = torch.where(greedy, logits.argmax(-1), plain(logits, state))
    assert torch.equal(ours.draw_hashed(logits, state, greedy), expected)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("spread", [0.05, 3.0, 30.0])
def test_the_nucleus_by_bins_is_the_nucleus_by_sorting(spread: float, reference: bool) -> None:
    logits, _ = cells(6, spread)
    share = torch.tensor([0.1, 0.5, 0.9, 0.9, 0.99, 1.0], dtype=torch.float64)
    reference_M = torch.full((6,), reference)
    sorted_ = (
        logits_filters._keep_sorted(logits.softmax(-1), share, reference_M) | (share >= 1)[:, None]
    )
    kept = logits_filters.nucleus(logits, share, reference_M) != float("-inf")
    differs = (kept != sorted_).sum(1)
    # sums in another order: at most the token that crosses the border
    assert int(differs.max()) <= 1
