"""Distributions of counts: fitted from losses, floored, and of least variance; what the losses of a
batch say about them."""

from __future__ import annotations

import pytest
import torch

from bdlm.core.blockmap import Contiguous, make_layout, maskable
from bdlm.core.corruption import corrupt
from bdlm.core.counts import BINS, CountDistribution, CountMoments
from bdlm.core.errors import ConfigError
from bdlm.core.objectives import count_losses, objective, total_and_losses, total_nats
from bdlm.core.schedules import SCHEDULES, Clipped
from bdlm.core.types import NOWHERE, NoisedBatch
from tests.contracts.builders import tiny_dit


def steep(n: int = 4) -> CountMoments:
    """Losses of blocks of n cells that grow tenfold from one masked cell to all."""
    count = torch.arange(1, n + 1)
    return CountMoments.of(torch.full((n,), n), count, 10.0 ** ((count - 1) / (n - 1)))


def second_moment(distribution: CountDistribution, n: int) -> float:
    """Of m_r / q(r) for the losses of `steep`."""
    count = torch.arange(1, n + 1)
    return float((100.0 ** ((count - 1) / (n - 1)) / distribution.probs[n, 1 : n + 1]).sum())


def test_the_fitted_law_has_the_least_second_moment() -> None:
    found = steep().distribution(4, floor=1e-9)
    least = second_moment(found, 4)
    assert least < 0.8 * second_moment(CountDistribution.uniform(4), 4)
    for r in range(1, 5):
        for change in (0.9, 1.1):
            other = found.probs.clone()
            other[4, r] *= change
            assert (
                second_moment(
                    CountDistribution(other / other.sum(1, keepdim=True).clamp(min=1e-300)), 4
                )
                > least
            )
    torch.testing.assert_close(
        found.probs[4, 1:] / found.probs[4, 1],
        (10.0 ** (torch.arange(4).double() / 3)),
        atol=0,
        rtol=1e-6,
    )


@pytest.mark.parametrize("widest", [1, 4, 16, 40])
def test_every_row_is_a_floored_distribution(widest: int) -> None:
    distribution = steep().distribution(widest, floor=0.2)
    for n in range(1, widest + 1):
        assert float(distribution.probs[n].sum()) == pytest.approx(1)
        assert not bool(distribution.probs[n, n + 1 :].any())
        assert float(distribution.probs[n, 1 : n + 1].min()) >= 0.2 / n - 1e-12
    assert not bool(distribution.probs[0].any())
    assert distribution.widest == widest
    uniform = CountDistribution.uniform(widest)
    for nothing in (
        CountMoments.empty(),
        CountMoments.of(torch.tensor([4]), torch.tensor([2]), torch.tensor([0.0])),
    ):
        assert torch.equal(nothing.distribution(widest, 0.2).probs, uniform.probs)


def test_shares_between_those_seen_lie_on_a_line() -> None:
    """Two shares seen out of sixteen; fading old losses changes no distribution, by not a bit."""
    seen = CountMoments.of(torch.tensor([16, 16]), torch.tensor([4, 12]), torch.tensor([1.0, 3.0]))
    q = seen.distribution(BINS, floor=1e-9).probs[BINS, 1:]
    expected = torch.tensor(
        [1.0] * 4 + [1 + (r - 4) / 4 for r in range(5, 12)] + [3.0] * 5, dtype=torch.float64
    )
    torch.testing.assert_close(q, expected / expected.sum(), atol=0, rtol=1e-6)
    assert torch.equal(
        seen.decayed(0.5).distribution(8, 0.1).probs, seen.distribution(8, 0.1).probs
    )
    more = seen + CountMoments.of(torch.tensor([16]), torch.tensor([4]), torch.tensor([7.0]))
    assert float(more.squares.sum()) == 1 + 9 + 49
    assert more.seen.tolist()[3] == 2


def ragged(
    distribution: str = "importance", counts: CountDistribution | None = None, step: int = 0
) -> NoisedBatch:
    ids = torch.randint(0, 10, (6, 16), generator=torch.Generator().manual_seed(3))
    doc = torch.zeros_like(ids)
    doc[4, 9:], doc[5, 6:], doc[5, 14:] = NOWHERE, 1, NOWHERE
    layout = make_layout(Contiguous(4), 16, doc)
    row = torch.arange(6)
    return corrupt(
        ids,
        layout,
        maskable(layout),
        SCHEDULES["linear"],
        seed=1,
        step=step,
        row=row,
        distribution=distribution,
        counts=counts,
        mask_id=10,
    )


@pytest.mark.parametrize("algo", ["bd3lm", "sedd"])
def test_losses_by_count_are_those_of_the_blocks(algo: str) -> None:
    """Against a loop over blocks, whatever the weights; `sedd` has no fused head."""
    model = tiny_dit(algo)
    if algo == "sedd":
        noised = corrupt(
            *_one_block(),
            SCHEDULES["linear"],
            seed=0,
            step=0,
            row=torch.arange(3),
            distribution="count",
            mask_id=10,
        )
    else:
        noised = ragged(counts=steep().distribution(4, 0.1))
    terms = objective(model, noised).detach()
    total, losses = total_and_losses(model, noised)
    assert torch.equal(total, total_nats(model, noised))
    assert not losses.requires_grad
    expected = []
    block = noised.layout.block.expand_as(noised.masked)
    for row in range(len(noised.clean)):
        for b in block[row].unique():
            cells, masked = (
                (block[row] == b) & noised.scored[row],
                (block[row] == b) & noised.masked[row],
            )
            if bool(masked.any()):
                mean = (terms[row][masked] / noised.weight[row][masked]).mean()
                expected.append([float(cells.sum()), float(masked.sum()), float(mean)])
    torch.testing.assert_close(
        torch.stack([x.double() for x in count_losses(losses, noised)], 1),
        torch.tensor(expected).double(),
    )
    assert len({n for n, _, _ in expected}) > 1 or algo == "sedd"


def _one_block():  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 10, (3, 16), generator=torch.Generator().manual_seed(3))
    layout = make_layout(Contiguous(16), 16)
    return ids, layout, maskable(layout).expand_as(ids)


def test_without_a_law_every_count_is_alike() -> None:
    """The same noise as distribution "count", cell for cell; so training starts there."""
    for step in range(20):
        own, other = ragged(step=step), ragged("count", step=step)
        assert torch.equal(own.masked, other.masked)
        torch.testing.assert_close(own.weight, other.weight)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="fitted for blocks of up to 2 cells, not 4"):
        ragged(counts=CountDistribution.uniform(2))
    for floor in (0.0, 1.5):
        with pytest.raises(ConfigError, match="floor is"):
            steep().distribution(4, floor)
    with pytest.raises(ConfigError, match="covers every count"):
        corrupt(
            *_one_block(),
            Clipped(0.3, 0.8),
            seed=0,
            step=0,
            row=torch.arange(3),
            distribution="importance",
            mask_id=10,
        )
