"""Decoders that fill distant cells in one forward pass: dilated, interleaved, spaced.

Tokens of one forward pass are drawn as if independent, which neighbours are least; cells that are
further apart can be drawn together. Source: the dilated schedule of Luxembourg et al. 2025
(2506.19037); the other two are ours. Shapes as in `base`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.errors import ConfigError, pick
from bdlm.core.types import Commit
from bdlm.generation.decoders.base import Decoder, View
from bdlm.generation.decoders.confidence import (
    SCORES,
    FixedK,
    best,
    candidates,
    known_reading,
    score,
)
from bdlm.generation.decoders.revising import LeftToRight
from bdlm.generation.sampling.noise import CellNoise


def at_least_one(decoder: str, name: str, value: int) -> None:
    """Raise ConfigError for a number of cells below 1."""
    if value < 1:
        raise ConfigError(f"{decoder}.{name} is {value}; use 1 or more")


@dataclass(frozen=True)
class Dilated(Decoder):
    """Fills every `stride`-th cell of the block, then every cell at half that distance, and so on
    down to 1 (DUS; published: half the block).

    Which cells are filled depends on their position alone, so likely tokens are not favoured."""

    only_draws: ClassVar[bool] = True
    stride: int = 4

    def __post_init__(self) -> None:
        at_least_one("dilated", "stride", self.stride)

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor:
        place = torch.arange(masked.shape[1], device=masked.device)
        cells, apart = torch.zeros_like(masked), self.stride
        while apart:  # a row without a masked cell at one distance continues with the next
            cells = torch.where(cells.any(1, keepdim=True), cells, masked & (place % apart == 0))
            apart //= 2
        return cells

    def choose(self, view: View) -> Commit:
        return Commit(view.query_mask, view.drawn(view.query_mask))


@dataclass(frozen=True)
class Interleaved(Decoder):
    """Fills cells 0, gap, 2 gap, ... of the block, then 1, gap + 1, ..., and so on: the runs of
    `gap` cells are all filled in reading order at once.

    A block takes `gap` forward passes. Which cells are filled depends on their position alone, so
    likely tokens are not favoured."""

    only_draws: ClassVar[bool] = True
    gap: int = 4

    def __post_init__(self) -> None:
        at_least_one("interleaved", "gap", self.gap)

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor:
        turn = (
            (torch.arange(masked.shape[1], device=masked.device) % self.gap)
            .expand_as(masked)
            .masked_fill(~masked, self.gap)
        )
        return masked & (turn == turn.amin(1, keepdim=True))

    def choose(self, view: View) -> Commit:
        return Commit(view.query_mask, view.drawn(view.query_mask))

    def slowest(self) -> Decoder:
        return Interleaved(10**9)

    def reference(self) -> Decoder:
        return LeftToRight()


@dataclass(frozen=True)
class Spaced(Decoder):
    """Fills the cells with the best scores, at most k per decision, each at least `gap` cells from
    the better ones.

    k is an upper limit and may exceed the cells of the block."""

    k: int = 3
    gap: int = 2
    score: str = "confidence"
    confidence: str = "model"

    def __post_init__(self) -> None:
        pick("score", self.score, SCORES)
        known_reading(self.confidence)
        at_least_one("spaced", "k", self.k)
        at_least_one("spaced", "gap", self.gap)

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value, left, cells = (
            score(view, ids, self.score),
            view.masked,
            torch.zeros_like(view.masked),
        )
        for _ in range(min(self.k, ids.shape[1])):
            chosen = best(value, left)
            near = (
                F.max_pool1d(chosen.float()[:, None], 2 * self.gap - 1, 1, self.gap - 1)[:, 0] > 0
            )
            cells, left = cells | chosen, left & ~near
        return Commit(cells, ids)

    def slowest(self) -> Decoder:
        return Spaced(1, self.gap, self.score, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, self.score, self.confidence)
