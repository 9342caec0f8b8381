"""Which committed cell lies in which slot of a cache: rank, document and position of every slot, a row at a time.

A cache of any model carries one `Slots`; storage (keys, values) is the model's own. Free slots have document FREE, so the one
visibility rule hides them. Knows nothing about tensors of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.types import CLEAN, NOWHERE, Step
from bdlm.core.visibility import Cells

FREE = -2  # the document of an empty slot


class Slots:
    """Slot table of `rows` x `capacity`. `used` = number of leading slots that any row uses."""

    def __init__(self, rows: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.rank = torch.zeros(rows, capacity, dtype=torch.long, device=device)
        self.doc = torch.full((rows, capacity), FREE, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, capacity, dtype=torch.long, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.used = 0
        self.even = True  # every row fills exactly the slots [0, used): masks can be dropped
        self.version = 0  # grows with every change, so that what was derived from the table can be kept until then

    @property
    def capacity(self) -> int:
        return self.rank.shape[1]

    def next_free(self, wanted: Tensor) -> Tensor:
        """Slots for the cells that `wanted` (bool [R, N]) marks, appended in order; NOWHERE elsewhere. int64 [R, N]."""
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
        """Note the cells that `step.write` places. Call once per step, after the model has stored their keys and values."""
        if step.write is None:
            return
        row, cell = (step.write >= 0).nonzero(as_tuple=True)
        slot = step.write[row, cell]
        assert not bool((step.group[row, cell] != CLEAN).any()), "only clean cells go into a cache"
        self.rank[row, slot] = step.rank[row, cell]
        self.doc[row, slot] = step.doc[row, cell]
        self.position[row, slot] = step.position[row, cell]
        self._count()

    def _count(self) -> None:
        self.version += 1
        self.length = self._filled()
        self.used = int(self.length.max())
        self.even = bool((self.length == self.used).all()) and not bool((self.doc[:, : self.used] == FREE).any())

    def _filled(self) -> Tensor:
        taken = self.doc != FREE
        last = torch.arange(1, self.capacity + 1, device=taken.device) * taken
        return last.amax(1)

    def drop(self, row: Tensor | int | slice, start: int = 0) -> None:
        """Free the slots [start, end) of a row (or rows)."""
        self.doc[row, start:] = FREE
        self._count()

    def adopt(self, rows: Tensor, other: Slots) -> None:
        """Take the rows of another table in as the given rows, int64 [k]."""
        for name in ("rank", "doc", "position"):
            getattr(self, name)[rows, : other.used] = getattr(other, name)[:, : other.used]
        self.doc[rows, other.used :] = FREE
        self._count()

    def shift(self, count: int, rows: Tensor) -> None:
        """Free the first `count` slots of the marked rows, bool [R], and move the others down."""
        for table in (self.rank, self.doc, self.position):
            table[rows, : self.capacity - count] = table[rows, count:]
        self.doc[rows, self.capacity - count :] = FREE
        self._count()
