"""Maps positions to blocks: which cells are written together, as (block, rank, group, limit) of
every cell of a window.

A map answers `block(position)` for any position of a text; `make_layout` writes it out for a
window, with documents and padding. This is the only module that divides positions by a block size.
Knows nothing about noise or models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, overload

import torch
from torch import Tensor

from bdlm.core.types import NOWHERE, Layout
from bdlm.core.validation import Count, coerce


class BlockMap(Protocol):
    """Map a position of the text to the index of its block, counted from 0, and a block to its
    start."""

    def block(self, position: Tensor) -> Tensor:
        """Return the block of each position: int64 -> int64, same shape. Never decreasing in
        position unless the map is a permutation."""
        ...

    def start(self, block: Tensor) -> Tensor:
        """Return the first position of a block (for causal context); same shape as `block`."""
        ...


@dataclass(frozen=True)
class Contiguous:
    """Map to blocks of `size` cells from the start of the text: the paper's map.

    size 1 is autoregression, size L is one block. Raises ConfigError for a size below 1."""

    size: int

    def __post_init__(self) -> None:
        coerce("block_size", self.size, Count)

    def block(self, position: Tensor) -> Tensor:
        return position // self.size

    def start(self, block: Tensor) -> Tensor:
        return block * self.size


@dataclass(frozen=True)
class Permuted:
    """Map the cells of a window to sets: `order[i]` is the set of position i (Set Diffusion,
    diagonals).

    Every cell of a set sees all earlier sets; with `alone` a noisy cell sees no other noisy cell
    (one mask serves all set sizes)."""

    order: tuple[int, ...]
    alone: bool = False

    def block(self, position: Tensor) -> Tensor:
        return torch.tensor(self.order, device=position.device)[position]

    def start(self, block: Tensor) -> Tensor:
        return block


@overload
def block_start(position: int, size: int) -> int: ...
@overload
def block_start(position: Tensor, size: int | Tensor) -> Tensor: ...
def block_start(position: int | Tensor, size: int | Tensor) -> int | Tensor:
    """Return the first position of the block of `size` cells that holds a position (contiguous
    map).

    Of a length, it is the number of its tokens in whole blocks. int64, same shape as `position`."""
    return position // size * size


def make_layout(
    map: BlockMap, length: int, doc: Tensor | None = None, context: str = "block", offset: int = 0
) -> Layout:
    """Write a map out for a window of `length` cells.

    doc: int64 [R, length] document of each cell, NOWHERE (-1) for padding; None = one document, no
    padding. Blocks and positions start again at each document.
    context: "block" (clean cells see their whole block) or "causal" (only what is at or before
    them).
    offset: position of the window's first cell."""
    if doc is None:
        doc = torch.zeros(1, length, dtype=torch.long)
    position = _places(doc) + offset
    inner = map.block(position)
    first = torch.ones_like(doc, dtype=torch.bool)
    first[:, 1:] = (inner[:, 1:] != inner[:, :-1]) | (doc[:, 1:] != doc[:, :-1])
    permuted = isinstance(map, Permuted)
    block = inner + _run(doc) * (int(inner.max()) + 1) if permuted else first.long().cumsum(1) - 1
    if context == "causal":
        index = torch.arange(length, device=doc.device).expand_as(doc)
        opening = torch.where(first, index, 0).cummax(1).values
        rank, limit = index, opening
    else:
        rank = limit = block
    group = block
    if isinstance(map, Permuted) and map.alone:
        group = torch.arange(length, device=doc.device).expand_as(doc)
    return Layout(position, block, rank, group, limit, doc)


def _places(doc: Tensor) -> Tensor:
    """Return the position of each cell within its run of equal documents, int64 [R, L]."""
    index = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    new = torch.zeros_like(doc)
    new[:, 1:] = torch.where(doc[:, 1:] != doc[:, :-1], index[:, 1:], 0)
    return index - new.cummax(1).values


def _run(doc: Tensor) -> Tensor:
    """Number the runs of equal documents from 0, for each cell: int64 [R, L]."""
    new = torch.zeros_like(doc)
    new[:, 1:] = (doc[:, 1:] != doc[:, :-1]).long()
    return new.cumsum(1)


def maskable(layout: Layout, first_given: bool = True) -> Tensor:
    """Mark the cells that may be noised and are scored: not padding and, with `first_given`, not
    the first cell of a document's run. bool [R, L]."""
    real = layout.doc != NOWHERE
    if first_given:
        start = torch.ones_like(real)
        start[:, 1:] = layout.doc[:, 1:] != layout.doc[:, :-1]
        real = real & ~start
    return real
