"""Lays out ragged batches: the real cells of all rows go through the matrix products together, and
a few attention calls read the cache.

In: a `Step` that promises `append_only` or `full_attention`, and how many cells each row has
committed. Out: a `RaggedBatch`: which cells go into the products, the cache slot of each, and the
attention calls. Rows may be at different phases: some commit a block, some begin one, some are
empty; a row's noisy cells may be several canvases, which do not see each other. All steps within a
block share a layout, so it is made once and kept. Knows nothing about weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.types import CLEAN, NOWHERE, Step
from bdlm.core.visibility import CHUNK

# rows with at least this share of the most keys share an attention call
SPREAD = 0.6


@dataclass(frozen=True)
class AttentionCall:
    """Describe one attention call: `queries` cells of each of some rows.

    rows: int64 [r] of the cache, None = all.
    cells: indices in the batch, int64 [r, queries] or a slice of r * queries.
    keys: how many slots it reads.
    mask: additive [r or 1, 1, 1 or queries, keys], None = all seen."""

    noisy: bool
    rows: Tensor | None
    cells: Tensor | slice
    queries: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class LayerView:
    """Hold views of one layer's cache, made once for all passes of a layout.

    slots: keys and values of all slots, [R, S, 2, H, D].
    targets: the destination of each of `RaggedBatch.runs`, [R, count, 2, H, D].
    seen: keys and values that each attention call reads, [R, H, call.keys, D]."""

    slots: Tensor
    targets: list[Tensor]
    seen: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RaggedBatch:
    """Describe the layout of one forward pass.

    order: int64 [T], cell of the batch -> cell of the flattened [R * N], None = the same.
    noisy: how many cells of the batch are noisy; they come first.
    rows, slots: int64 [T], row and cache slot of each cell.
    runs: the same as (first cell, cells a row, first slot) if all rows agree, else None.
    back: int64 [T], cell of the batch -> line of the calls' outputs, None = the same.
    extent: slots that the longest row needs, its noisy cells included.
    open: the most noisy cells of a row."""

    order: Tensor | None
    noisy: int
    rows: Tensor | None
    slots: Tensor | None
    runs: tuple[tuple[int, int, int], ...] | None
    calls: tuple[AttentionCall, ...]
    back: Tensor | None
    extent: int
    open: int

    def layer_views(self, memory: Tensor) -> list[LayerView]:
        """Return, for each layer, the parts of a cache's memory [2, layers, R, H, S, D] that a pass
        reads and writes. They are views, valid as long as the layout."""
        targets = [
            memory.narrow(4, slot, count).permute(1, 2, 4, 0, 3, 5).unbind()
            for _, count, slot in self.runs or ()
        ]
        seen = [[x[:, :, :, : call.keys].unbind() for x in memory.unbind()] for call in self.calls]
        slots = memory.permute(1, 2, 4, 0, 3, 5).unbind()
        return [
            LayerView(both, [x[i] for x in targets], [(k[i], v[i]) for k, v in seen])
            for i, both in enumerate(slots)
        ]

    def store(self, view: LayerView, kv: Tensor) -> None:
        """Write keys and values of the batch [T, 2, H, D] into a layer's cache."""
        if self.runs is None:
            view.slots[self.rows, self.slots] = kv
            return
        for (first, _, _), place in zip(self.runs, view.targets, strict=True):
            some = kv[first : first + place.shape[0] * place.shape[1]] if len(self.runs) > 1 else kv
            place.copy_(some.view(place.shape))

    def attend(self, q: Tensor, view: LayerView, noisy_only: bool = False) -> Tensor:
        """Attend from the batch's queries [T, H, D] to a layer's cache: [T, H * D]. noisy_only:
        from the noisy cells, which come first."""
        parts = []
        count = self.noisy if noisy_only else q.shape[0]
        shape = q.shape[1:]
        for call, (k, v) in zip(self.calls, view.seen, strict=True):
            if noisy_only and not call.noisy:
                continue
            queries = q[call.cells].view(-1, call.queries, *shape)
            if call.rows is not None:
                k, v = k[call.rows], v[call.rows]
            out = F.scaled_dot_product_attention(queries.transpose(1, 2), k, v, attn_mask=call.mask)
            parts.append(out.transpose(1, 2).reshape(-1, shape[0] * shape[1]))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mixed if self.back is None else mixed[self.back[:count]]


