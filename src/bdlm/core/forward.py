"""The four kinds of forward pass that training, likelihood and generation use, all made of
`Denoiser.step`.

train_logits(noised): predictions for the noisy cells of whole windows, two streams in one pass.
predict(canvas, cache): predictions for the active block; the cache keeps its content.
extend(tokens, cache): commit clean tokens. advance(tokens, canvas, cache): commit the finished
block and predict the next one in one pass.

They know a model only by its `ModelSpec`: how many streams, whether its logits are shifted, whether
it is autoregressive. Predictions come back for the cell that they predict, whatever the shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdlm.core.blockmap import BlockMap
from bdlm.core.step_parts import (
    block_time,
    concatenate,
    last_written,
    left_neighbours,
    padded_soft,
    padded_time,
    reorder,
    request_cells,
    step_cells,
)
from bdlm.core.types import (
    CLEAN,
    NOWHERE,
    Cache,
    Canvas,
    Denoiser,
    Layout,
    NoisedBatch,
    Out,
    Step,
)

# layout_at: for programs that run a model themselves, as the benchmarks do
__all__ = ["LOGITS", "advance", "extend", "layout_at", "predict", "train_logits"]

LOGITS = frozenset({"logits"})


def layout_at(
    map: BlockMap, position: Tensor, real: Tensor | None = None, context: str = "block"
) -> Layout:
    """Return the layout of cells at given places of one text; `blockmap.make_layout` does it for
    windows.

    position: int64 [R, n].
    real: bool [R, n], False for cells that only pad the rectangle.
    context: as in `ModelSpec`."""
    block = map.block(position)
    doc = torch.zeros_like(position) if real is None else torch.where(real, 0, NOWHERE)
    if context == "causal":
        return Layout(position, block, position, block, map.start(block), doc)
    return Layout(position, block, block, block, block, doc)


def train_logits(
    model: Denoiser,
    noised: NoisedBatch,
    query_mask: Tensor | None = None,
    outputs: frozenset[str] = LOGITS,
) -> Out:
    """Predict cells of whole windows: one pass over the noisy and the clean copy (Sec. 3.2, App.
    B.6 of the paper).

    query_mask: bool [R, L], default `noised.masked`.
    Returns Out with [M, ...] in row-major order of `query_mask`."""
    spec, (rows, length) = model.spec, noised.clean.shape
    query_mask = noised.masked if query_mask is None else query_mask
    layout = noised.layout
    if spec.noise == "none":
        cells = step_cells(noised.clean, layout, clean=True)
        requested, order = request_cells(query_mask, left_neighbours(length, query_mask), length)
        return reorder(model.step(Step(**cells, query_mask=requested, outputs=outputs)), order)
    noisy = step_cells(noised.noisy, layout, clean=False)
    time = noised.time if spec.time_conditioned else None
    if spec.streams == 1:
        if not spec.shift:
            return model.step(Step(**noisy, query_mask=query_mask, time=time, outputs=outputs))
        requested, order = request_cells(query_mask, left_neighbours(length, query_mask), length)
        return reorder(
            model.step(Step(**noisy, query_mask=requested, time=time, outputs=outputs)), order
        )
    clean = step_cells(noised.clean, layout, clean=True)
    if not spec.shift:
        seen = _seen_by_noisy(layout)
        cells = concatenate(noisy, {name: field[:, seen] for name, field in clean.items()})
        append_zeros = lambda field: torch.cat((field, torch.zeros_like(field[:, seen])), 1)
        return model.step(
            Step(
                **cells,
                query_mask=append_zeros(query_mask),
                time=None if time is None else append_zeros(time),
                num_queries=length,
                outputs=outputs,
            )
        )
    cells, time = (
        concatenate(noisy, clean),
        (None if time is None else torch.cat((time, torch.zeros_like(time)), 1)),
    )
    block = layout.block.expand(rows, -1)
    left = left_neighbours(length, query_mask)
    inside = block.gather(1, left) == block
    requested, order = request_cells(
        query_mask, torch.where(inside, left, length + left), 2 * length
    )
    return reorder(
        model.step(Step(**cells, query_mask=requested, time=time, outputs=outputs)), order
    )


def _seen_by_noisy(layout: Layout) -> Tensor:
    """Return the cells whose clean copies noisy cells see, directly or through others, as columns,
    int64: all but the last block's.

    A cell that sees a clean cell of some rank has that rank or more itself, so the largest limit of
    a row decides."""
    return (layout.rank < layout.limit.amax(1, keepdim=True)).any(0).nonzero()[:, 0]


def predict(
    model: Denoiser,
    canvas: Canvas,
    cache: Cache | None,
    query_mask: Tensor | None = None,
    outputs: frozenset[str] = LOGITS,
    append_only: bool = False,
) -> Out:
    """Predict the active block, given the committed cells in the cache.

    query_mask: bool [R, n], default `canvas.masked`.
    append_only: see `Step.append_only`.
    Returns Out with [M, ...] in row-major order of `query_mask`. The cache keeps its content: a
    shifted model writes its last committed cell again, with equal values."""
    query_mask = canvas.masked if query_mask is None else query_mask
    spec = model.spec
    if spec.shift or spec.noise == "none":
        return _predict_shifted(model, canvas, cache, query_mask, outputs)
    cells = step_cells(canvas.ids, canvas.layout, clean=False)
    full = not append_only and _sees_all(canvas.layout, cache)
    time = block_time(canvas) if spec.time_conditioned else None
    return model.step(
        Step(
            **cells,
            query_mask=query_mask,
            time=time,
            soft=canvas.soft,
            full_attention=full,
            append_only=append_only,
            outputs=outputs,
        ),
        cache,
    )


def _sees_all(layout: Layout, cache: Cache | None) -> bool:
    """Return whether every cell of a canvas sees every cached cell and every other cell."""
    one_document = bool((layout.doc == layout.doc[:1, :1]).all())
    return (
        one_document
        and (cache is None or cache.slots.uniform)
        and bool((layout.group == layout.group[:, :1]).all())
    )


def _predict_shifted(
    model: Denoiser,
    canvas: Canvas,
    cache: Cache | None,
    query_mask: Tensor,
    outputs: frozenset[str],
) -> Out:
    """Run `predict` for models whose logits predict the cell to the right: the last committed cell
    is part of the pass."""
    assert cache is not None
    before, write = _last_committed(canvas, cache)
    if model.spec.noise == "none":
        assert query_mask.shape[1] == 1, "an autoregressive model writes one token at a time"
        return model.step(
            Step(**before, write=write, query_mask=query_mask, outputs=outputs), cache
        )
    return _step_shifted(model, canvas, before, write, cache, query_mask, outputs)


def _last_committed(canvas: Canvas, cache: Cache) -> tuple[dict[str, Any], Tensor]:
    """Return the last committed token of each row as a clean cell, and its slot: its logits predict
    the block's first cell.

    A row without a committed token (an idle one) gets a cell of document NOWHERE."""
    assert canvas.previous is not None, "a shifted model needs the committed token before the block"
    length = cache.slots.length[:, None]
    last_slot, there = (length - 1).clamp(min=0), length > 0
    rank = cache.slots.rank.gather(1, last_slot)
    cells = {
        "ids": canvas.previous[:, None],
        "position": cache.slots.position.gather(1, last_slot),
        "rank": rank,
        "group": torch.full_like(last_slot, CLEAN),
        "limit": rank,
        "doc": torch.where(there, cache.slots.doc.gather(1, last_slot), NOWHERE),
    }
    return cells, torch.where(there, last_slot, NOWHERE)


def _repeat_last_where_idle(
    finished: dict[str, Any], slots: Tensor, canvas: Canvas, cache: Cache
) -> tuple[dict[str, Any], Tensor]:
    """Return the clean cells of a pass and their slots; rows that commit nothing repeat their last
    committed token."""
    idle = ~(slots != NOWHERE).any(1, keepdim=True) & (cache.slots.length[:, None] > 0)
    if not bool(idle.any()):
        return finished, slots
    again, last_slot = _last_committed(canvas, cache)
    first = lambda own, other: torch.cat((torch.where(idle, other, own[:, :1]), own[:, 1:]), 1)
    return {name: first(finished[name], again[name]) for name in finished}, first(slots, last_slot)


def _step_shifted(
    model: Denoiser,
    canvas: Canvas,
    finished: dict[str, Any],
    slots: Tensor,
    cache: Cache,
    query_mask: Tensor,
    outputs: frozenset[str],
) -> Out:
    """Run one pass of a shifted model: the canvas, then clean cells, the last of which predicts the
    first cell of each group."""
    count, clean = canvas.ids.shape[1], slots.shape[1]
    cells = concatenate(step_cells(canvas.ids, canvas.layout, clean=False), finished)
    write = torch.cat((torch.full_like(canvas.ids, NOWHERE), slots), 1)
    group = canvas.layout.expand(len(query_mask)).group
    # first cell of each group (several canvases may share a row): predicted by the committed cell
    # before the block
    first = torch.ones_like(query_mask)
    first[:, 1:] = group[:, 1:] != group[:, :-1]
    left = torch.arange(count, device=query_mask.device) - 1
    requested, order = request_cells(
        query_mask, torch.where(first, count + last_written(slots != NOWHERE), left), count + clean
    )
    time = padded_time(model, canvas, clean)
    return reorder(
        model.step(
            Step(
                **cells,
                write=write,
                query_mask=requested,
                time=time,
                soft=padded_soft(canvas, finished["ids"]),
                outputs=outputs,
            ),
            cache,
        ),
        order,
    )


def extend(
    model: Denoiser, tokens: Tensor, layout: Layout, cache: Cache, append_only: bool = False
) -> None:
    """Commit clean tokens, int64 [R, n], at the places of `layout`; cells with document NOWHERE are
    left out."""
    cells = step_cells(tokens, layout, clean=True)
    write = cache.slots.next_free(cells["doc"] != NOWHERE)
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    time = (
        torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        if model.spec.time_conditioned
        else None
    )
    model.step(
        Step(
            **cells,
            write=write,
            query_mask=nothing,
            time=time,
            num_queries=0,
            append_only=append_only,
        ),
        cache,
    )


def advance(
    model: Denoiser,
    tokens: Tensor,
    layout: Layout,
    canvas: Canvas,
    cache: Cache,
    query_mask: Tensor | None = None,
    outputs: frozenset[str] = LOGITS,
    append_only: bool = False,
) -> Out:
    """Commit a finished block and predict the next one in the same pass: exact, since a block sees
    the clean cells before it.

    tokens, layout: the finished block [R, n0] (cells with document NOWHERE are left out).
    canvas: the next block.
    Returns Out as `predict`."""
    spec, query_mask = model.spec, canvas.masked if query_mask is None else query_mask
    finished = step_cells(tokens, layout, clean=True)
    slots = cache.slots.next_free(finished["doc"] != NOWHERE)
    if spec.shift or spec.noise == "none":
        cells, last_slot = _repeat_last_where_idle(finished, slots, canvas, cache)
        if spec.noise != "none":
            return _step_shifted(model, canvas, cells, last_slot, cache, query_mask, outputs)
        requested, order = request_cells(
            query_mask, last_written(last_slot != NOWHERE), tokens.shape[1]
        )
        step = Step(
            **cells,
            write=last_slot,
            query_mask=requested,
            outputs=outputs,
            append_only=append_only and last_slot is slots,
        )
        return reorder(model.step(step, cache), order)
    cells = concatenate(step_cells(canvas.ids, canvas.layout, clean=False), finished)
    write = torch.cat((torch.full_like(canvas.ids, NOWHERE), slots), 1)
    time, soft = padded_time(model, canvas, tokens.shape[1]), padded_soft(canvas, tokens)
    requested = torch.cat((query_mask, torch.zeros_like(tokens, dtype=torch.bool)), 1)
    num_queries = canvas.ids.shape[1]
    return model.step(
        Step(
            **cells,
            write=write,
            query_mask=requested,
            time=time,
            soft=soft,
            num_queries=num_queries,
            outputs=outputs,
            append_only=append_only,
        ),
        cache,
    )
