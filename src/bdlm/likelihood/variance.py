"""Variance of the loss and of its gradient under a mask distribution, with bootstrap intervals, and
the search over mask rates.

In: a `Denoiser` and windows. Out: a `VarianceEstimate` of each distribution, or an `IntervalMap` of
mask-rate intervals. The loss statistic is that of the search: the variance over the blocks of a
batch of each block's mean loss, averaged over batches; the gradient's is Eq. 10. Both include the
spread of the data, which no distribution can lower. Knows nothing about training runs or figures.
Source: arXiv 2503.09573, Sec. 4.3, 5.2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous
from bdlm.core.counts import CountDistribution
from bdlm.core.errors import ConfigError, nearest
from bdlm.core.objectives import block_losses, objective, total_nats
from bdlm.core.schedules import Schedule, schedule_of
from bdlm.core.statistics import FLOOR, WIDTHS, block_variance, candidate_intervals, gradient_vector
from bdlm.core.types import Denoiser, NoisedBatch
from bdlm.core.validation import Count, Size, validated
from bdlm.likelihood.bound import block_size_of, device_of, evaluating
from bdlm.likelihood.methods import ESTIMATORS, Draw, need_counts, noise
from bdlm.likelihood.rows import Rows, rows_of

RESAMPLES = 2000
LEVEL = 0.95
SLACK = 1e-6  # mask rates are float32


@dataclass(frozen=True)
class EvenCount:
    """The rule of a number of batches that are compared in pairs."""

    suggestion: str = "use an even number (batches are compared in pairs), or 0"

    def holds(self, value: int) -> bool:
        return value >= 0 and value % 2 == 0


@dataclass(frozen=True)
class NoiseDistribution:
    """A mask distribution: an estimator of the bound or "all" (everything masked), and a schedule.
    Written "time:cosine", "time:clipped:0.3,0.8", "count", "complementary", "importance", "all"."""

    estimator: str = "count"
    schedule: str = "linear"

    @classmethod
    def parse(cls, name: str) -> NoiseDistribution:
        """Parse a name. Raises ConfigError for a name that is not a distribution."""
        estimator, _, schedule = name.partition(":")
        if estimator not in DISTRIBUTIONS:
            raise ConfigError(
                f"distribution '{name}' is unknown{nearest(estimator, DISTRIBUTIONS)}"
            )
        distribution = cls(estimator, schedule or "linear")
        exact = distribution.clock().bounds
        if schedule and estimator != "time" and (estimator != "count" or exact):
            raise ConfigError(
                f"distribution '{name}': a schedule changes 'time' alone, and clipping also"
                f" 'count'; write '{estimator}'"
            )
        return distribution

    def __str__(self) -> str:
        return (
            self.estimator
            if self.schedule == "linear" and self.estimator != "time"
            else f"{self.estimator}:{self.schedule}"
        )

    def clock(self) -> Schedule:
        return schedule_of(self.schedule)

    @property
    def passes(self) -> int:
        """Forward passes of a window in one draw."""
        return 2 if self.estimator == "complementary" else 1


DISTRIBUTIONS = (*ESTIMATORS, "all")


@dataclass(frozen=True)
class BootstrapInterval:
    """A mean over batches and its bootstrap interval of level 0.95 (percentiles)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor, seed: int) -> BootstrapInterval:
        """Resample values [M], one for each batch; NaN ones are left out. One value has no
        interval: its ends are NaN."""
        kept = values.double()[~values.isnan()]
        if len(kept) < 2:
            return cls(float(kept.mean()), math.nan, math.nan)
        index = torch.randint(
            len(kept), (RESAMPLES, len(kept)), generator=torch.Generator().manual_seed(seed)
        )
        ends = torch.quantile(
            kept[index].mean(1),
            torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64),
        )
        return cls(float(kept.mean()), float(ends[0]), float(ends[1]))

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def to_json(self) -> dict[str, float | None]:
        """Return plain values; unknown ones are None."""
        return {
            name: None if math.isnan(number) else number for name, number in asdict(self).items()
        }


