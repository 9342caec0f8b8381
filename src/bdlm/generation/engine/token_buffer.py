"""The texts of all rows: prompts, given cells and what has been written, from the first cell to the
last.

In: requests, finished blocks. Out: what the next block starts from, what waits to be committed, the
finished tokens. A text is cut into [0, sent): committed, [sent, done): final and waiting to be
committed with the next call, [done, ...): the block being written and what is still to come. Knows
nothing about models or decoders.

Shapes: R rows, T cells of the longest text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.blockmap import block_start
from bdlm.core.types import NOWHERE, Layout


@dataclass(frozen=True)
class Blank:
    """Where the next blocks of k rows stand. start: int64 [k]. real: bool [k, n], cells that exist.
    ids: int64 [k, n]; given: bool [k, n], which of them are known."""

    start: Tensor
    real: Tensor
    ids: Tensor
    given: Tensor


class TokenBuffer:
    """[R, T]: ids, start (first cell of each cell's block), given, log_prob. int64 [R]: prompt and
    total (cells of both), first (place of the first known cell), sent and done (see above), told
    (up to where events have told the new tokens), size (of a block), reach (where the first block
    ends at the earliest)."""

    def __init__(self, rows: int, context: str, device: torch.device) -> None:
        self.context, self.device = context, device
        self.ids, self.start = (
            torch.zeros(rows, 0, dtype=torch.long, device=device) for _ in range(2)
        )
        self.given = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.log_prob = torch.zeros(rows, 0, dtype=torch.float32, device=device)
        new = lambda: torch.zeros(rows, dtype=torch.long, device=device)
        self.total, self.prompt, self.first, self.sent, self.done, self.size, self.reach = (
            new() for _ in range(7)
        )
        self.told = new()
        self.pending = False  # some row may have cells that wait
        # rows with given cells behind the prompt
        self.gaps = torch.zeros(rows, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (self.ids, self.start, self.given, self.log_prob)
        )

    def reserve(self, length: int) -> None:
        """Make room for texts of so many cells."""
        more = length - self.ids.shape[1]
        if more > 0:
            for name in ("ids", "start", "given", "log_prob"):
                old = getattr(self, name)
                setattr(self, name, torch.cat((old, old.new_zeros(old.shape[0], more)), 1))

    def enter(
        self,
        rows: list[int],
        texts: list[dict[int, int]],
        prompt: list[int],
        total: list[int],
        size: list[int],
        reach: list[int],
    ) -> None:
        """Lay new texts down.

        texts: known tokens by place, of each row. prompt: cells before the first new one. total:
        all cells. size: cells of a block.
        reach: where the first block ends at the earliest (beyond `size` for a block over a gap), 0
        for no matter."""
        self.reserve(max(total))
        index = torch.tensor(rows, device=self.device)
        row = [i for i, known in zip(rows, texts, strict=True) for _ in known]
        place = [p for known in texts for p in known]
        ids = [t for known in texts for t in known.values()]
        self.ids[index], self.given[index], self.log_prob[index], self.start[index] = (
            0,
            False,
            0.0,
            0,
        )
        self.ids[row, place] = torch.tensor(ids, device=self.device)
        self.given[row, place] = True
        for name, values in (
            ("prompt", prompt),
            ("total", total),
            ("size", size),
            ("reach", reach),
        ):
            getattr(self, name)[index] = torch.tensor(values, device=self.device)
        # a text without a known cell before the new ones (an unconditional row) begins with these
        first = torch.tensor(
            [min([*known, p]) for known, p in zip(texts, prompt, strict=True)], device=self.device
        )
        sizes = self.size[index]
        done = block_start(self.prompt[index], sizes)
        self.first[index], self.done[index], self.pending = first, done, True
        self.told[index] = self.prompt[index]
        self.sent[index] = first
        self.gaps[index] = torch.tensor(
            [max(known, default=0) >= p for known, p in zip(texts, prompt, strict=True)],
            device=self.device,
        )
        place_T = torch.arange(self.ids.shape[1], device=self.device)
        self.start[index] = block_start(place_T, sizes[:, None])

    def blank(self, rows: Tensor, cells: int) -> Blank:
        """The next block of some rows, int64 [k], at most `cells` wide."""
        start, total, size = self.done[rows], self.total[rows], self.size[rows]
        end = torch.minimum(torch.maximum(start + size, self.reach[rows]), total)
        place = start[:, None] + torch.arange(cells, device=rows.device)
        real = (place < end[:, None]) & (place >= self.first[rows][:, None])
        at = place.clamp(max=self.ids.shape[1] - 1)
        return Blank(start, real, self.ids[rows[:, None], at], self.given[rows[:, None], at] & real)

    def pass_given(self, rows: Tensor) -> None:
        """Count whole blocks without an unknown cell, next in turn of some rows, as done: they wait
        at once."""
        if not bool(self.gaps[rows].any()):
            return
        place = torch.arange(self.ids.shape[1], device=rows.device)
        done, size = self.done[rows], self.size[rows]
        unknown = ~self.given[rows] & (place >= done[:, None]) & (place < self.total[rows][:, None])
        first = torch.where(unknown.any(1), unknown.int().argmax(1), self.total[rows])
        over = torch.where(first < self.total[rows], block_start(first - done, size), first - done)
        passed = (place >= done[:, None]) & (place < (done + over)[:, None])
        own = done[:, None] + block_start(place - done[:, None], size[:, None])
        self.start[rows] = torch.where(passed, own, self.start[rows])
        self.done[rows], self.pending = done + over, True

    def keep(
        self,
        rows: Tensor,
        real: Tensor,
        position: Tensor,
        start: Tensor,
        ids: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Finished blocks of some rows [k] become text. real: bool [k, n]; position, ids: int64 [k,
        n]; start: int64 [k]."""
        k, cell = real.nonzero(as_tuple=True)
        row, place = rows[k], position[k, cell]
        self.ids[row, place], self.start[row, place], self.log_prob[row, place] = (
            ids[k, cell],
            start[k],
            log_prob[k, cell],
        )
        self.done[rows], self.pending = torch.where(real, position + 1, 0).amax(1), True

    def untold(self, rows: Tensor) -> list[list[int]]:
        """The final tokens of some rows [k] that no event has told."""
        told, count = self.told[rows], (self.done - self.told)[rows].clamp(min=0).tolist()
        place = told[:, None] + torch.arange(max(count, default=0), device=rows.device)
        ids = self.ids[rows[:, None], place.clamp(max=self.ids.shape[1] - 1)].tolist()
        return [tokens[:n] for tokens, n in zip(ids, count, strict=True)]

    def waiting(
        self, rows: Tensor | None = None, until: Tensor | None = None
    ) -> tuple[Tensor, Layout] | None:
        """The cells to commit with the next call, int64 [R, m], and where they stand; None if there
        are none.

        rows: bool [R], of these. until: int64 [R], up to this place; default all that are final.
        """
        if not self.pending:
            return None
        count = ((self.done if until is None else until) - self.sent).clamp(min=0)
        if rows is not None:
            count = torch.where(rows, count, 0)
        width = int(count.max())
        if width <= 0:
            return None
        place = self.sent[:, None] + torch.arange(width, device=self.device)
        real = place < (self.sent + count)[:, None]
        at = place.clamp(max=self.ids.shape[1] - 1)
        return self.ids.gather(1, at), self.layout(place, self.start.gather(1, at), real)

    def commit(self) -> None:
        """All that waited has been committed."""
        self.sent, self.pending = torch.maximum(self.sent, self.done), False

    def layout(self, position: Tensor, start: Tensor, real: Tensor) -> Layout:
        """Layout of cells whose blocks begin at `start`: a block is named by its first place, so
        that blocks may have any size."""
        doc = torch.where(real, 0, NOWHERE)
        return Layout(
            position, start, position if self.context == "causal" else start, start, start, doc
        )

    def previous(self) -> Tensor:
        """The token just before each row's block, int64 [R]."""
        if not self.ids.shape[1]:
            return self.done
        return self.ids.gather(1, (self.done - 1).clamp(min=0)[:, None])[:, 0]

    def leave(self, rows: Tensor) -> None:
        """Rows without a text."""
        self.total[rows], self.sent[rows], self.done[rows], self.gaps[rows] = 0, 0, 0, False
