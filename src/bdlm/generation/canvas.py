"""The blocks being written, one a row: what is masked, what is filled, and the rules that every `Commit` must keep.

In: commits. Out: the `Canvas` of a model call and, when a row's block is full, its tokens. The boolean `masked` is the only truth about
what is still open. Knows nothing about models, policies or text.

Shapes: R rows, n cells. Rows are independent; a row without a block has `real` False throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.types import NOWHERE, Canvas, Commit, Layout, Soft
from bdlm.generation.keys import Keys


class Board:
    """The canvases of R rows of at most n cells, and the finished blocks that wait to be committed."""

    def __init__(self, rows: int, cells: int, mask_id: int, context: str, device: torch.device) -> None:
        self.context, self.mask_id, self.cells = context, mask_id, cells
        new = lambda kind, fill: torch.full((rows, cells), fill, dtype=kind, device=device)  # noqa: E731
        self.ids, self.position, self.draw = new(torch.long, mask_id), new(torch.long, 0), new(torch.long, 0)
        self.real, self.masked, self.given = new(torch.bool, False), new(torch.bool, False), new(torch.bool, False)
        self.log_prob = new(torch.float32, 0.0)
        self.wait_ids, self.wait_position, self.wait_real = new(torch.long, 0), new(torch.long, 0), new(torch.bool, False)
        self.previous = torch.full((rows,), NOWHERE, dtype=torch.long, device=device)
        self.seed = torch.zeros(rows, dtype=torch.long, device=device)
        self.step = torch.zeros(rows, dtype=torch.long, device=device)
        self.hold = torch.zeros(rows, dtype=torch.bool, device=device)
        self.start = torch.zeros(rows, dtype=torch.long, device=device)
        self.wait_start = torch.zeros(rows, cells, dtype=torch.long, device=device)
        self.state: dict[str, Tensor] = {}
        self.soft: Soft | None = None

    def open(self, rows: Tensor, start: Tensor, count: Tensor, given: Tensor | None = None, held: Tensor | None = None) -> None:
        """Begin a blank block in some rows.

        rows: int64 [k]. start: int64 [k], place of its first cell. count: int64 [k], cells that exist (the text may end inside the
        block). given: int64 [k, n] tokens of cells known beforehand, held: bool [k, n] which those are.
        """
        place = torch.arange(self.cells, device=rows.device)
        self.position[rows] = start[:, None] + place
        self.real[rows] = place < count[:, None]
        held = torch.zeros_like(self.real[rows]) if held is None else held & self.real[rows]
        self.given[rows], self.masked[rows] = held, self.real[rows] & ~held
        blank = torch.full_like(self.position[rows], self.mask_id)
        self.ids[rows] = blank if given is None else torch.where(held, given, blank)
        self.draw[rows], self.step[rows], self.log_prob[rows], self.hold[rows] = 0, 0, 0.0, False
        self.start[rows] = start
        for kept in self.state.values():
            kept[rows] = 0

    def wait(self, rows: Tensor, ids: Tensor, position: Tensor, start: Tensor, real: Tensor) -> None:
        """Cells to commit with the next call, [k, m] with m <= n, and the last of them as the token before the block.

        start: int64 [k, m], place of the first cell of each cell's block.
        """
        width = ids.shape[1]
        self.wait_start[rows, :width] = start
        self.wait_real[rows] = False
        self.wait_ids[rows, :width], self.wait_position[rows, :width], self.wait_real[rows, :width] = ids, position, real
        last = (torch.arange(width, device=ids.device) * real).amax(1)
        self.previous[rows] = torch.where(real.any(1), ids.gather(1, last[:, None])[:, 0], self.previous[rows])

    def close(self, rows: Tensor) -> None:
        """Leave rows without a block and with nothing to commit."""
        self.real[rows], self.masked[rows], self.wait_real[rows] = False, False, False

    @property
    def full(self) -> Tensor:
        """Rows whose block exists and has no masked cell, bool [R]."""
        return self.real.any(1) & ~self.masked.any(1) & ~self.hold

    @property
    def filled(self) -> Tensor:
        """Cells that the sampler has filled, bool [R, n]."""
        return self.real & ~self.masked & ~self.given

    def keys(self) -> Keys:
        return Keys(self.seed, self.position, self.draw)

    def canvas(self, time: Tensor | None = None) -> Canvas:
        """What the model is shown. time: [R, 1] mask probability, for time-conditioned models."""
        where = self.where(self.position, self.start[:, None].expand_as(self.position), self.real)
        time = None if time is None else time.float().expand(self.ids.shape)
        return Canvas(self.ids, self.masked, where, self.previous, time, self.soft)

    def waiting(self) -> tuple[Tensor, Layout]:
        """The cells to commit with the next call: ids [R, m] and where they stand."""
        real = self.wait_real
        width = int((real * torch.arange(1, real.shape[1] + 1, device=real.device)).amax())
        return self.wait_ids[:, :width], self.where(self.wait_position[:, :width], self.wait_start[:, :width], real[:, :width])

    def where(self, position: Tensor, start: Tensor, real: Tensor) -> Layout:
        """Layout of cells whose blocks begin at `start`: a block is named by its first place, so that blocks may have any size."""
        doc = torch.where(real, 0, NOWHERE)
        return Layout(position, start, position if self.context == "causal" else start, start, start, doc)

    def apply(self, commit: Commit, log_prob: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Carry out a decision. log_prob: float [R, n], recorded for the cells that are filled or overwritten.

        rows: bool [R], the rows that decided (None = all).

        A policy may fill masked cells, reopen or overwrite filled ones; given and missing cells are never touched.
        """
        assert not bool((commit.cells & ~self.masked).any()), "policy filled a cell that was not masked"
        changed = commit.cells
        if commit.overwrite is not None:
            assert not bool((commit.overwrite & ~self.filled).any()), "policy overwrote a cell that it had not filled"
            changed = changed | commit.overwrite
        self.ids = torch.where(changed, commit.ids, self.ids)
        if log_prob is not None:
            self.log_prob = torch.where(changed, log_prob.to(self.log_prob.dtype), self.log_prob)
        self.masked = self.masked & ~commit.cells
        if commit.reopen is not None:
            assert not bool((commit.reopen & ~self.filled).any()), "policy reopened a cell that it had not filled"
            self.masked = self.masked | commit.reopen
            self.ids = self.ids.masked_fill(commit.reopen, self.mask_id)
            self.draw = self.draw + commit.reopen.long()
        if commit.end_block is not None:
            self._end(commit.end_block)
        mine = torch.ones_like(self.hold) if rows is None else rows
        self.hold = torch.where(mine, False if commit.hold is None else commit.hold, self.hold)
        self.soft = commit.soft
        self.step = self.step + mine.long()
        for name, kept in commit.extra.items():
            old = self.state.get(name)
            shape = (-1, *[1] * (kept.ndim - 1))
            self.state[name] = torch.where(mine.view(shape), kept, torch.zeros_like(kept) if old is None else old)

    def _end(self, rows: Tensor) -> None:
        """Close the blocks of some rows after their filled prefix: later cells no longer exist (an adaptive block end)."""
        prefix = (~self.masked & self.real).long().cumprod(1).bool()
        keep = prefix | ~rows[:, None]
        assert bool(keep.any(1)[rows].all()), "policy ended a block before its first cell was filled"
        self.real, self.masked = self.real & keep, self.masked & keep