@dataclass(frozen=True)
class VarianceEstimate:
    """The variance under one distribution. loss: variance of block losses (means over cells),
    nats^2. gradient: Eq. 10, of the gradient of a batch's loss per token, or None if not requested.
    passes: forward passes of a window in a draw; multiply the variance by it to compare at equal
    compute. unbiased: whether the distribution's mean is the bound (clipped distributions are for
    training only)."""

    distribution: str
    loss: BootstrapInterval
    gradient: BootstrapInterval | None
    passes: int
    unbiased: bool

    def to_json(self) -> dict[str, Any]:
        bands = {
            "loss": self.loss.to_json(),
            "gradient": None if self.gradient is None else self.gradient.to_json(),
        }
        return {**asdict(self), **bands}


@validated()
def variance(
    model: Denoiser,
    windows: Any,
    distributions: Sequence[str | NoiseDistribution] = ("time", "count", "complementary"),
    *,
    block_size: Count | None = None,
    batches: Count = 100,
    gradient_batches: Annotated[int, EvenCount()] = 0,
    batch_size: Size = 16,
    counts: CountDistribution | None = None,
    seed: int = 0,
) -> list[VarianceEstimate]:
    """Estimate the variance of the loss, and of its gradient if requested, under each distribution,
    on the same windows.

    batches: of `batch_size` windows each, for the loss; windows repeat under new noise where they
    are fewer. gradient_batches: for the gradient, an even number or 0. counts: for distribution
    "importance". Raises ConfigError for what does not fit."""
    if not distributions:
        raise ConfigError("distributions is empty; name at least one, such as count")
    chosen = [
        NoiseDistribution.parse(distribution) if isinstance(distribution, str) else distribution
        for distribution in distributions
    ]
    for distribution in chosen:
        need_counts(distribution.estimator, counts)
    sampler = LossSampler.at(model, windows, block_size, batch_size, seed)
    found = []
    for distribution in chosen:
        gradient = (
            BootstrapInterval.of(
                sampler.gradient_variances(distribution, gradient_batches, counts), seed
            )
            if gradient_batches
            else None
        )
        found.append(
            VarianceEstimate(
                str(distribution),
                BootstrapInterval.of(sampler.loss_variances(distribution, batches, counts), seed),
                gradient,
                distribution.passes,
                _unbiased(distribution, sampler.size),
            )
        )
    return found


def _unbiased(distribution: NoiseDistribution, size: int) -> bool:
    return size == 1 if distribution.estimator == "all" else distribution.clock().bounds


