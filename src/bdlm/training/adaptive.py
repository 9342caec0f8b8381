"""Count distributions that follow training: they are fitted to the losses of past steps, so each
step's loss stays unbiased given the past.

In: the losses of the masked cells of every step, as `LossModule` returns them. Out: for each block
size, the distribution from which the next step draws its counts. Losses are summed over processes
at every step, so all processes hold the same distribution and a checkpoint holds all of it. Knows
nothing about models, optimisers or logging. Source: `core.counts`."""

from __future__ import annotations

from typing import Any

import torch

from bdlm.core.counts import CountDistribution, CountMoments
from bdlm.training.sections import NoiseSection

# weight of losses before a refresh relative to later ones: they are those of an older model
FADE = 0.5


class AdaptiveCounts:
    """The count distributions of a run, one for each block size; uniform until the first refresh.

    seen: moments of the losses so far. fitted: the moments at the last refresh, from which the
    distributions are made."""

    def __init__(self, config: NoiseSection, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.seen: dict[int, CountMoments] = {}
        self.fitted: dict[int, CountMoments] = {}
        self._distributions: dict[int, CountDistribution] = {}

    def distribution(self, size: int) -> CountDistribution | None:
        """Return the distribution of counts for blocks of `size`; None means uniform."""
        if size not in self._distributions and size in self.fitted:
            self._distributions[size] = self.fitted[size].distribution(size, self.config.floor)
        return self._distributions.get(size)

    def update(self, size: int, local: CountMoments, step: int) -> None:
        """Add the losses that this process saw in step number `step`, counted from 1. A collective
        call: all processes end with the same distribution."""
        both = torch.stack([local.squares, local.seen]).to(self.accelerator.device)
        squares, seen = self.accelerator.reduce(both, "sum").cpu()
        self.seen[size] = self.seen.get(size, CountMoments.empty()) + CountMoments(squares, seen)
        if step % self.config.refresh_steps == 0:
            self.fitted, self._distributions = dict(self.seen), {}
            self.seen = {size: moments.decayed(FADE) for size, moments in self.seen.items()}

    def state(self) -> dict[str, Any]:
        """Return the full state as plain values for JSON."""
        return {"seen": _to_rows(self.seen), "fitted": _to_rows(self.fitted)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.seen = _from_rows(state["seen"])
        self.fitted = _from_rows(state["fitted"])
        self._distributions = {}


def _to_rows(table: dict[int, CountMoments]) -> list[list[Any]]:
    """Write moments by block size as [size, squares, seen]."""
    return [[size, m.squares.tolist(), m.seen.tolist()] for size, m in table.items()]


def _from_rows(rows: list[list[Any]]) -> dict[int, CountMoments]:
    """Read what `_to_rows` wrote."""
    return {
        size: CountMoments(
            torch.tensor(squares, dtype=torch.float64), torch.tensor(seen, dtype=torch.float64)
        )
        for size, squares, seen in rows
    }
