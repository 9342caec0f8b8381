"""The data-driven search for the interval of mask rates whose loss varies least, and the gradient variance it stands for.

In: a trainer with the averaged weights in place, held-out windows. Out: a `Found`. One pass serves all intervals: mask rates are drawn
from U[1e-3, 1] once, and each interval takes the blocks whose rate lies in it (the same conditional law).
Source: spec 3.2 (Eq. 9, 10), 3.4. Knows nothing about reports or limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdlm.core.corruption import Blocks
from bdlm.core.objectives import block_losses, objective
from bdlm.core.randomness import bits, purpose
from bdlm.core.statistics import FLOOR, GradientVariance, IntervalVariance, candidate_intervals, gradient_vector
from bdlm.training.config import NoiseSection
from bdlm.training.noising import Noiser
from bdlm.training.validate import Held

Interval = tuple[float, float]


@dataclass(frozen=True)
class Found:
    """best: the interval of least loss variance. loss_variance: of every candidate. gradient_variance: of the full and the best one."""

    best: Interval
    loss_variance: dict[Interval, float]
    gradient_variance: dict[Interval, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: intervals as [low, high, variance]."""
        rows = lambda table: [[*interval, value] for interval, value in table.items()]  # noqa: E731
        return {"best": list(self.best), "loss_variance": rows(self.loss_variance), "gradient_variance": rows(self.gradient_variance)}


def search(model: Any, scored: Any, held: Held, noiser: Noiser, size: int, config: NoiseSection, rows: int, accelerator: Any, draw: int) -> Found:
    """Compare the candidate intervals at block size `size`. Every process calls it; all get the same answer.

    model: the denoiser in eval mode. scored: the module that training runs (its gradients are summed over processes).
    rows: windows of a batch. draw: keys the noise, so that searches at different steps do not share it.
    """
    variance = IntervalVariance(candidate_intervals(noiser.block(size)))
    uniform = Noiser(noiser.spec, int(bits(noiser.seed, purpose("schedule search"), draw)), law="time", interval=(FLOOR, 1.0))
    for losses, rates in loss_batches(model, held, uniform, size, rows, config.search_batches, accelerator):
        variance.update(losses, rates)
    best = variance.best()
    found = Found(best, dict(zip(variance.intervals, variance.result(), strict=True)))
    if not config.gradient_batches:
        return found
    gradients = {}
    for interval in dict.fromkeys(((FLOOR, 1.0), best)):
        gradients[interval] = gradient_variance(
            scored, held, uniform.at(interval), size, rows, config.gradient_batches, accelerator
        )
    return Found(found.best, found.loss_variance, gradients)


@torch.no_grad()
def loss_batches(model: Any, held: Held, noiser: Noiser, size: int, rows: int, count: int, accelerator: Any) -> Any:
    """(block losses, mask rates), [R, B] of each of the first `count` batches of every process, gathered over processes."""
    device, processes = accelerator.device, accelerator.num_processes
    batches = _equal_batches(held, rows, count, accelerator)
    for step, (ids, doc, row) in enumerate(batches):
        noised = noiser(
            ids.to(device), doc.to(device), row.to(device), size=size, step=step, rows_total=rows * processes,
            first_row=rows * accelerator.process_index,
        )
        with accelerator.autocast():
            losses = block_losses(objective(model, noised), noised)
        rates = _block_rates(noised, losses)
        yield _together(losses, accelerator), _together(rates, accelerator)


def _together(values: Tensor, accelerator: Any) -> Tensor:
    """All processes' rows, on CPU; windows with padding have more blocks, so the others get NaN there."""
    return accelerator.gather(accelerator.pad_across_processes(values, dim=1, pad_index=float("nan"))).cpu()


def _block_rates(noised: Any, losses: Tensor) -> Tensor:
    """The mask rate of each block, [R, B]: `time` is in the linear clock."""
    block = noised.layout.block.expand_as(noised.time)
    out = torch.zeros_like(losses, dtype=noised.time.dtype)
    return out.scatter_reduce_(1, block, noised.time, "amax")


def gradient_variance(scored: Any, held: Held, noiser: Noiser, size: int, rows: int, count: int, accelerator: Any) -> float:
    """Variance over `count` batches of the gradient of the loss per token (Eq. 10), by one backward a batch."""
    device, processes = accelerator.device, accelerator.num_processes
    variance = GradientVariance()
    with torch.enable_grad():
        for step, (ids, doc, row) in enumerate(_equal_batches(held, rows, count, accelerator)):
            noised = noiser(
                ids.to(device), doc.to(device), row.to(device), size=size, step=step, rows_total=rows * processes,
                first_row=rows * accelerator.process_index,
            )
            total = accelerator.reduce(noised.scored.sum(), "sum").clamp(min=1)
            accelerator.backward(scored(noised) * (processes / total))
            vector = gradient_vector(list(scored.parameters()))
            variance.update(vector.full_tensor() if hasattr(vector, "full_tensor") else vector)
            scored.zero_grad(set_to_none=True)
    return variance.value()


def _equal_batches(held: Held, rows: int, count: int, accelerator: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`count` batches of `rows` rows on each process; the held-out windows are gone through again where they are fewer."""
    found = []
    for batch in range(count):
        start = (batch * accelerator.num_processes + accelerator.process_index) * rows
        row = start + torch.arange(rows)
        index = row % len(held.ids)
        found.append((held.ids[index], held.doc[index], row))
    return found