def make_ragged_batch(step: Step, lengths: Tensor, dtype: torch.dtype) -> RaggedBatch:
    """Lay out a forward pass. lengths: int64 [R], committed cells of each row."""
    real = step.doc != NOWHERE
    clean = real & (step.group == CLEAN)
    noisy = real & ~clean
    counts = torch.stack((lengths, clean.sum(1), noisy.sum(1)))
    fewest, most = counts.amin(1).tolist(), counts.amax(1).tolist()
    if fewest == most:
        return _uniform(step, clean, noisy, most[0], most[1], most[2], dtype)
    return _ragged(step, clean, noisy, counts, dtype)


def _uniform(
    step: Step, clean: Tensor, noisy: Tensor, length: int, new: int, open_: int, dtype: torch.dtype
) -> RaggedBatch:
    """Lay out rows that have equal numbers of committed, clean and noisy cells."""
    rows, cells = step.shape
    first_clean, extent = rows * open_, length + new + open_
    runs = tuple(run for run in ((0, open_, length + new), (first_clean, new, length)) if run[1])
    order = None if new + open_ == cells and not (new and open_) else _order(noisy, clean)
    calls = []
    if open_:
        base = torch.full((rows,), length + new, device=clean.device)
        mask = _additive(
            _visible_to_noisy(step.group[noisy].view(rows, open_), base, base + open_, extent),
            dtype,
        )
        calls.append(AttentionCall(True, None, slice(0, first_clean), open_, extent, mask))
    if not new:
        return RaggedBatch(order, first_clean, None, None, runs, tuple(calls), None, extent, open_)
    rank = step.rank[clean].view(rows, new)
    if bool((rank == rank[:, :1]).all()):
        calls.append(
            AttentionCall(
                False, None, slice(first_clean, first_clean + rows * new), new, length + new, None
            )
        )
        return RaggedBatch(order, first_clean, None, None, runs, tuple(calls), None, extent, open_)
    place = torch.arange(rows * new, device=rank.device).view(rows, new)
    more, back = _clean_calls(
        None,
        rank,
        place + first_clean,
        torch.full((rows,), length, device=rank.device),
        torch.full_like(rank[:, 0], new),
        dtype,
    )
    back = torch.cat((torch.arange(first_clean, device=rank.device), back + first_clean))
    return RaggedBatch(order, first_clean, None, None, runs, (*calls, *more), back, extent, open_)


