"""Distributions of counts that follow training: fitted to the losses of past steps, so that each
step's loss stays unbiased given the past.

In: the losses of the masked cells of every step, as `LossModule` returns them. Out: the distribution of
counts that the next step draws by, for each block size. Losses are summed over processes at every
step, so that all hold the same distribution and a checkpoint holds all of it. Knows nothing about
models, optimisers or reports. Source: `core.counts`."""

from __future__ import annotations

from typing import Any

import torch

from bdlm.core.counts import CountDistribution, CountMoments
from bdlm.training.sections import NoiseSection

# what the losses seen before a refresh weigh beside those after it: the model that had them is gone
FADE = 0.5


class AdaptiveCounts:
    """The distributions of counts of a run, one a block size; uniform until the first refresh.

    seen: moments of the losses so far. fitted: as they were at the last refresh, what the
    distributions are made of."""

    def __init__(self, config: NoiseSection, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.seen: dict[int, CountMoments] = {}
        self.fitted: dict[int, CountMoments] = {}
        self._distributions: dict[int, CountDistribution] = {}

    def distribution(self, size: int) -> CountDistribution | None:
        """What blocks of `size` are drawn by; None stands for every count alike."""
        if size not in self._distributions and size in self.fitted:
            self._distributions[size] = self.fitted[size].distribution(size, self.config.floor)
        return self._distributions.get(size)

    def update(self, size: int, local: CountMoments, step: int) -> None:
        """Take in what this process saw in step number `step`, from 1. A collective call: all
        processes end with the same distribution."""
        both = torch.stack([local.squares, local.seen]).to(self.accelerator.device)
        squares, seen = self.accelerator.reduce(both, "sum").cpu()
        self.seen[size] = self.seen.get(size, CountMoments.none()) + CountMoments(squares, seen)
        if step % self.config.refresh_steps == 0:
            self.fitted, self._distributions = dict(self.seen), {}
            self.seen = {size: moments.faded(FADE) for size, moments in self.seen.items()}

    def state(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        rows = lambda table: [
            [size, m.squares.tolist(), m.seen.tolist()] for size, m in table.items()
        ]
        return {"seen": rows(self.seen), "fitted": rows(self.fitted)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        wide = lambda values: torch.tensor(values, dtype=torch.float64)
        table = lambda rows: {
            size: CountMoments(wide(squares), wide(seen)) for size, squares, seen in rows
        }
        self.seen, self.fitted, self._distributions = (
            table(state["seen"]),
            table(state["fitted"]),
            {},
        )
