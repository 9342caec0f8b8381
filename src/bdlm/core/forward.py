"""The four calls that every loop makes into a model, written once over `Denoiser.step`.

    train_logits(noised)            predictions for the noisy cells of whole windows (two streams in one pass)
    predict(canvas, cache)          predictions for the active block; the cache is untouched
    extend(tokens, cache)           commit clean tokens
    advance(tokens, canvas, cache)  commit the finished block and take the next block's first step, in one call

They know a model only by its `ModelSpec`: how many streams, whether its logits are shifted, whether
it is autoregressive. Predictions come back for the cell that they predict, whatever the shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdlm.core.blockmap import BlockMap
from bdlm.core.types import (
    CLEAN,
    NOWHERE,
    Cache,
    Canvas,
    Denoiser,
    Layout,
    NoisedBatch,
    Out,
    Soft,
    Step,
)

LOGITS = frozenset({"logits"})


def places(
    map: BlockMap, position: Tensor, real: Tensor | None = None, context: str = "block"
) -> Layout:
    """Layout of cells at given places of one text: the sampling-time counterpart of
    `blockmap.layout`.

    position: int64 [R, n]. real: bool [R, n], False for cells that are only there to fill the
    rectangle."""
    block = map.block(position)
    doc = torch.zeros_like(position) if real is None else torch.where(real, 0, NOWHERE)
    if context == "causal":
        return Layout(position, block, position, block, map.start(block), doc)
    return Layout(position, block, block, block, block, doc)


def _fields(layout: Layout, clean: bool) -> dict[str, Any]:
    group = torch.full_like(layout.group, CLEAN) if clean else layout.group
    return {
        "position": layout.position,
        "rank": layout.rank,
        "group": group,
        "limit": layout.limit,
        "doc": layout.doc,
    }


def _cells(ids: Tensor, layout: Layout, clean: bool) -> dict[str, Any]:
    return {"ids": ids, **_fields(layout.expand(ids.shape[0]), clean)}


def _beside(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat((first[name], second[name]), 1) for name in first}


def _picked(query_mask: Tensor, source: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Which cells to ask for, and how to put their answers into the order of `at`.

    at: bool [R, L], cells to predict. source: int64 [R, L], the cell of the call whose logits
    predict each. Returns bool [R, cells] and int64 [M]: answer j of `at` is answer order[j] of the
    call."""
    row, cell = query_mask.nonzero(as_tuple=True)
    ask = torch.zeros(query_mask.shape[0], cells, dtype=torch.bool, device=query_mask.device)
    ask[row, source[row, cell]] = True
    number = ask.flatten().long().cumsum(0) - 1
    return ask, number[row * cells + source[row, cell]]


def _in_order(out: Out, order: Tensor) -> Out:
    pick = lambda x: None if x is None else x[order]
    return Out(pick(out.logits), pick(out.hidden), out.attention)


def train_logits(
    model: Denoiser,
    noised: NoisedBatch,
    query_mask: Tensor | None = None,
    outputs: frozenset[str] = LOGITS,
) -> Out:
    """Predictions for cells of whole windows: one pass over the noisy and the clean copy (Sec. 3.2,
    App. B.6 of the paper).

    at: bool [R, L], default `noised.masked`. Returns Out with [M, ...] in row-major order of `at`.
    """
    spec, (rows, length) = model.spec, noised.clean.shape
    query_mask = noised.masked if query_mask is None else query_mask
    layout = noised.layout
    if spec.noise == "none":
        cells = _cells(noised.clean, layout, clean=True)
        ask, order = _picked(query_mask, _left(length, query_mask), length)
        return _in_order(model.step(Step(**cells, query_mask=ask, outputs=outputs)), order)
    noisy = _cells(noised.noisy, layout, clean=False)
    time = noised.time if spec.time_conditioned else None
    if spec.streams == 1:
        if not spec.shift:
            return model.step(Step(**noisy, query_mask=query_mask, time=time, outputs=outputs))
        ask, order = _picked(query_mask, _left(length, query_mask), length)
        return _in_order(
            model.step(Step(**noisy, query_mask=ask, time=time, outputs=outputs)), order
        )
    clean = _cells(noised.clean, layout, clean=True)
    if not spec.shift:
        seen = _seen_by_noisy(layout)
        cells = _beside(noisy, {name: field[:, seen] for name, field in clean.items()})
        beside = lambda field: torch.cat((field, torch.zeros_like(field[:, seen])), 1)
        return model.step(
            Step(
                **cells,
                query_mask=beside(query_mask),
                time=None if time is None else beside(time),
                num_queries=length,
                outputs=outputs,
            )
        )
    cells, time = (
        _beside(noisy, clean),
        (None if time is None else torch.cat((time, torch.zeros_like(time)), 1)),
    )
    block = layout.block.expand(rows, -1)
    left = _left(length, query_mask)
    inside = block.gather(1, left) == block
    ask, order = _picked(query_mask, torch.where(inside, left, length + left), 2 * length)
    return _in_order(model.step(Step(**cells, query_mask=ask, time=time, outputs=outputs)), order)


