"""Corruption: which cells of each block are noised, at what time, and what each counts for.

In: clean windows, a layout, the cells that may be noised, a schedule, and the numbers that key the
noise. Out: a `NoisedBatch`. All draws are counter-based, so a row's noise depends on (seed, step,
its global number) and on its place in the global batch, never on how the batch is split over
processes. Knows nothing about models or losses.
Source: arXiv 2503.09573, Eq. 8, Sec. 5.2, App. C.4 (strata); arXiv 2502.09992 (count form).
Redrawing is the reference implementation's.

`NoisedBatch.time` is in the linear clock: it is the block's mask probability, whatever the
schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdlm.core.counts import CountDistribution
from bdlm.core.errors import ConfigError, pick
from bdlm.core.randomness import bits, purpose, uniform
from bdlm.core.schedules import Clipped, Schedule
from bdlm.core.types import Layout, NoisedBatch

UNENFORCED = 1e-3 + 1e-6  # a lower limit up to the published 1e-3 forbids nothing


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch that hold maskable cells, counted densely within each row.

    index: int64 [R, L], number of each cell's block among its row's non-empty blocks (0 where the
    block is empty).
    size: int64 [R, B], maskable cells n_b of each (0 beyond the row's last). count: int64 [R],
    non-empty blocks of each row.
    inside: bool [R, L], cells whose block is non-empty."""

    index: Tensor
    size: Tensor
    count: Tensor
    inside: Tensor

    @classmethod
    def of(cls, layout: Layout, cells: Tensor) -> Blocks:
        """cells: bool [R, L], the maskable ones."""
        block = layout.block.expand_as(cells)
        total = torch.zeros(
            cells.shape[0], int(block.max()) + 1, dtype=torch.long, device=cells.device
        )
        total.scatter_add_(1, block, cells.long())
        dense = (total > 0).long().cumsum(1) - 1
        inside = total.gather(1, block) > 0
        index = torch.where(inside, dense.gather(1, block), 0)
        count = (total > 0).sum(1)
        size = torch.zeros(
            cells.shape[0], max(int(count.max()), 1), dtype=torch.long, device=cells.device
        )
        size.scatter_add_(1, index, cells.long())
        return cls(index, size, count, inside)

    def spread(self, values: Tensor) -> Tensor:
        """Per-block values [R, B] -> per cell [R, L], 0 in empty blocks."""
        return torch.where(self.inside, values.gather(1, self.index), 0)


def strata(
    blocks: Blocks,
    *,
    seed: int,
    step: int,
    row: Tensor,
    rows_total: int,
    first_row: int = 0,
    apart: bool = False,
) -> Tensor:
    """One number in (0, 1) for each block, float64 [R, B]: exactly uniform each, jointly spread
    evenly over the global batch.

    A row with B blocks takes each of the B coarse strata once, in random order; rows that share a
    coarse stratum take its `rows_total` parts once each, in random order. With equal B every one of
    the rows_total * B strata is hit exactly once.
    apart: each row is a global batch of its own, so that its numbers depend on its own `row` alone,
    wherever it stands."""
    device, (rows, width) = row.device, blocks.size.shape
    place = row if apart else first_row + torch.arange(rows, device=device)
    number = torch.arange(width, device=device)
    order = bits(seed, step, purpose("strata of a row"), place[:, None], number)
    order = torch.where(number < blocks.count[:, None], order, torch.iinfo(torch.long).max)
    coarse = order.argsort(dim=1, stable=True)
    jitter = uniform(seed, step, purpose("jitter"), row[:, None], number)
    if apart:
        return ((coarse + jitter) / blocks.count.clamp(min=1)[:, None]).clamp(1e-12, 1 - 2**-53)
    parts = bits(
        seed,
        step,
        purpose("strata of the batch"),
        number[:, None],
        torch.arange(rows_total, device=device),
    ).argsort(1)
    fine = parts[coarse, place[:, None]]
    return ((coarse + (fine + jitter) / rows_total) / blocks.count.clamp(min=1)[:, None]).clamp(
        1e-12, 1 - 2**-53
    )


