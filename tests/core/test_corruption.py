"""The distributions of corruption: strata, counts, weights, processes. Random checks are z-tests at
5 standard errors (false alarm 6e-7 each)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous, make_layout, maskable
from bdlm.core.corruption import DISTRIBUTIONS, Blocks, corrupt, strata, truncated_count
from bdlm.core.counts import CountMoments
from bdlm.core.errors import ConfigError
from bdlm.core.schedules import SCHEDULES, Clipped
from bdlm.core.types import NOWHERE, Layout, NoisedBatch
from tests.core.maps import Ragged, block_counts

LINEAR, MASK = SCHEDULES["linear"], 9
# distribution "importance" alone
SKEWED = CountMoments.of(
    torch.full((4,), 4), torch.arange(1, 5), torch.tensor([1.0, 5.0, 2.0, 9.0])
).distribution(4, 0.1)


def z_score(values: Tensor, expected: float) -> float:
    """Of the mean of independent values."""
    return float(
        (values.double().mean() - expected) / (values.double().std() / math.sqrt(len(values)))
    )


def world(
    rows: int, length: int = 24, size: int = 4, ragged: bool = False
) -> tuple[Tensor, Layout, Tensor]:
    """Clean ids, a layout and the maskable cells; ragged: documents of other lengths in every row,
    padding, given first tokens."""
    clean = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(1))
    if not ragged:
        return (
            clean,
            make_layout(Contiguous(size), length),
            torch.ones(rows, length, dtype=torch.bool),
        )
    place = torch.arange(length)
    doc = torch.stack(
        [
            torch.where(place < 5 + r % 9, 0, torch.where(place < 19 - r % 3, 1, NOWHERE))
            for r in range(rows)
        ]
    )
    layout = make_layout(Ragged(3, size), length, doc)
    return clean, layout, maskable(layout)


def noise(
    rows: int, ragged: bool = False, size: int = 4, schedule: Any = LINEAR, **options: Any
) -> NoisedBatch:
    clean, layout, cells = world(rows, size=size, ragged=ragged)
    options = {"seed": 0, "step": 0, "row": torch.arange(rows), "mask_id": MASK, **options}
    return corrupt(clean, layout, cells, schedule, **options)


# -- strata ----------------------------------------------------------------------------------------


def test_every_stratum_is_hit_once() -> None:
    _, layout, cells = world(8)
    blocks = Blocks.of(layout, cells)
    for step in range(5):
        t = strata(blocks, seed=3, step=step, row=torch.arange(8) + 40, rows_total=8)
        assert sorted((t * 48).long().flatten().tolist()) == list(range(48))
        for r in range(8):
            assert sorted((t[r] * 6).long().tolist()) == list(range(6))


def test_each_block_is_uniform_over_steps() -> None:
    """Spec 3.6: without a permutation the first block would always be nearly clean. Mean and
    variance of U(0, 1) for every block."""
    _, layout, cells = world(2)
    blocks, row = Blocks.of(layout, cells), torch.arange(2)
    t = torch.stack([strata(blocks, seed=0, step=s, row=row, rows_total=2) for s in range(500)])
    for block in t.flatten(1).unbind(1):
        assert abs(z_score(block, 0.5)) < 5
        assert abs(z_score((block - 0.5).square(), 1 / 12)) < 5


def test_rows_apart_take_all_their_strata_wherever_they_stand() -> None:
    _, layout, cells = world(6)
    blocks, row = Blocks.of(layout, cells), torch.arange(6) * 7 - 10
    t = strata(blocks, seed=3, step=0, row=row, rows_total=6, independent_rows=True)
    assert (
        all(sorted((own * 6).long().tolist()) == list(range(6)) for own in t)
        and len(set(t[:, 0].tolist())) == 6
    )
    other = torch.tensor([4, 1, 4])
    some = Blocks.of(layout, cells[:3])
    assert torch.equal(
        strata(
            some, seed=3, step=0, row=row[other], rows_total=3, first_row=5, independent_rows=True
        ),
        t[other],
    )
    many = torch.stack(
        [
            strata(some, seed=0, step=s, row=row[:3], rows_total=3, independent_rows=True)
            for s in range(500)
        ]
    )
    for block in many.flatten(1).unbind(1):
        assert abs(z_score(block, 0.5)) < 5 and abs(z_score((block - 0.5).square(), 1 / 12)) < 5


def test_ragged_rows_cover_their_own_strata() -> None:
    _, layout, cells = world(6, ragged=True)
    blocks = Blocks.of(layout, cells)
    t = strata(blocks, seed=0, step=0, row=torch.arange(6), rows_total=6)
    assert len(set(blocks.count.tolist())) > 1
    for r, n in enumerate(blocks.count.tolist()):
        assert sorted((t[r, :n] * n).long().tolist()) == list(range(n))


# -- processes and rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", (False, True))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_two_processes_see_the_noise_of_one(distribution: str, ragged: bool) -> None:
    clean, layout, cells = world(6, ragged=ragged)
    shared = {"seed": 5, "step": 7, "mask_id": MASK, "distribution": distribution, "rows_total": 6}
    row = torch.tensor([11, 3, 8, 20, 21, 22])
    full = corrupt(clean, layout, cells, LINEAR, row=row, **shared)
    for start, stop in ((0, 2), (2, 6)):
        part_rows = slice(start, stop)
        own = layout if layout.rank.shape[0] == 1 else layout.map(lambda x, rows=part_rows: x[rows])
        part = corrupt(
            clean[part_rows],
            own,
            cells[part_rows],
            LINEAR,
            row=row[part_rows],
            first_row=start,
            **shared,
        )
        index = torch.cat(
            [torch.arange(start, stop) + k for k in range(0, full.masked.shape[0], 6)]
        )
        for name in ("clean", "noisy", "masked", "time", "weight", "scored"):
            assert bool((getattr(part, name) == getattr(full, name)[index]).all()), name


def test_noise_depends_on_seed_step_and_row() -> None:
    base = noise(4).masked
    for change in ({"seed": 1}, {"step": 1}, {"row": torch.arange(4) + 4}):
        assert not bool((noise(4, **change).masked == base).all())
    assert bool((noise(4).masked == base).all())


# -- distributions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", (False, True))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_batch_is_sound(distribution: str, ragged: bool) -> None:
    clean, _, cells = world(8, ragged=ragged)
    noised = noise(8, ragged, distribution=distribution)
    copies = noised.masked.shape[0] // 8
    assert bool((noised.masked <= cells.repeat(copies, 1)).all())
    assert bool((noised.noisy == torch.where(noised.masked, MASK, clean.repeat(copies, 1))).all())
    assert bool((noised.weight[~noised.masked] == 0).all())
    assert bool((noised.weight[noised.masked] > 0).all())
    assert int(noised.scored.sum()) == int(cells.sum())
    assert noised.time.dtype == noised.weight.dtype == torch.float32
    block = noised.layout.block.expand_as(noised.time)
    together = (
        (block[:, 1:] == block[:, :-1]) & (noised.time[:, 1:] > 0) & (noised.time[:, :-1] > 0)
    )
    assert bool((noised.time[:, 1:] == noised.time[:, :-1])[together].all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_masked_share_is_the_schedules(name: str) -> None:
    """E[masked | time] = p, and the mean share over t is the integral of p."""
    schedule = SCHEDULES[name]
    fine = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    noised = [noise(4, schedule=schedule, step=s) for s in range(120)]
    assert (
        abs(
            z_score(
                torch.stack([n.masked.double().mean() for n in noised]),
                float(schedule.mask_prob(fine).mean()),
            )
        )
        < 5
    )
    assert abs(z_score(torch.stack([(n.masked.double() - n.time).mean() for n in noised]), 0.0)) < 5


def test_clipped_range_is_respected() -> None:
    noised = noise(64, schedule=Clipped(0.3, 0.8))
    assert float(noised.time.min()) >= 0.3
    assert float(noised.time.max()) <= 0.8
    assert abs(float(noised.time.mean()) - 0.55) < 0.001  # strata: far closer than chance
    torch.testing.assert_close(noised.weight[noised.masked], 1 / noised.time[noised.masked])


def test_count_is_uniform_and_weights_sum_to_the_cells() -> None:
    """r uniform on 1..n_b of the block's own n_b, every cell equally likely, sum of weights n_b: on
    ragged blocks."""
    _, layout, cells = world(6, ragged=True)
    sizes = block_counts(layout, cells)
    counts: dict[int, list[float]] = {}
    places = []
    for step in range(200):
        noised = noise(6, True, distribution="count", step=step)
        r = block_counts(layout, noised.masked)
        here = noised.masked
        torch.testing.assert_close(noised.weight[here], (sizes / r.clamp(min=1))[here].float())
        for n in range(1, 5):
            counts.setdefault(n, []).append(
                float(r[cells & (sizes == n)].double().mean())
                if bool((cells & (sizes == n)).any())
                else math.nan
            )
        places.append((here.double() - (r / sizes.clamp(min=1)))[cells])
    for n, means in counts.items():
        values = torch.tensor(means)
        if not bool(values.isnan().any()):
            assert bool((values == 1).all()) if n == 1 else abs(z_score(values, (n + 1) / 2)) < 5, n
    spread = torch.stack(places)
    assert float((spread.mean(0) / (spread.std(0) / 200**0.5).clamp(min=1e-9)).abs().max()) < 5


def test_complementary_halves() -> None:
    _, layout, cells = world(6, ragged=True)
    sizes = block_counts(layout, cells)
    shares = []
    for step in range(200):
        noised = noise(6, True, distribution="complementary", step=step)
        first, second = noised.masked.chunk(2)
        assert bool(((first ^ second) == cells).all())
        for half, weight in zip((first, second), noised.weight.chunk(2), strict=True):
            r = block_counts(layout, half)
            torch.testing.assert_close(
                weight[half], ((sizes + 1) / (2 * r.clamp(min=1)))[half].float()
            )
        assert not bool(noised.scored[6:].any())
        assert bool((noised.scored[:6] == cells).all())
        shares.append(noised.weight.double().sum() / cells.sum())
    assert abs(z_score(torch.stack(shares), 1.0)) < 5


def test_all_masks_everything() -> None:
    noised = noise(3, True, distribution="all")
    assert bool((noised.masked == noised.scored).all())
    assert bool((noised.weight == noised.masked).all())


@pytest.mark.parametrize("distribution", ("time", "count", "complementary", "importance"))
def test_laws_give_time_its_distribution(distribution: str) -> None:
    """A model may look at the time: E sum of weight * g(time) over masked cells is n * integral of
    g, also where counts are drawn."""
    for g, integral in (
        (lambda p: p**2, 1 / 3),
        (lambda p: (1 - p) ** 3, 1 / 4),
        (lambda p: torch.sin(3 * p), (1 - math.cos(3)) / 3),
    ):
        sums = []
        for step in range(200):
            noised = noise(4, True, distribution=distribution, step=step, counts=SKEWED)
            sums.append(
                (noised.weight.double() * g(noised.time.double())).sum() / noised.scored.sum()
            )
        assert abs(z_score(torch.stack(sums), integral)) < 5


# -- resampled counts ------------------------------------------------------------------------------


def test_truncated_counts_follow_the_redrawing_distribution() -> None:
    """Binomial counts given that they lie within the limits: against the pmf, at evenly spread
    quantiles."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5)[None] / 20_000
    for n, p, (low, high) in (
        (4, 0.7, (0.45, 0.95)),
        (16, 0.35, (0.3, 0.8)),
        (7, 0.99, (0.0, 0.5)),
        (5, 1.0, (0.2, 1.0)),
    ):
        size, q = torch.full((1, 20_000), n), torch.full((1, 20_000), p, dtype=torch.float64)
        count, fits = truncated_count(size, q, (low, high), u)
        pmf = torch.tensor(
            [
                math.comb(n, k) * p**k * (1 - p) ** (n - k) if low <= k / n <= high else 0
                for k in range(n + 1)
            ]
        )
        shares = torch.bincount(count[0], minlength=n + 1) / 20_000
        assert bool(fits.all())
        torch.testing.assert_close(shares.double(), (pmf / pmf.sum()).double(), atol=2e-4, rtol=0)