def _seen_by_noisy(layout: Layout) -> Tensor:
    """The cells whose clean copies noisy ones see, directly or through others: not the last
    block's. int64, columns of the window.

    Whoever sees a clean cell of some rank has that rank or more itself, so the largest limit of a
    row decides."""
    return (layout.rank < layout.limit.amax(1, keepdim=True)).any(0).nonzero()[:, 0]


def _left(length: int, like: Tensor) -> Tensor:
    """The left neighbour of each cell (0 for the first), int64 [R, L]."""
    return (torch.arange(length, device=like.device) - 1).clamp(min=0).expand(like.shape[0], -1)


def predict(
    model: Denoiser,
    canvas: Canvas,
    cache: Cache | None,
    query_mask: Tensor | None = None,
    outputs: frozenset[str] = LOGITS,
    append_only: bool = False,
) -> Out:
    """Predictions for the active block, given the committed cells in the cache. appends: see
    `Step.appends`.

    at: bool [R, n], default `canvas.masked`. Returns Out with [M, ...] in row-major order of `at`.
    The cache keeps its content (a shifted model rewrites the last committed cell with what it
    held)."""
    query_mask = canvas.masked if query_mask is None else query_mask
    spec = model.spec
    if spec.shift or spec.noise == "none":
        return _predict_shifted(model, canvas, cache, query_mask, outputs)
    cells = _cells(canvas.ids, canvas.layout, clean=False)
    full = not append_only and _sees_all(canvas.layout, cache)
    time = _block_time(canvas) if spec.time_conditioned else None
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
    """Whether every cell of a canvas sees every cached cell and every other cell."""
    alike = bool((layout.doc == layout.doc[:1, :1]).all())
    return (
        alike
        and (cache is None or cache.slots.even)
        and bool((layout.group == layout.group[:, :1]).all())
    )


def _predict_shifted(
    model: Denoiser,
    canvas: Canvas,
    cache: Cache | None,
    query_mask: Tensor,
    outputs: frozenset[str],
) -> Out:
    """As `predict`, for models whose logits stand one cell to the left: the last committed cell is
    part of the call."""
    assert cache is not None
    before, write = _again(canvas, cache)
    if model.spec.noise == "none":
        assert query_mask.shape[1] == 1, "an autoregressive model writes one token at a time"
        return model.step(
            Step(**before, write=write, query_mask=query_mask, outputs=outputs), cache
        )
    return _beside_shifted(model, canvas, before, write, cache, query_mask, outputs)


def _again(canvas: Canvas, cache: Cache) -> tuple[dict[str, Any], Tensor]:
    """The last committed token of each row as a clean cell once more, and its slot: its logits
    predict the block's first cell.

    A row without a committed token (an idle one) gets a cell that is not there.
    """
    assert canvas.previous is not None, "a shifted model needs the committed token before the block"
    length = cache.slots.length[:, None]
    held, there = (length - 1).clamp(min=0), length > 0
    rank = cache.slots.rank.gather(1, held)
    cells = {
        "ids": canvas.previous[:, None],
        "position": cache.slots.position.gather(1, held),
        "rank": rank,
        "group": torch.full_like(held, CLEAN),
        "limit": rank,
        "doc": torch.where(there, cache.slots.doc.gather(1, held), NOWHERE),
    }
    return cells, torch.where(there, held, NOWHERE)


def _or_again(
    done: dict[str, Any], slots: Tensor, canvas: Canvas, cache: Cache
) -> tuple[dict[str, Any], Tensor]:
    """Clean cells of a call and their slots, where rows that commit nothing show their last
    committed token again."""
    idle = ~(slots != NOWHERE).any(1, keepdim=True) & (cache.slots.length[:, None] > 0)
    if not bool(idle.any()):
        return done, slots
    again, held = _again(canvas, cache)
    first = lambda mine, other: torch.cat((torch.where(idle, other, mine[:, :1]), mine[:, 1:]), 1)
    return {name: first(done[name], again[name]) for name in done}, first(slots, held)