def ranks(keys: Tensor, blocks: Blocks, cells: Tensor) -> Tensor:
    """Rank of each maskable cell's key within its block, from 0; other cells come after them. int64
    [R, L]."""
    group = torch.where(cells, blocks.index, blocks.size.shape[1])
    by_key = keys.argsort(1)
    by_group = group.gather(1, by_key).argsort(dim=1, stable=True)
    order = by_key.gather(1, by_group)
    sorted_group = group.gather(1, order)
    place = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    opening = torch.zeros_like(place)
    opening[:, 1:] = torch.where(sorted_group[:, 1:] != sorted_group[:, :-1], place[:, 1:], 0)
    return torch.zeros_like(place).scatter_(1, order, place - opening.cummax(1).values)


def corrupt(
    clean: Tensor,
    layout: Layout,
    cells: Tensor,
    schedule: Schedule,
    *,
    seed: int,
    step: int,
    row: Tensor,
    rows_total: int | None = None,
    first_row: int = 0,
    apart: bool = False,
    distribution: str = "time",
    counts: CountDistribution | None = None,
    mask_id: int,
    resample: bool = False,
    limits: tuple[float, float] | None = None,
    noise: str = "mask",
    vocab_size: int | None = None,
    steps: int | None = None,
) -> NoisedBatch:
    """Noise whole windows: one time per block, from randomly permuted low-discrepancy strata of the
    global batch.

    clean: int64 [R, L]. cells: bool [R, L], the cells that may be noised; they are the scored ones.
    row: int64 [R], global row numbers, keys of jitter and masks. rows_total: rows of the global
    batch (all processes, all accumulation steps); this call's rows stand at first_row, first_row +
    1, ... in it. apart: each row is a batch of its own, its noise a function of seed, step and its
    number.
    distribution: a name of `DISTRIBUTIONS`. "time": Bernoulli(p) masks, weight p'/p of the
    schedule. "count": r = 1 + floor(u n_b) of the block's n_b
        maskable cells, a uniformly random set, weight n_b / r; an exact schedule is integrated out,
        `Clipped` narrows u.
        "complementary": 2R rows, a set (first R rows) and its complement (last R), each weighted
        (n_b + 1) / (2 size): the pair is averaged already and `scored` is set in the first R rows
        only, so that sum / scored is the bound.
        "importance": as "count", r being drawn by `counts` (default every count alike), weight 1 /
        (r q(r)).
        "all": everything masked, weight 1 (exact at block size 1).
    resample, limits: for "time", condition the number of masks of each block on limits[0] <= count
    / n_b <= limits[1] (default: those
        of a Clipped schedule): the distribution of the published redrawing, drawn directly. Blocks
        that no count fits are left alone.
    noise: "mask", or "uniform": noised cells hold uniformly random tokens of [0, vocab_size) other
    than mask_id.
    steps: T of the discrete-time bound (distribution "time" only): times on the grid i/T, weights T
    (p_t - p_s) / p_t (Eq. 11, 16). Raises ConfigError for an unknown distribution or options that
    do not fit it."""
    if distribution != "time" and (resample or steps is not None):
        raise ConfigError(
            f"corruption distribution '{distribution}' takes no resample and no steps; use"
            " distribution 'time'"
        )
    if row.shape != clean.shape[:1]:
        raise ConfigError(
            f"{clean.shape[0]} rows are noised under {row.shape[0]} row numbers; give one for each"
        )
    draw = Draw(
        clean,
        layout,
        cells,
        schedule,
        seed,
        step,
        row,
        rows_total or clean.shape[0],
        first_row,
        apart,
        resample,
        limits,
        steps,
        counts,
    )
    masked, weight, time, scored = pick("corruption distribution", distribution, DISTRIBUTIONS)(
        draw
    )
    twice = masked.shape[0] // clean.shape[0]
    if twice > 1:
        clean, row = clean.repeat(twice, 1), row.repeat(twice)
        if layout.rank.shape[0] > 1:
            layout = Layout(
                *(getattr(layout, name).repeat(twice, 1) for name in layout.__dataclass_fields__)
            )
    noisy = torch.where(masked, _noise(clean, seed, step, row, noise, mask_id, vocab_size), clean)
    weight = torch.where(masked, weight, 0)
    return NoisedBatch(clean, noisy, masked, time.float(), weight.float(), scored, layout)


