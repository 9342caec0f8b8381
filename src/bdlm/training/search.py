"""The data-driven search for the interval of mask rates with the least loss variance, and the
gradient variance that it stands for.

In: a trainer with the averaged weights in place, held-out windows. Out: a `SearchResult`. One pass
serves all intervals: mask rates are drawn from U[1e-3, 1] once, and each interval takes the blocks
whose rate lies in it (the same conditional distribution). Source: arXiv 2503.09573, Sec. 4.3 (Eq.
9, 10), 5.2. Knows nothing about logging or limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdlm.core.objectives import block_losses, objective
from bdlm.core.randomness import bits, purpose
from bdlm.core.statistics import (
    FLOOR,
    GradientVariance,
    IntervalVariance,
    candidate_intervals,
    gradient_vector,
)
from bdlm.core.types import NoisedBatch
from bdlm.training.noising import Noiser
from bdlm.training.sections import NoiseSection
from bdlm.training.validate import HeldOutWindows

Interval = tuple[float, float]
FULL = (FLOOR, 1.0)


@dataclass(frozen=True)
class SearchResult:
    """best: the interval of least loss variance. loss_variance: of every candidate.
    gradient_variance: of the full interval and the best one."""

    best: Interval
    loss_variance: dict[Interval, float]
    gradient_variance: dict[Interval, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: intervals as [low, high, variance]."""
        return {
            "best": list(self.best),
            "loss_variance": _to_rows(self.loss_variance),
            "gradient_variance": _to_rows(self.gradient_variance),
        }


def _to_rows(table: dict[Interval, float]) -> list[list[float]]:
    return [[*interval, value] for interval, value in table.items()]


@dataclass(frozen=True)
class IntervalSearch:
    """A search on held-out windows under a noiser, in blocks of `size`, with `rows` windows in each
    batch of a process.

    noiser: draws mask rates from U[1e-3, 1], each cell independently."""

    held_out: HeldOutWindows
    noiser: Noiser
    size: int
    rows: int
    accelerator: Any

    def run(self, model: Any, loss_module: Any, config: NoiseSection) -> SearchResult:
        """Compare the candidate intervals. Every process calls it; all get the same answer.

        model: the denoiser, without dropout. loss_module: the module that training runs (its
        gradients are averaged over processes)."""
        variance = IntervalVariance(candidate_intervals(self.size))
        for losses, rates in self.losses(model, config.search_batches):
            variance.update(losses, rates)
        best, table = variance.best(), dict(zip(variance.intervals, variance.result()))
        gradients = {}
        if config.gradient_batches:
            intervals = dict.fromkeys((FULL, best))  # the same one, once
            gradients = {
                interval: self.gradient_variance(loss_module, interval, config.gradient_batches)
                for interval in intervals
            }
        return SearchResult(best, table, gradients)

    @torch.no_grad()
    def losses(self, model: Any, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield block losses (NaN = none) and mask rates of `count` batches, each [R, B] of all
        processes together, on CPU."""
        for noised in self.batches(self.noiser, count):
            with self.accelerator.autocast():
                losses = block_losses(objective(model, noised), noised)
            yield self._together(losses), self._together(block_rates(noised, losses))

    def gradient_variance(self, loss_module: Any, interval: Interval, count: int) -> float:
        """Compute the variance over `count` batches of the gradient of the loss per token (Eq. 10),
        one backward pass per batch."""
        variance = GradientVariance()
        with torch.enable_grad():
            for noised in self.batches(self.noiser.at(interval), count):
                total = self.accelerator.reduce(noised.scored.sum(), "sum").clamp(min=1)
                self.accelerator.backward(
                    loss_module(noised)[0] * (self.accelerator.num_processes / total)
                )
                vector: Any = gradient_vector(list(loss_module.parameters()))
                variance.update(vector.full_tensor() if hasattr(vector, "full_tensor") else vector)
                loss_module.zero_grad(set_to_none=True)
        return variance.value()

    def batches(self, noiser: Noiser, count: int) -> Iterator[NoisedBatch]:
        """Yield `count` noised batches of this process; the held-out windows repeat where they are
        fewer."""
        process = self.accelerator.process_index
        processes = self.accelerator.num_processes
        device = self.accelerator.device
        for batch in range(count):
            row = (batch * processes + process) * self.rows + torch.arange(self.rows)
            index = row % len(self.held_out.ids)
            ids, doc, row = (
                x.to(device) for x in (self.held_out.ids[index], self.held_out.doc[index], row)
            )
            yield noiser(
                ids,
                doc,
                row,
                size=self.size,
                step=batch,
                rows_total=self.rows * processes,
                first_row=self.rows * process,
            )

    def _together(self, values: Tensor) -> Tensor:
        """Gather all processes' rows on CPU; windows with padding have more blocks, so the others
        get NaN there."""
        return self.accelerator.gather(
            self.accelerator.pad_across_processes(values, dim=1, pad_index=float("nan"))
        ).cpu()


def search_noiser(noiser: Noiser, draw: int) -> Noiser:
    """Make the noiser that a search needs. draw: keys its noise, so that searches at different
    steps do not share it."""
    return Noiser(
        noiser.spec,
        int(bits(noiser.seed, purpose("schedule search"), draw)),
        distribution="time",
        interval=FULL,
    )


def block_rates(noised: NoisedBatch, losses: Tensor) -> Tensor:
    """Return the mask rate of each block, [R, B] as `losses`: a batch's `time` is in the linear
    clock."""
    block = noised.layout.block.expand_as(noised.time)
    return torch.zeros_like(losses, dtype=noised.time.dtype).scatter_reduce_(
        1, block, noised.time, "amax"
    )
