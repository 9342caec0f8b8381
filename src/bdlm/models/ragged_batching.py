"""Packed calls: the real cells of all rows side by side for the matrix products, and a few
attention jobs over the cache.

In: a `Step` that keeps the promise `appends` or `full`, and how many cells each row has committed.
Out: a `Packing`: which cells go into the products, the cache slot of each, and the jobs. Rows may
be at different phases: some commit a block, some begin one, some are empty; a row's noisy cells may
be several canvases side by side, which do not see each other. A packing is the same for all steps
within a block, so it is made once and kept. Knows nothing about weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.types import CLEAN, NOWHERE, Step
from bdlm.core.visibility import CHUNK

# rows whose key counts are within this share of the longest are attended to in one job
SPREAD = 0.6


@dataclass(frozen=True)
class Job:
    """One attention call: `queries` cells of each of some rows.

    rows: int64 [r] of the cache, None = all. cells: the packed cells, int64 [r, queries] or a slice
    of r * queries. keys: how many slots are looked at. mask: additive [r or 1, 1, 1 or queries,
    keys], None = all seen."""

    noisy: bool
    rows: Tensor | None
    cells: Tensor | slice
    queries: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class Lane:
    """What a call touches of one layer's cache, as views made once for all calls of a layout.

    whole: keys and values of all slots, [R, S, 2, H, D]. laid: where each of `Packing.runs` goes,
    [R, count, 2, H, D].
    seen: keys and values that each job looks at, [R, H, job.keys, D]."""

    whole: Tensor
    laid: list[Tensor]
    seen: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Packing:
    """How one call is laid out.

    order: int64 [T], packed cell -> cell of the flattened [R * N], None = the same.
    noisy: how many packed cells are noisy; they come first.
    slots: int64 [T] and rows: int64 [T], the cache slot of each packed cell; runs: the same as
    (first packed cell, cells a row, first slot)
    where all rows agree, else None. back: int64 [T], packed cell -> line of the jobs' outputs, None
    = the same.
    extent: slots that the longest row needs, its noisy cells included. open: the most noisy cells
    of a row."""

    order: Tensor | None
    noisy: int
    rows: Tensor | None
    slots: Tensor | None
    runs: tuple[tuple[int, int, int], ...] | None
    jobs: tuple[Job, ...]
    back: Tensor | None
    extent: int
    open: int

    def lanes(self, memory: Tensor) -> list[Lane]:
        """The parts of a cache's memory [2, layers, R, H, S, D] that a call reads and writes, for
        each layer. Views: they hold as long as the layout."""
        laid = [
            memory.narrow(4, slot, count).permute(1, 2, 4, 0, 3, 5).unbind()
            for _, count, slot in self.runs or ()
        ]
        seen = [[x[:, :, :, : job.keys].unbind() for x in memory.unbind()] for job in self.jobs]
        whole = memory.permute(1, 2, 4, 0, 3, 5).unbind()
        return [
            Lane(both, [x[i] for x in laid], [(k[i], v[i]) for k, v in seen])
            for i, both in enumerate(whole)
        ]

    def store(self, lane: Lane, kv: Tensor) -> None:
        """Lay packed keys and values [T, 2, H, D] into a layer's cache."""
        if self.runs is None:
            lane.whole[self.rows, self.slots] = kv
            return
        for (first, _, _), place in zip(self.runs, lane.laid, strict=True):
            some = kv[first : first + place.shape[0] * place.shape[1]] if len(self.runs) > 1 else kv
            place.copy_(some.view(place.shape))

    def attend(self, q: Tensor, lane: Lane, noisy_only: bool = False) -> Tensor:
        """Attention of packed queries [T, H, D] over a layer's cache: [T, H * D]. noisy_only: of
        the noisy cells, which come first."""
        parts, count, shape = [], self.noisy if noisy_only else q.shape[0], q.shape[1:]
        for job, (k, v) in zip(self.jobs, lane.seen, strict=True):
            if noisy_only and not job.noisy:
                continue
            mine = q[job.cells].view(-1, job.queries, *shape)
            if job.rows is not None:
                k, v = k[job.rows], v[job.rows]
            out = F.scaled_dot_product_attention(mine.transpose(1, 2), k, v, attn_mask=job.mask)
            parts.append(out.transpose(1, 2).reshape(-1, shape[0] * shape[1]))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mixed if self.back is None else mixed[self.back[:count]]


def pack(step: Step, lengths: Tensor, dtype: torch.dtype) -> Packing:
    """The packing of a call. lengths: int64 [R], committed cells of each row."""
    real = step.doc != NOWHERE
    clean = real & (step.group == CLEAN)
    noisy = real & ~clean
    counts = torch.stack((lengths, clean.sum(1), noisy.sum(1)))
    fewest, most = counts.amin(1).tolist(), counts.amax(1).tolist()
    if fewest == most:
        return _even(step, clean, noisy, most[0], most[1], most[2], dtype)
    return _ragged(step, clean, noisy, counts, dtype)


