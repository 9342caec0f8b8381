"""Which committed cell lies in which slot of a cache: rank, document and position of every slot, a
row at a time.

A cache of any model carries one `Slots`; storage (keys, values) is the model's own. Free slots have
document FREE, so the one visibility rule hides them. Knows nothing about tensors of keys and
values."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.types import CLEAN, NOWHERE, Step
from bdlm.core.visibility import Cells

FREE = -2  # the document of an empty slot


class CacheSlots:
    """Slot table of `rows` x `capacity`. `used` = number of leading slots that any row uses."""

    def __init__(self, rows: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.rank = torch.zeros(rows, capacity, dtype=torch.long, device=device)
        self.doc = torch.full((rows, capacity), FREE, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, capacity, dtype=torch.long, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.used = 0
        self.even = True  # every row fills exactly the slots [0, used): masks can be dropped
        self._gaps = False  # some row has a free slot before its last used one
        # grows with every change, so that what was derived from the table can be kept until then
        self.version = 0

    @property
    def capacity(self) -> int:
        return self.rank.shape[1]

    def next_free(self, wanted: Tensor) -> Tensor:
        """Slots for the cells that `wanted` (bool [R, N]) marks, appended in order; NOWHERE
        elsewhere. int64 [R, N]."""
        slots = self.length[:, None] + wanted.long().cumsum(1) - 1
        return torch.where(wanted, slots, NOWHERE)

    def cells(self, step: Step | None = None) -> Cells:
        """The visible cells in slots [0, used); slots that `step` overwrites are hidden."""
        doc = self.doc[:, : self.used]
        if step is not None and step.write is not None and self.used:
            hit = (step.write >= 0) & (step.write < self.used)
            if bool(hit.any()):
                doc = doc.clone()
                row, cell = hit.nonzero(as_tuple=True)
                doc[row, step.write[row, cell]] = FREE
        rank = self.rank[:, : self.used]
        return Cells(rank, torch.full_like(rank, CLEAN), rank, doc)

    def record(self, step: Step) -> None:
        """Note the cells that `step.write` places. Call once per step, after the model has stored
        their keys and values."""
        if step.write is None:
            return
        row, cell = (step.write >= 0).nonzero(as_tuple=True)
        slot = step.write[row, cell]
        assert not bool((step.group[row, cell] != CLEAN).any()), "only clean cells go into a cache"
        self.rank[row, slot] = step.rank[row, cell]
        self.doc[row, slot] = step.doc[row, cell]
        self.position[row, slot] = step.position[row, cell]
        before = self.length
        self.length = before.scatter_reduce(0, row, slot + 1, "amax")
        new = torch.zeros_like(before).index_add_(0, row, (slot >= before[row]).long())
        self._gaps |= bool((self.length - before != new).any())
        self._note()

    def drop(self, rows: Tensor | int | slice, start: Tensor | int = 0) -> None:
        """Free the slots from `start` on of a row or of some rows. rows: int64 [k]; start: one
        value or int64 [k]."""
        if isinstance(start, Tensor):
            behind = torch.arange(self.capacity, device=self.doc.device) >= start[:, None]
            self.doc[rows] = self.doc[rows].masked_fill(behind, FREE)
        else:
            self.doc[rows, start:] = FREE
        self.length[rows] = torch.minimum(
            self.length[rows], torch.as_tensor(start, device=self.length.device)
        )
        self._note()

    def restore(self, rows: Tensor, rank: Tensor, position: Tensor) -> None:
        """Say that some rows hold exactly these cells of one document, from slot 0. rows: int64
        [k]; rank, position: int64 [k, n]."""
        count = rank.shape[1]
        self.rank[rows, :count], self.position[rows, :count], self.doc[rows, :count] = (
            rank,
            position,
            0,
        )
        self.length[rows] = count
        self.drop(rows, count)

    def shift(self, count: int, rows: Tensor) -> None:
        """Free the first `count` slots of the marked rows, bool [R], and move the others down."""
        for table in (self.rank, self.doc, self.position):
            table[rows, : self.capacity - count] = table[rows, count:]
        self.doc[rows, self.capacity - count :] = FREE
        self.length = torch.where(rows, (self.length - count).clamp(min=0), self.length)
        self._note()

    def _note(self) -> None:
        """After a change: what is kept about the whole table. Counted from the table itself only
        while a row has gaps."""
        self.version += 1
        if self._gaps:
            taken, place = (
                self.doc != FREE,
                torch.arange(1, self.capacity + 1, device=self.doc.device),
            )
            self.length = (place * taken).amax(1)
            self._gaps = bool((self.length != taken.sum(1)).any())
        self.used = int(self.length.max())
        self.even = not self._gaps and bool((self.length == self.used).all())