def _beside_shifted(
    model: Denoiser,
    canvas: Canvas,
    done: dict[str, Any],
    slots: Tensor,
    cache: Cache,
    query_mask: Tensor,
    outputs: frozenset[str],
) -> Out:
    """One call of a shifted model: the canvas, then clean cells of which the last one of a row
    predicts the first cell of each group."""
    count, clean = canvas.ids.shape[1], slots.shape[1]
    cells = _beside(_cells(canvas.ids, canvas.layout, clean=False), done)
    write = torch.cat((torch.full_like(canvas.ids, NOWHERE), slots), 1)
    group = canvas.layout.expand(len(query_mask)).group
    # of its canvas, when several stand side by side: predicted by the committed cell before the
    # block
    first = torch.ones_like(query_mask)
    first[:, 1:] = group[:, 1:] != group[:, :-1]
    left = torch.arange(count, device=query_mask.device) - 1
    ask, order = _picked(
        query_mask, torch.where(first, count + _last(slots != NOWHERE), left), count + clean
    )
    time = _padded_time(model, canvas, clean)
    return _in_order(
        model.step(
            Step(
                **cells,
                write=write,
                query_mask=ask,
                time=time,
                soft=_padded_soft(canvas, done["ids"]),
                outputs=outputs,
            ),
            cache,
        ),
        order,
    )


def extend(
    model: Denoiser, tokens: Tensor, layout: Layout, cache: Cache, append_only: bool = False
) -> None:
    """Commit clean tokens, int64 [R, n], at the places of `where`; cells with document NOWHERE are
    left out."""
    cells = _cells(tokens, layout, clean=True)
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
    """Commit a finished block and predict the next one in the same call: exact, since a block sees
    the clean ones before it.

    tokens, where: the finished block [R, n0] (cells with document NOWHERE are left out). canvas:
    the next block. Returns Out as `predict`."""
    spec, query_mask = model.spec, canvas.masked if query_mask is None else query_mask
    done = _cells(tokens, layout, clean=True)
    slots = cache.slots.next_free(done["doc"] != NOWHERE)
    if spec.shift or spec.noise == "none":
        shown, held = _or_again(done, slots, canvas, cache)
        if spec.noise != "none":
            return _beside_shifted(model, canvas, shown, held, cache, query_mask, outputs)
        ask, order = _picked(query_mask, _last(held != NOWHERE), tokens.shape[1])
        step = Step(
            **shown,
            write=held,
            query_mask=ask,
            outputs=outputs,
            append_only=append_only and held is slots,
        )
        return _in_order(model.step(step, cache), order)
    cells = _beside(_cells(canvas.ids, canvas.layout, clean=False), done)
    write = torch.cat((torch.full_like(canvas.ids, NOWHERE), slots), 1)
    time, soft = _padded_time(model, canvas, tokens.shape[1]), _padded_soft(canvas, tokens)
    ask = torch.cat((query_mask, torch.zeros_like(tokens, dtype=torch.bool)), 1)
    leading = canvas.ids.shape[1]
    return model.step(
        Step(
            **cells,
            write=write,
            query_mask=ask,
            time=time,
            soft=soft,
            num_queries=leading,
            outputs=outputs,
            append_only=append_only,
        ),
        cache,
    )


def _last(written: Tensor) -> Tensor:
    """Index of the last written cell of each row, int64 [R, 1]."""
    index = torch.arange(written.shape[1], device=written.device)
    return (index * written).amax(1, keepdim=True)


def _block_time(canvas: Canvas) -> Tensor:
    """The block's time; a canvas without one counts its masked share (the linear schedule's
    mean)."""
    if canvas.time is not None:
        return canvas.time
    return canvas.masked.float().mean(1, keepdim=True).expand(canvas.ids.shape)


def _padded_time(model: Denoiser, canvas: Canvas, clean: int) -> Tensor | None:
    if not model.spec.time_conditioned:
        return None
    time = _block_time(canvas)
    return torch.cat((time, time.new_zeros(time.shape[0], clean)), 1)


def _padded_soft(canvas: Canvas, clean: Tensor) -> Soft | None:
    """The canvas' mixtures with clean cells behind them, which are fed whole."""
    if canvas.soft is None:
        return None
    kinds = canvas.soft.ids.shape[2]
    ids, weight = (
        clean[..., None].expand(-1, -1, kinds),
        canvas.soft.weight.new_zeros(*clean.shape, kinds),
    )
    weight[..., 0] = 1
    return Soft(
        torch.cat((canvas.soft.ids, ids), 1),
        torch.cat((canvas.soft.weight, weight), 1),
        canvas.soft.keep_norm,
    )