def _noise(
    clean: Tensor,
    seed: int,
    step: int,
    row: Tensor,
    noise: str,
    mask_id: int,
    vocab_size: int | None,
) -> Tensor:
    """What a noised cell holds, int64 [R, L] or [1]."""
    if noise == "mask":
        return torch.full_like(clean[:1, :1], mask_id)
    if noise != "uniform" or vocab_size is None:
        raise ConfigError(
            f"corruption noise is '{noise}' with vocab_size={vocab_size}; use 'mask', or 'uniform'"
            " with a vocab_size"
        )
    has_mask = 0 <= mask_id < vocab_size
    place = torch.arange(clean.shape[1], device=clean.device)
    token = (
        uniform(seed, step, purpose("random token"), row[:, None], place) * (vocab_size - has_mask)
    ).long()
    return token + (token >= mask_id).long() if has_mask else token


@dataclass(frozen=True)
class Draw:
    """What a distribution draws from: the arguments of `corrupt`."""

    clean: Tensor
    where: Layout
    cells: Tensor
    schedule: Schedule
    seed: int
    step: int
    row: Tensor
    rows_total: int
    first_row: int
    apart: bool
    resample: bool
    limits: tuple[float, float] | None
    steps: int | None
    counts: CountDistribution | None

    def blocks(self) -> Blocks:
        return Blocks.of(self.where, self.cells)

    def strata(self, blocks: Blocks) -> Tensor:
        """float64 [R, B]."""
        where: dict[str, Any] = {
            "rows_total": self.rows_total,
            "first_row": self.first_row,
            "apart": self.apart,
        }
        return strata(blocks, seed=self.seed, step=self.step, row=self.row, **where)

    def keys(self) -> Tensor:
        """One uniform for each cell, float64 [R, L]."""
        place = torch.arange(self.clean.shape[1], device=self.clean.device)
        return uniform(self.seed, self.step, purpose("masks"), self.row[:, None], place)


Noised = tuple[Tensor, Tensor, Tensor, Tensor]  # masked, weight, time, scored


def _time(draw: Draw) -> Noised:
    """Independent masks at the block's time."""
    blocks, keys = draw.blocks(), draw.keys()
    t, schedule = draw.strata(blocks), draw.schedule
    if draw.steps is None:
        p, weight = schedule.mask_prob(t), schedule.weight(t)
    else:
        i = (t * draw.steps).long() + 1
        p, before = schedule.mask_prob(i / draw.steps), schedule.mask_prob((i - 1) / draw.steps)
        weight = draw.steps * (p - before) / p
    limits = draw.limits
    if limits is None and isinstance(schedule, Clipped):
        limits = (schedule.low, schedule.high)
    masked = draw.cells & (keys < blocks.spread(p))
    if draw.resample and limits is not None:
        count, fits = truncated_count(
            blocks.size,
            p,
            limits,
            uniform(draw.seed, draw.step, purpose("counts"), draw.row[:, None], _range(p)),
        )
        inside = draw.cells & (ranks(keys, blocks, draw.cells) < blocks.spread(count))
        masked = torch.where(blocks.spread(fits.long()) > 0, inside, masked)
    return masked, blocks.spread(weight), blocks.spread(p), draw.cells


def _range(values: Tensor) -> Tensor:
    return torch.arange(values.shape[1], device=values.device)


def truncated_count(
    size: Tensor, p: Tensor, limits: tuple[float, float], u: Tensor
) -> tuple[Tensor, Tensor]:
    """A Binomial(size, p) count given limits[0] <= count / size <= limits[1], by its quantile at u.
    All [R, B].

    Returns the counts, int64, and whether any count fits, bool. A lower limit up to 1e-3 is not
    enforced, as published."""
    count = torch.arange(int(size.max()) + 1, device=size.device)
    n, q = size[..., None].double(), p[..., None].double()
    low = limits[0] if limits[0] > UNENFORCED else 0.0
    share = count / n.clamp(min=1)
    allowed = (share >= low - 1e-6) & (share <= limits[1] + 1e-6) & (count <= n)
    choose = (
        torch.lgamma(n + 1) - torch.lgamma(count + 1.0) - torch.lgamma((n - count).clamp(min=0) + 1)
    )
    log = choose + torch.xlogy(count, q) + torch.xlogy((n - count).clamp(min=0), 1 - q)
    log = log.masked_fill(~allowed, float("-inf"))
    peak = log.amax(-1, keepdim=True)
    fits = peak.isfinite()[..., 0] & (size > 0)
    mass = torch.where(allowed, (log - peak.nan_to_num(neginf=0.0)).exp(), 0).cumsum(-1)
    drawn = (mass <= u[..., None] * mass[..., -1:]).sum(-1)
    return torch.minimum(drawn, size), fits


