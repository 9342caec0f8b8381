"""Packed calls: the real cells of all rows side by side for the matrix products, and a few attention jobs over the cache.

In: a `Step` that keeps the promise `appends` or `full`, and how many cells each row has committed. Out: a `Packing`: which cells go into
the products, the cache slot of each, and the jobs. Rows may be at different phases: some commit a block, some begin one, some are empty.
A packing is the same for all steps within a block, so it is made once and kept. Knows nothing about weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.types import CLEAN, NOWHERE, Step
from bdlm.core.visibility import CHUNK

SPREAD = 0.6  # rows whose key counts are within this share of the longest are attended to in one job


@dataclass(frozen=True)
class Job:
    """One attention call: `queries` cells of each of some rows.

    rows: int64 [r] of the cache, None = all. cells: the packed cells, int64 [r, queries] or a slice of r * queries. keys: how many
    slots are looked at. mask: additive [r, 1, 1 or queries, keys], None = all seen.
    """

    noisy: bool
    rows: Tensor | None
    cells: Tensor | slice
    queries: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class Packing:
    """How one call is laid out.

    order: int64 [T], packed cell -> cell of the flattened [R * N], None = the same.
    noisy: how many packed cells are noisy; they come first.
    slots: int64 [T] and rows: int64 [T], the cache slot of each packed cell; runs: the same as (first packed cell, cells a row, first slot)
    where all rows agree, else None. back: int64 [T], packed cell -> line of the jobs' outputs, None = the same.
    """

    order: Tensor | None
    noisy: int
    rows: Tensor | None
    slots: Tensor | None
    runs: tuple[tuple[int, int, int], ...] | None
    jobs: tuple[Job, ...]
    back: Tensor | None
    extent: int

    def store(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
        """Lay packed keys and values [T, H, D] into a layer's cache [R, H, S, D]."""
        if self.runs is None:
            keys[self.rows, :, self.slots] = k
            values[self.rows, :, self.slots] = v
            return
        rows, heads, _, width = keys.shape
        for first, count, slot in self.runs:
            part = slice(first, first + rows * count)
            keys[:, :, slot : slot + count] = k[part].view(rows, count, heads, width).transpose(1, 2)
            values[:, :, slot : slot + count] = v[part].view(rows, count, heads, width).transpose(1, 2)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, noisy_only: bool = False) -> Tensor:
        """Attention of packed queries [T, H, D] over a layer's cache: [T, H * D]. noisy_only: of the noisy cells, which come first."""
        parts, count = [], self.noisy if noisy_only else q.shape[0]
        for job in self.jobs:
            if noisy_only and not job.noisy:
                continue
            mine = q[job.cells].view(-1, job.queries, *q.shape[1:])
            k, v = keys[:, :, : job.keys], values[:, :, : job.keys]
            if job.rows is not None:
                k, v = k[job.rows], v[job.rows]
            out = F.scaled_dot_product_attention(mine.transpose(1, 2), k, v, attn_mask=job.mask)
            parts.append(out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[2]))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mixed if self.back is None else mixed[self.back[:count]]


def pack(step: Step, lengths: Tensor, dtype: torch.dtype) -> Packing:
    """The packing of a call. lengths: int64 [R], committed cells of each row."""
    real = step.doc != NOWHERE
    clean = real & (step.group == CLEAN)
    noisy = real & ~clean
    counts = torch.stack((lengths, clean.sum(1), noisy.sum(1)))
    table = counts.tolist()
    if all(len(set(line)) == 1 for line in table):
        length, new, open_ = (line[0] for line in table)
        return _even(step, clean, length, new, open_, dtype)
    return _ragged(step, clean, noisy, counts, table, dtype)


def _even(step: Step, clean: Tensor, length: int, new: int, open_: int, dtype: torch.dtype) -> Packing:
    """All rows have as many committed, clean and noisy cells."""
    rows, cells = step.shape
    split = rows * open_
    runs = tuple(run for run in ((0, open_, length + new), (split, new, length)) if run[1])
    order = None if new + open_ == cells and not (new and open_) else _order(step.doc != NOWHERE, clean)
    jobs = [Job(True, None, slice(0, split), open_, length + new + open_, None)] if open_ else []
    if not new:
        return Packing(order, split, None, None, runs, tuple(jobs), None, length + open_)
    rank = step.rank[clean].view(rows, new)
    single = bool((rank == rank[:, :1]).all())
    if single:
        jobs.append(Job(False, None, slice(split, split + rows * new), new, length + new, None))
        return Packing(order, split, None, None, runs, tuple(jobs), None, length + new + open_)
    place = torch.arange(rows * new, device=rank.device).view(rows, new)
    more, back = _clean_jobs(
        None, rank, place + split, torch.full((rows,), length, device=rank.device), torch.full_like(rank[:, 0], new), dtype
    )
    back = torch.cat((torch.arange(split, device=rank.device), back + split))
    return Packing(order, split, None, None, runs, (*jobs, *more), back, length + new + open_)


