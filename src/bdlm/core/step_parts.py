"""Builds the parts of a `Step` from canvases and layouts, and puts its output into another order.

In: ids, layouts, masks. Out: tensors for `Step`. `core.forward` combines them into forward passes.
Knows nothing about models except whether they take the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdlm.core.types import CLEAN, Canvas, Denoiser, Layout, Out, Soft


def visibility_fields(layout: Layout, clean: bool) -> dict[str, Any]:
    """Return the fields of a `Step` that come from a layout, for clean or for noisy cells."""
    group = torch.full_like(layout.group, CLEAN) if clean else layout.group
    return {
        "position": layout.position,
        "rank": layout.rank,
        "group": group,
        "limit": layout.limit,
        "doc": layout.doc,
    }


def step_cells(ids: Tensor, layout: Layout, clean: bool) -> dict[str, Any]:
    """Return ids and `visibility_fields` as arguments of `Step`, with the rows of `ids`."""
    return {"ids": ids, **visibility_fields(layout.expand(ids.shape[0]), clean)}


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Append the cells of the second argument to those of the first, field by field."""
    return {name: torch.cat((first[name], second[name]), 1) for name in first}


def request_cells(query_mask: Tensor, source: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return the cells whose logits are needed, and the order that puts them in that of
    `query_mask`.

    query_mask: bool [R, L], cells to predict.
    source: int64 [R, L], the cell of the pass whose logits predict each.
    Returns bool [R, cells] and int64 [M]: prediction j of `query_mask` is output order[j] of the
    pass."""
    row, cell = query_mask.nonzero(as_tuple=True)
    requested = torch.zeros(query_mask.shape[0], cells, dtype=torch.bool, device=query_mask.device)
    requested[row, source[row, cell]] = True
    number = requested.flatten().long().cumsum(0) - 1
    return requested, number[row * cells + source[row, cell]]


def reorder(out: Out, order: Tensor) -> Out:
    """Put logits and hidden states into another order. order: int64 [M]."""
    pick = lambda x: None if x is None else x[order]
    return Out(pick(out.logits), pick(out.hidden), out.attention)


def left_neighbours(length: int, like: Tensor) -> Tensor:
    """Return the left neighbour of each cell (0 for the first), int64 [R, L]."""
    return (torch.arange(length, device=like.device) - 1).clamp(min=0).expand(like.shape[0], -1)


def last_written(written: Tensor) -> Tensor:
    """Return the index of the last written cell of each row, int64 [R, 1]."""
    index = torch.arange(written.shape[1], device=written.device)
    return (index * written).amax(1, keepdim=True)


def block_time(canvas: Canvas) -> Tensor:
    """Return the block's time; without one, its masked share (the mean under the linear
    schedule)."""
    if canvas.time is not None:
        return canvas.time
    return canvas.masked.float().mean(1, keepdim=True).expand(canvas.ids.shape)


def padded_time(model: Denoiser, canvas: Canvas, clean: int) -> Tensor | None:
    """Return the canvas's time followed by zeros for `clean` cells; None if the model takes
    none."""
    if not model.spec.time_conditioned:
        return None
    time = block_time(canvas)
    return torch.cat((time, time.new_zeros(time.shape[0], clean)), 1)


def padded_soft(canvas: Canvas, clean: Tensor) -> Soft | None:
    """Return the canvas's mixtures, followed by clean cells as mixtures of one token."""
    if canvas.soft is None:
        return None
    candidates = canvas.soft.ids.shape[2]
    ids, weight = (
        clean[..., None].expand(-1, -1, candidates),
        canvas.soft.weight.new_zeros(*clean.shape, candidates),
    )
    weight[..., 0] = 1
    return Soft(
        torch.cat((canvas.soft.ids, ids), 1),
        torch.cat((canvas.soft.weight, weight), 1),
        canvas.soft.keep_norm,
    )
