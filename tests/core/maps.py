"""Block maps and counts that only tests use: ragged and variable blocks, to show that nothing
depends on the contiguous map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.types import Layout


@dataclass(frozen=True)
class Ragged:
    """A first block of `first` cells, then blocks of `size`: for prompts that a block should start
    right after."""

    first: int
    size: int

    def __post_init__(self) -> None:
        if self.first < 1 or self.size < 1:
            raise ConfigError(
                f"block sizes are first={self.first}, size={self.size}; use 1 or more"
            )

    def block(self, position: Tensor) -> Tensor:
        return torch.where(position < self.first, 0, 1 + (position - self.first) // self.size)

    def start(self, block: Tensor) -> Tensor:
        return torch.where(block == 0, 0, self.first + (block - 1) * self.size)


@dataclass(frozen=True)
class Variable:
    """Blocks of the given sizes; after the last one its size repeats."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"block sizes are {self.sizes}; give at least one, each 1 or more")

    def block(self, position: Tensor) -> Tensor:
        ends = torch.tensor(self.sizes, device=position.device).cumsum(0)
        inside = torch.searchsorted(ends, position.contiguous(), right=True)
        beyond = len(self.sizes) + (position - int(ends[-1])) // self.sizes[-1]
        return torch.where(position < int(ends[-1]), inside, beyond)

    def start(self, block: Tensor) -> Tensor:
        starts = torch.tensor((0, *self.sizes), device=block.device).cumsum(0)
        known = starts[block.clamp(max=len(self.sizes))]
        return known + (block - len(self.sizes)).clamp(min=0) * self.sizes[-1]


def block_counts(layout: Layout, cells: Tensor) -> Tensor:
    """How many of `cells` (bool [R, L]) the block of each cell holds. int64 [R, L]."""
    block = layout.block.expand_as(cells)
    totals = torch.zeros(
        cells.shape[0], int(block.max()) + 1, dtype=torch.long, device=cells.device
    )
    totals.scatter_add_(1, block, cells.long())
    return totals.gather(1, block)