def _count(draw: Draw) -> Noised:
    """A uniform number of masks in 1..n_b, then a uniform set (arXiv 2502.09992)."""
    blocks, keys = draw.blocks(), draw.keys()
    u = draw.strata(blocks)
    if isinstance(draw.schedule, Clipped):
        u = draw.schedule.mask_prob(u)
    count = torch.minimum(1 + (u * blocks.size).long(), blocks.size)
    masked = draw.cells & (ranks(keys, blocks, draw.cells) < blocks.spread(count))
    weight = blocks.size / count.clamp(min=1)
    return masked, blocks.spread(weight), blocks.spread(_largest(keys, masked, blocks)), draw.cells


def _importance(draw: Draw) -> Noised:
    """A number of masks in 1..n_b by the distribution of counts, then a uniform set."""
    if isinstance(draw.schedule, Clipped):
        raise ConfigError(
            "corruption distribution 'importance' covers every count; use an exact schedule with"
            " it, or distribution 'time' or 'count'"
        )
    blocks, keys = draw.blocks(), draw.keys()
    counts = draw.counts or CountDistribution.uniform(int(blocks.size.max()))
    count, prob = counts.draw(blocks.size, draw.strata(blocks))
    masked = draw.cells & (ranks(keys, blocks, draw.cells) < blocks.spread(count))
    weight = 1 / (count * prob.clamp(min=1e-300))
    return masked, blocks.spread(weight), blocks.spread(_largest(keys, masked, blocks)), draw.cells


def _largest(keys: Tensor, masked: Tensor, blocks: Blocks) -> Tensor:
    """The largest key of each block's masked cells, [R, B], 0 where none.

    Given r of n cells masked, the time of the bound is Beta(r, n - r + 1): the r-th smallest of n
    uniforms, whichever cells hold them."""
    return torch.zeros(blocks.size.shape, dtype=keys.dtype, device=keys.device).scatter_reduce_(
        1, blocks.index, torch.where(masked, keys, 0), "amax", include_self=True
    )


def _complementary(draw: Draw) -> Noised:
    """A set of r cells, r uniform in 0..n_b, and its complement, averaged; drawing r from 1..n_b
    would be biased."""
    blocks, keys = draw.blocks(), draw.keys()
    n = blocks.size
    if isinstance(draw.schedule, Clipped):
        raise ConfigError(
            "corruption distribution 'complementary' covers every count; use an exact schedule with"
            " it, or distribution 'time' or 'count'"
        )
    r = torch.minimum((draw.strata(blocks) * (n + 1)).long(), n)
    first = draw.cells & (ranks(keys, blocks, draw.cells) < blocks.spread(r))
    second = draw.cells & ~first
    weights = [blocks.spread((n + 1) / (2 * size.clamp(min=1))) for size in (r, n - r)]
    times = [blocks.spread(_largest(k, m, blocks)) for k, m in ((keys, first), (1 - keys, second))]
    scored = torch.cat((draw.cells, torch.zeros_like(draw.cells)))
    return torch.cat((first, second)), torch.cat(weights), torch.cat(times), scored


def _all(draw: Draw) -> Noised:
    """Everything masked, weight 1."""
    one = torch.ones(draw.cells.shape, dtype=torch.float64, device=draw.cells.device)
    return draw.cells, one, one, draw.cells


DISTRIBUTIONS = {
    "time": _time,
    "count": _count,
    "complementary": _complementary,
    "importance": _importance,
    "all": _all,
}