def test_resampling_keeps_counts_within_limits() -> None:
    for (low, high), allowed in (
        ((0.45, 0.95), {2, 3}),
        ((0.001, 0.5), {0, 1, 2}),
        ((0.5, 1.0), {2, 3, 4}),
    ):
        seen = set()
        for step in range(20):
            noised = noise(8, schedule=Clipped(low, high), resample=True, step=step)
            seen |= set(block_counts(noised.layout, noised.masked).flatten().tolist())
            torch.testing.assert_close(noised.weight[noised.masked], 1 / noised.time[noised.masked])
        assert seen == allowed


def test_resampling_leaves_alone_what_cannot_fit() -> None:
    """No share of one cell lies in [0.3, 0.8]: the published loop never ends there."""
    plain, again = (noise(8, size=1, schedule=Clipped(0.3, 0.8), resample=r) for r in (False, True))
    assert bool((plain.masked == again.masked).all())


def test_resampling_takes_given_limits() -> None:
    noised = noise(16, schedule=LINEAR, resample=True, limits=(0.5, 0.75))
    assert set(block_counts(noised.layout, noised.masked).flatten().tolist()) == {2, 3}


# -- the rest --------------------------------------------------------------------------------------


def test_discrete_times_lie_on_the_grid() -> None:
    noised = noise(64, steps=5)
    assert set((noised.time * 5).round(decimals=4).flatten().tolist()) == {1, 2, 3, 4, 5}
    index = (noised.time * 5).round()[noised.masked]
    torch.testing.assert_close(noised.weight[noised.masked], 5 / index)


def test_uniform_noise_holds_every_real_token() -> None:
    noised = noise(64, noise="uniform", vocab_size=12, distribution="all")
    shares = torch.bincount(noised.noisy.flatten(), minlength=12) / noised.noisy.numel()
    assert shares[MASK] == 0
    expected = 1 / 11
    error = math.sqrt(expected * (1 - expected) / noised.noisy.numel())
    assert float((shares[torch.arange(12) != MASK] - expected).abs().max()) < 5 * error


@pytest.mark.parametrize(
    ("options", "says"),
    (
        ({"distribution": "cuont"}, "did you mean 'count'"),
        ({"distribution": "count", "resample": True}, "distribution 'time'"),
        ({"distribution": "all", "steps": 4}, "distribution 'time'"),
        ({"row": torch.arange(3)}, "one for each"),
        ({"noise": "uniform"}, "vocab_size"),
        ({"noise": "gauss"}, "use 'mask'"),
        ({"distribution": "complementary", "schedule": Clipped(0.3, 0.8)}, "exact schedule"),
    ),
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        noise(4, **options)