def _even(
    step: Step, clean: Tensor, noisy: Tensor, length: int, new: int, open_: int, dtype: torch.dtype
) -> Packing:
    """All rows have as many committed, clean and noisy cells."""
    rows, cells = step.shape
    split, extent = rows * open_, length + new + open_
    runs = tuple(run for run in ((0, open_, length + new), (split, new, length)) if run[1])
    order = None if new + open_ == cells and not (new and open_) else _order(noisy, clean)
    jobs = []
    if open_:
        base = torch.full((rows,), length + new, device=clean.device)
        mask = _additive(
            _apart(step.group[noisy].view(rows, open_), base, base + open_, extent), dtype
        )
        jobs.append(Job(True, None, slice(0, split), open_, extent, mask))
    if not new:
        return Packing(order, split, None, None, runs, tuple(jobs), None, extent, open_)
    rank = step.rank[clean].view(rows, new)
    if bool((rank == rank[:, :1]).all()):
        jobs.append(Job(False, None, slice(split, split + rows * new), new, length + new, None))
        return Packing(order, split, None, None, runs, tuple(jobs), None, extent, open_)
    place = torch.arange(rows * new, device=rank.device).view(rows, new)
    more, back = _clean_jobs(
        None,
        rank,
        place + split,
        torch.full((rows,), length, device=rank.device),
        torch.full_like(rank[:, 0], new),
        dtype,
    )
    back = torch.cat((torch.arange(split, device=rank.device), back + split))
    return Packing(order, split, None, None, runs, (*jobs, *more), back, extent, open_)


def _order(noisy: Tensor, clean: Tensor) -> Tensor:
    """Noisy cells of all rows, then clean ones, as indices of the flattened rectangle."""
    return torch.cat((noisy.flatten().nonzero()[:, 0], clean.flatten().nonzero()[:, 0]))


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A mask for scaled_dot_product_attention from bool [r, q, keys]: None if all is seen, one row
    for all if they agree."""
    if bool(seen.all()):
        return None
    if bool((seen == seen[:1]).all()):
        seen = seen[:1]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )[:, None]


def _apart(group: Tensor, base: Tensor, total: Tensor, keys: int) -> Tensor:
    """Which slots noisy cells see: all before `base`, where their row's noisy cells begin, and from
    there to `total` their own group's.

    group: int64 [r, q]. base, total: int64 [r]. Returns bool [r, q, keys], or [r, 1, keys] where
    each row has a single group."""
    slot = torch.arange(keys, device=group.device)
    seen = (slot < total[:, None])[:, None]
    if bool((group == group[:, :1]).all()):
        return seen
    inside = slot - base[:, None]
    other = group.gather(1, inside.clamp(0, group.shape[1] - 1))
    return seen & ((inside < 0)[:, None] | (other[:, None] == group[:, :, None]))


def _clean_jobs(
    rows: Tensor | None,
    rank: Tensor,
    cells: Tensor,
    length: Tensor,
    count: Tensor,
    dtype: torch.dtype,
) -> tuple[list[Job], Tensor]:
    """Jobs of clean cells of several blocks: each sees what is committed and the new cells whose
    rank is not above its own.

    rank, cells: int64 [r, m], cells padded at the end. length, count: int64 [r]. Returns the jobs
    and, for each real cell in row-major order, its line in their outputs."""
    r, m = cells.shape
    column = torch.arange(int((length + count).max()), device=rank.device)
    inside = column - length[:, None]
    key_rank = rank.gather(1, inside.clamp(0, m - 1))
    fresh = (inside >= 0) & (inside < count[:, None])
    jobs, lines, base = [], torch.zeros_like(cells), 0
    for start in range(0, m, CHUNK):
        stop = min(start + CHUNK, m)
        seen = (inside < 0)[:, None] | (
            fresh[:, None] & (key_rank[:, None] <= rank[:, start:stop, None])
        )
        seen[:, :, 0] |= ~seen.any(2)  # padding looks somewhere; nobody reads it
        keys = int(seen.flatten(0, 1).any(0).nonzero().max()) + 1
        jobs.append(
            Job(
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
    return jobs, lines[real]


def _ragged(
    step: Step, clean: Tensor, noisy: Tensor, counts: Tensor, dtype: torch.dtype
) -> Packing:
    """Rows at different phases or lengths."""
    rows, cells = step.shape
    length, new, open_ = counts
    order = _order(noisy, clean)
    slot = length[:, None] + torch.where(
        clean, clean.long().cumsum(1) - 1, new[:, None] + noisy.long().cumsum(1) - 1
    )
    split, total, group = int(noisy.sum()), counts.sum(0), step.group[noisy]
    jobs: list[Job] = []
    lines = torch.zeros(len(order), dtype=torch.long, device=order.device)
    base = 0
    first = torch.cat((open_.cumsum(0) - open_, split + new.cumsum(0) - new)).view(2, rows)
    for index in _buckets(total * (open_ > 0)):
        held, inside = _held(first[0][index], open_[index])
        keys = int(total[index].max())
        mask = _additive(_apart(group[held], (length + new)[index], total[index], keys), dtype)
        jobs.append(
            Job(True, None if len(index) == rows else index, held, held.shape[1], keys, mask)
        )
        lines[held[inside]] = base + inside.flatten().nonzero()[:, 0]
        base += held.numel()
    for index in _buckets((length + new) * (new > 0)):
        held, inside = _held(first[1][index], new[index])
        more, back = _clean_jobs(
            index, step.rank.flatten()[order[held]], held, length[index], new[index], dtype
        )
        jobs += more
        lines[held[inside]] = base + back
        base += held.numel()
    return Packing(
        order,
        split,
        order // cells,
        slot.flatten()[order],
        None,
        tuple(jobs),
        lines,
        int(total.max()),
        int(open_.max()),
    )


def _held(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The packed cells of some rows as a rectangle, int64 [r, most], padded with each row's first,
    and which of them are real."""
    place = torch.arange(int(count.max()), device=first.device)
    inside = place < count[:, None]
    return first[:, None] + place * inside, inside


def _buckets(keys: Tensor) -> list[Tensor]:
    """Rows with any keys, int64 [r] each, in groups within which no row has less than SPREAD of the
    most keys, longest first."""
    level = ((keys.max() / keys).log() / -math.log(SPREAD)).floor()
    return [(level == at).nonzero()[:, 0] for at in level[keys > 0].unique()]
