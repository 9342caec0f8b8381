"""Means with their standard errors, and the variances that the schedule search and the variance
report are made of.

In: sums and counts as tensors. Out: numbers. Knows nothing about where they come from.
Source: arXiv 2503.09573, Eq. 10, Sec. 5.2 (search); the ratio estimator is Cochran, Sampling
Techniques, chapter 6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError

FLOOR = 1e-3  # lowest mask rate of the search, as published
WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Estimate:
    """mean, its standard error (NaN where it cannot be told), and the number of independent units
    behind it."""

    mean: float
    stderr: float
    count: int


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of independent values [K] with its standard error. Values of one stratified draw are not
    independent: give replicates."""
    values = values.double().flatten()
    if not len(values):
        raise ConfigError("a mean of no values was asked for; give at least one")
    spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), spread, len(values))


def ratio_estimate(totals: Tensor, counts: Tensor) -> Estimate:
    """sum(totals) / sum(counts) over documents, both [D], with the delta-method standard error.

    totals: nats of each document. counts: its scored tokens. The error covers the choice of
    documents and, since it is estimated from the noisy totals themselves, their Monte-Carlo noise
    too. One document gives NaN."""
    totals, counts = totals.double().flatten(), counts.double().flatten()
    size = float(counts.sum())
    if size <= 0:
        raise ConfigError("no scored token to divide by; give at least one document of two tokens")
    mean = float(totals.sum()) / size
    documents = int((counts > 0).sum())
    if documents < 2:
        return Estimate(mean, math.nan, documents)
    residual = float((totals - mean * counts).square().sum())
    return Estimate(mean, math.sqrt(residual * documents / (documents - 1)) / size, documents)


def t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t by its Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5):
    within 0.3 % from 3 degrees on at 0.95."""
    z, n = NormalDist().inv_cdf(level), float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def block_variance(values: Tensor) -> float:
    """Unbiased variance over all (sequence, block) entries of one batch's block losses; NaN entries
    are left out (Sec. 4.3).

    values: [R, B] of `objectives.block_losses`. NaN when fewer than two entries are left.
    """
    kept = values.double()[~values.isnan()]
    return float(kept.var()) if len(kept) > 1 else math.nan


def candidate_intervals(
    block_size: int, widths: Sequence[float] = WIDTHS, step: float = 0.05
) -> list[tuple[float, float]]:
    """The mask-rate intervals [low, high] that the search compares; the full one first (Sec. 5.2).
    At block size 1: full and (1, 1)."""
    full = (FLOOR, 1.0)
    if block_size == 1:
        return [full, (1.0, 1.0)]
    found = [full]
    for width in widths:
        edges = int(round((1 - width) / step, 6)) + 1
        found += [
            (max(round(i * step, 6), FLOOR), round(i * step + width, 6)) for i in range(edges)
        ]
    return found


class IntervalVariance:
    """The search's statistic for all intervals from one pass: each interval takes the blocks whose
    mask rate lies in it.

    Mask rates drawn from U[1e-3, 1], restricted to an interval, are uniform on it: the same
    distribution as drawing them there. An interval of one point, (1, 1), takes the blocks noised at
    exactly that rate."""

    def __init__(self, intervals: Sequence[tuple[float, float]]) -> None:
        self.intervals = list(intervals)
        self._sums, self._batches = [0.0] * len(self.intervals), [0] * len(self.intervals)

    def update(self, losses: Tensor, rates: Tensor) -> None:
        """One batch, gathered over processes. losses, rates: [R, B], block losses (NaN = none) and
        the blocks' mask rates."""
        for i, (low, high) in enumerate(self.intervals):
            variance = block_variance(losses[(rates >= low) & (rates <= high)])
            if not math.isnan(variance):
                self._sums[i] += variance
                self._batches[i] += 1

    def result(self) -> list[float]:
        """Mean over batches of each interval's variance; NaN where no batch had two blocks in
        it."""
        return [s / n if n else math.nan for s, n in zip(self._sums, self._batches, strict=True)]

    def best(self) -> tuple[float, float]:
        """The interval of least variance."""
        known = [(v, i) for i, v in enumerate(self.result()) if not math.isnan(v)]
        if not known:
            raise ConfigError(
                "the schedule search saw no interval with two blocks; give it more batches"
            )
        return self.intervals[min(known)[1]]


class GradientVariance:
    """Variance of gradient vectors, 1 / (M - 1) sum ||g_m - mean||^2 (Eq. 10), one at a time
    (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares = 0.0

    def update(self, gradient: Tensor) -> None:
        """gradient: [P], all parameters' gradients of one batch, flattened."""
        gradient = gradient.detach().double().flatten()
        self.count += 1
        if self._mean is None:
            self._mean = gradient.clone()
            return
        before = gradient - self._mean
        self._mean += before / self.count
        self._squares += float(before @ (gradient - self._mean))

    def value(self) -> float:
        """NaN before two gradients."""
        return self._squares / (self.count - 1) if self.count > 1 else math.nan


def gradient_vector(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """The parameters' gradients side by side, [P]; 0 where there is none."""
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]
    )