def _order(noisy: Tensor, clean: Tensor) -> Tensor:
    """Return noisy cells of all rows, then clean ones, as indices of the flattened rectangle."""
    return torch.cat((noisy.flatten().nonzero()[:, 0], clean.flatten().nonzero()[:, 0]))


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Make a mask for scaled_dot_product_attention from bool [r, q, keys]: None if all is seen, one
    row if all rows agree."""
    if bool(seen.all()):
        return None
    if bool((seen == seen[:1]).all()):
        seen = seen[:1]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )[:, None]


def _visible_to_noisy(group: Tensor, base: Tensor, total: Tensor, keys: int) -> Tensor:
    """Return which slots noisy cells see: all before `base`, where their row's noisy cells begin,
    and from there to `total` their own group's.

    group: int64 [r, q].
    base, total: int64 [r].
    Returns bool [r, q, keys], or [r, 1, keys] if each row has a single group."""
    slot = torch.arange(keys, device=group.device)
    seen = (slot < total[:, None])[:, None]
    if bool((group == group[:, :1]).all()):
        return seen
    inside = slot - base[:, None]
    other = group.gather(1, inside.clamp(0, group.shape[1] - 1))
    return seen & ((inside < 0)[:, None] | (other[:, None] == group[:, :, None]))


def _clean_calls(
    rows: Tensor | None,
    rank: Tensor,
    cells: Tensor,
    length: Tensor,
    count: Tensor,
    dtype: torch.dtype,
) -> tuple[list[AttentionCall], Tensor]:
    """Make the attention calls of clean cells of several blocks: each sees the committed cells and
    the new cells whose rank is not above its own.

    rank, cells: int64 [r, m], cells padded at the end.
    length, count: int64 [r].
    Returns the calls and, for each real cell in row-major order, its line in their outputs."""
    r, m = cells.shape
    column = torch.arange(int((length + count).max()), device=rank.device)
    inside = column - length[:, None]
    key_rank = rank.gather(1, inside.clamp(0, m - 1))
    new_key = (inside >= 0) & (inside < count[:, None])
    calls = []
    lines = torch.zeros_like(cells)
    base = 0
    for start in range(0, m, CHUNK):
        stop = min(start + CHUNK, m)
        seen = (inside < 0)[:, None] | (
            new_key[:, None] & (key_rank[:, None] <= rank[:, start:stop, None])
        )
        seen[:, :, 0] |= ~seen.any(2)  # padding needs a key; its output is not used
        keys = int(seen.flatten(0, 1).any(0).nonzero().max()) + 1
        calls.append(
            AttentionCall(
                False,
                rows,
                cells[:, start:stop],
                stop - start,
                keys,
                _additive(seen[:, :, :keys], dtype),
            )
        )
        lines[:, start:stop] = base + torch.arange(r * (stop - start), device=rank.device).view(
            r, -1
        )
        base += r * (stop - start)
    real = torch.arange(m, device=rank.device) < count[:, None]
    return calls, lines[real]


def _ragged(
    step: Step, clean: Tensor, noisy: Tensor, counts: Tensor, dtype: torch.dtype
) -> RaggedBatch:
    """Lay out rows at different phases or lengths."""
    rows, cells = step.shape
    length, new, open_ = counts
    order = _order(noisy, clean)
    slot = length[:, None] + torch.where(
        clean, clean.long().cumsum(1) - 1, new[:, None] + noisy.long().cumsum(1) - 1
    )
    first_clean = int(noisy.sum())
    total = counts.sum(0)
    group = step.group[noisy]
    calls: list[AttentionCall] = []
    lines = torch.zeros(len(order), dtype=torch.long, device=order.device)
    base = 0
    first = torch.cat((open_.cumsum(0) - open_, first_clean + new.cumsum(0) - new)).view(2, rows)
    for index in _buckets(total * (open_ > 0)):
        padded, inside = _rectangle(first[0][index], open_[index])
        keys = int(total[index].max())
        mask = _additive(
            _visible_to_noisy(group[padded], (length + new)[index], total[index], keys), dtype
        )
        calls.append(
            AttentionCall(
                True, None if len(index) == rows else index, padded, padded.shape[1], keys, mask
            )
        )
        lines[padded[inside]] = base + inside.flatten().nonzero()[:, 0]
        base += padded.numel()
    for index in _buckets((length + new) * (new > 0)):
        padded, inside = _rectangle(first[1][index], new[index])
        more, back = _clean_calls(
            index, step.rank.flatten()[order[padded]], padded, length[index], new[index], dtype
        )
        calls += more
        lines[padded[inside]] = base + back
        base += padded.numel()
    return RaggedBatch(
        order,
        first_clean,
        order // cells,
        slot.flatten()[order],
        None,
        tuple(calls),
        lines,
        int(total.max()),
        int(open_.max()),
    )


def _rectangle(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the batch's cells of some rows as a rectangle, int64 [r, most], padded with each row's
    first, and which of them are real."""
    place = torch.arange(int(count.max()), device=first.device)
    inside = place < count[:, None]
    return first[:, None] + place * inside, inside


def _buckets(keys: Tensor) -> list[Tensor]:
    """Group rows with any keys, int64 [r] each, so that no row of a group has less than SPREAD of
    its most keys; longest first."""
    level = ((keys.max() / keys).log() / -math.log(SPREAD)).floor()
    return [(level == at).nonzero()[:, 0] for at in level[keys > 0].unique()]