def _order(real: Tensor, clean: Tensor) -> Tensor:
    """Noisy cells of all rows, then clean ones, as indices of the flattened rectangle."""
    return torch.cat(((real & ~clean).flatten().nonzero()[:, 0], clean.flatten().nonzero()[:, 0]))


def _clean_jobs(
    rows: Tensor | None, rank: Tensor, cells: Tensor, length: Tensor, count: Tensor, dtype: torch.dtype
) -> tuple[list[Job], Tensor]:
    """Jobs of clean cells of several blocks: each sees what is committed and the new cells whose rank is not above its own.

    rank, cells: int64 [r, m], cells padded at the end. length, count: int64 [r]. Returns the jobs and, for each real cell in row-major
    order, its line in their outputs.
    """
    r, m = cells.shape
    column = torch.arange(int((length + count).max()), device=rank.device)
    inside = column - length[:, None]
    key_rank = rank.gather(1, inside.clamp(0, m - 1))
    fresh = (inside >= 0) & (inside < count[:, None])
    jobs, lines, base = [], torch.zeros_like(cells), 0
    for start in range(0, m, CHUNK):
        stop = min(start + CHUNK, m)
        seen = (inside < 0)[:, None] | (fresh[:, None] & (key_rank[:, None] <= rank[:, start:stop, None]))
        seen[:, :, 0] |= ~seen.any(2)  # padding looks somewhere; nobody reads it
        keys = int(seen.flatten(0, 1).any(0).nonzero().max()) + 1
        seen = seen[:, None, :, :keys]
        mask = None if bool(seen.all()) else torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        jobs.append(Job(False, rows, cells[:, start:stop], stop - start, keys, mask))
        lines[:, start:stop] = base + torch.arange(r * (stop - start), device=rank.device).view(r, -1)
        base += r * (stop - start)
    real = torch.arange(m, device=rank.device) < count[:, None]
    return jobs, lines[real]


def _ragged(step: Step, clean: Tensor, noisy: Tensor, counts: Tensor, table: list[list[int]], dtype: torch.dtype) -> Packing:
    """Rows at different phases or lengths."""
    rows, cells = step.shape
    length, new, open_ = counts
    order = _order(clean | noisy, clean)
    slot = length[:, None] + torch.where(clean, clean.long().cumsum(1) - 1, new[:, None] + noisy.long().cumsum(1) - 1)
    split = int(noisy.sum())
    total = length + new + open_
    jobs: list[Job] = []
    lines = torch.zeros(len(order), dtype=torch.long, device=order.device)
    base = 0
    first = torch.cat((open_.cumsum(0) - open_, split + new.cumsum(0) - new)).view(2, rows)
    for which in _buckets([a + b + c if c else 0 for a, b, c in zip(*table, strict=True)], rows):
        index = torch.tensor(which, device=order.device)
        job, at = _noisy_job(index, first[0][index], open_[index], total[index], rows, dtype)
        jobs.append(job)
        lines[at[0]] = base + at[1]
        base += len(which) * job.queries
    for which in _buckets([a + b if b else 0 for a, b, _ in zip(*table, strict=True)], rows):
        index = torch.tensor(which, device=order.device)
        most = int(new[index].max())
        place = torch.arange(most, device=order.device)
        inside = place < new[index][:, None]
        held = (first[1][index][:, None] + place).clamp(max=len(order) - 1)
        rank = step.rank.flatten()[order[held]]
        more, back = _clean_jobs(index, rank, torch.where(inside, held, held[:, :1]), length[index], new[index], dtype)
        jobs += more
        lines[held[inside]] = base + back
        base += sum(len(which) * j.queries for j in more)
    return Packing(order, split, order // cells, slot.flatten()[order], None, tuple(jobs), lines, max(map(sum, zip(*table, strict=True))))


def _noisy_job(
    index: Tensor, first: Tensor, count: Tensor, total: Tensor, rows: int, dtype: torch.dtype
) -> tuple[Job, tuple[Tensor, Tensor]]:
    """The noisy cells of some rows in one job, and the (packed cell, line) pairs of the real ones."""
    most, keys = int(count.max()), int(total.max())
    place = torch.arange(most, device=index.device)
    inside = place < count[:, None]
    cells = torch.where(inside, first[:, None] + place, first[:, None])
    seen = torch.arange(keys, device=index.device) < total[:, None]
    mask = (
        None
        if bool(seen.all())
        else torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None, None]
    )
    every = len(index) == rows
    line = torch.arange(cells.numel(), device=index.device).view(cells.shape)
    return Job(True, None if every else index, cells, most, keys, mask), (cells[inside], line[inside])


def _buckets(keys: list[int], rows: int) -> list[list[int]]:
    """Rows (with any keys) in groups of like key counts, longest first."""
    left = sorted((i for i in range(rows) if keys[i]), key=lambda i: -keys[i])
    groups: list[list[int]] = []
    for i in left:
        if groups and keys[i] >= SPREAD * keys[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(g) for g in groups]