@dataclass(frozen=True)
class LossSampler:
    """Samples losses and gradients of a model in blocks of `size` on windows, `batch_size` per
    batch, under noise keyed by `seed`."""

    model: Denoiser
    rows: Rows
    size: int
    batch_size: int
    seed: int

    @classmethod
    def at(
        cls, model: Denoiser, windows: Any, block_size: int | None, batch_size: int, seed: int
    ) -> LossSampler:
        rows = rows_of(windows).checked(model.spec.vocab_size, model.spec.mask_id)
        return cls(
            model,
            rows.to(device_of(model)),
            block_size_of(model.spec, block_size, rows.length),
            batch_size,
            seed,
        )

    def batches(
        self, distribution: NoiseDistribution, count: int, counts: CountDistribution | None = None
    ) -> Iterator[NoisedBatch]:
        """Yield `count` noised batches, each with its own strata."""
        for batch in range(count):
            part = self.rows.taken(
                (batch * self.batch_size + torch.arange(self.batch_size)) % len(self.rows)
            )
            layout = part.layout(Contiguous(self.size), self.model.spec.context)
            yield noise(
                self.model.spec,
                part,
                layout,
                Draw(self.seed, batch, len(part), 0),
                distribution.estimator,
                distribution.clock(),
                counts,
            )

    def losses(
        self, distribution: NoiseDistribution, count: int, counts: CountDistribution | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the mean loss of each block, NaN for none, and its mask rate, [R, B] of each batch,
        on CPU. The passes of a pair are summed."""
        with evaluating(self.model):
            for noised in self.batches(distribution, count, counts):
                whole = noised.rows(slice(0, self.batch_size))
                nats = objective(self.model, noised).view(-1, *whole.clean.shape).sum(0)
                losses = block_losses(nats, whole)
                rate = torch.zeros_like(losses, dtype=whole.time.dtype)
                rate.scatter_reduce_(
                    1, whole.layout.block.expand_as(whole.time), whole.time, "amax"
                )
                yield losses.cpu(), rate.cpu()

    def loss_variances(
        self, distribution: NoiseDistribution, count: int, counts: CountDistribution | None = None
    ) -> Tensor:
        """Compute the search's statistic of each batch, float64 [count]."""
        return torch.tensor(
            [block_variance(losses) for losses, _ in self.losses(distribution, count, counts)],
            dtype=torch.float64,
        )

    def gradient_variances(
        self, distribution: NoiseDistribution, count: int, counts: CountDistribution | None = None
    ) -> Tensor:
        """Compute half the squared distance of the gradients of two batches, float64 [count / 2].

        The mean over independent pairs has the expectation of Eq. 10 and, unlike it, is a mean of
        independent values that the bootstrap can resample. Two gradients are held in memory at a
        time."""
        parameters = (
            list(self.model.parameters()) if isinstance(self.model, torch.nn.Module) else []
        )
        if not parameters:
            raise ConfigError(
                "the model has no weights, so its loss has no gradient; leave gradient_batches at 0"
            )
        found, before = [], None
        with evaluating(self.model), torch.enable_grad():
            for noised in self.batches(distribution, count, counts):
                for p in parameters:
                    p.grad = None
                nats: Any = total_nats(self.model, noised, float(noised.scored.sum()))
                nats.backward()
                vector = gradient_vector(parameters).double()
                if before is not None:
                    found.append(float((vector - before).square().sum()) / 2)
                before = vector if before is None else None
            for p in parameters:
                p.grad = None
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class IntervalMap:
    """Loss variance of training under mask rates uniform in each interval. bands: (low, high) ->
    variance with its bootstrap interval."""

    bands: dict[tuple[float, float], BootstrapInterval]

    @property
    def best(self) -> tuple[float, float]:
        """The interval of least variance."""
        known = {
            interval: band.value
            for interval, band in self.bands.items()
            if not math.isnan(band.value)
        }
        if not known:
            raise ConfigError(
                "no batch had two blocks with mask rates in one interval; give more batches or more"
                " windows a batch"
            )
        return min(known, key=lambda interval: known[interval])

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"interval": list(interval), **band.to_json()} for interval, band in self.bands.items()
        ]
        return {"best": list(self.best), "intervals": rows}


@validated()
def search(
    model: Denoiser,
    windows: Any,
    *,
    block_size: Count | None = None,
    widths: Sequence[float] = WIDTHS,
    step: float = 0.05,
    batches: Count = 100,
    batch_size: Size = 16,
    seed: int = 0,
) -> IntervalMap:
    """Search for the clipped schedule of least variance, all intervals from the same passes.

    widths, step: which intervals (default the paper's 36; at block size 1 two). Mask rates are
    drawn from U[1e-3, 1] once and each interval takes the blocks whose rate lies in it: the same
    distribution as drawing there. An interval of one rate is drawn by itself."""
    sampler = LossSampler.at(model, windows, block_size, batch_size, seed)
    intervals = candidate_intervals(sampler.size, widths, step)
    shared = list(sampler.losses(NoiseDistribution("time", f"clipped:{FLOOR},1"), batches))
    bands = {}
    for low, high in intervals:
        there = (
            shared
            if low < high
            else list(sampler.losses(NoiseDistribution("time", f"clipped:{low},{high}"), batches))
        )
        values = [
            block_variance(losses[(rate > low - SLACK) & (rate < high + SLACK)])
            for losses, rate in there
        ]
        bands[low, high] = BootstrapInterval.of(torch.tensor(values, dtype=torch.float64), seed)
    return IntervalMap(bands)
