"""The blocks being written, one a row: what is masked, what is filled, and the rules that every
`Commit` must keep.

In: blank blocks and commits. Out: the `Canvas` of a forward pass and, when a row's block is full,
its tokens. The boolean `masked` is the only truth about what is still open. Knows nothing about
models, decoders or texts.

Shapes: R rows, n cells. Rows are independent; a row without a block has `real` False throughout.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bdlm.core.errors import DecoderError
from bdlm.core.types import NOWHERE, Canvas, Commit, Layout, Soft
from bdlm.generation.sampling.noise import CellNoise

_CELLS = ("ids", "position", "draw", "real", "masked", "given", "log_prob")


class BlockState:
    """The canvases of R rows of at most n cells."""

    def __init__(
        self, rows: int, cells: int, mask_id: int, context: str, device: torch.device
    ) -> None:
        self.context, self.mask_id, self.cells = context, mask_id, cells
        new = lambda kind, fill: torch.full((rows, cells), fill, dtype=kind, device=device)
        self.ids, self.position, self.draw = (
            new(torch.long, mask_id),
            new(torch.long, 0),
            new(torch.long, 0),
        )
        self.real, self.masked, self.given = (
            new(torch.bool, False),
            new(torch.bool, False),
            new(torch.bool, False),
        )
        self.log_prob = new(torch.float32, 0.0)
        number = lambda: torch.zeros(rows, dtype=torch.long, device=device)
        self.seed, self.step, self.start = number(), number(), number()
        # holding: some row may be held
        self.hold, self.holding = torch.zeros(rows, dtype=torch.bool, device=device), False
        self.state: dict[str, Tensor] = {}
        self.soft: Soft | None = None
        self.mixed = torch.zeros(rows, dtype=torch.bool, device=device)  # rows that are fed `soft`
        self._where: Layout | None = None
        self._keys: CellNoise | None = None

    def widen(self, cells: int) -> None:
        """Make room for blocks of so many cells."""
        more = cells - self.cells
        if more > 0:
            for name in _CELLS:
                setattr(self, name, _wider(getattr(self, name), more))
            self.state = {name: _wider(kept, more) for name, kept in self.state.items()}
            if self.soft is not None:
                self.soft = replace(
                    self.soft,
                    ids=_wider(self.soft.ids, more),
                    weight=_wider(self.soft.weight, more),
                )
            self.cells, self._where, self._keys = cells, None, None

    def open(self, rows: Tensor, start: Tensor, real: Tensor, given: Tensor, held: Tensor) -> None:
        """Begin a blank block in some rows.

        rows: int64 [k]. start: int64 [k], place of its first cell. real: bool [k, n], cells that
        exist (the text may end inside the block). given: int64 [k, n] tokens of cells known
        beforehand, held: bool [k, n] which those are."""
        place = torch.arange(self.cells, device=rows.device)
        self.position[rows], self.real[rows] = start[:, None] + place, real
        self.given[rows], self.masked[rows] = held, real & ~held
        blank = torch.full_like(real, self.mask_id, dtype=torch.long)
        self.ids[rows] = torch.where(held, given, blank)
        self.draw[rows], self.step[rows], self.log_prob[rows], self.hold[rows] = 0, 0, 0.0, False
        self.start[rows], self.mixed[rows] = start, False
        for kept in self.state.values():
            kept[rows] = 0
        self._where = self._keys = None

    def close(self, rows: Tensor) -> None:
        """Leave rows without a block."""
        self.real[rows], self.masked[rows], self.hold[rows] = False, False, False
        self._where = None

    @property
    def full(self) -> Tensor:
        """Rows whose block exists and has no masked cell, bool [R]."""
        return self.real.any(1) > (self.masked.any(1) | self.hold)

    @property
    def filled(self) -> Tensor:
        """Cells that the sampler has filled, bool [R, n]."""
        return self.real > (self.masked | self.given)

    def keys(self) -> CellNoise:
        """The noise of the cells; the same object until a block opens or a cell is reopened."""
        if self._keys is None:
            self._keys = CellNoise(self.seed.clone(), self.position.clone(), self.draw.clone())
        return self._keys

    def layout(self) -> Layout:
        """Where the cells stand; the same object until a block opens, ends or closes, so that a
        model can keep what it made of it."""
        if self._where is None:
            start = self.start[:, None].expand_as(self.position).contiguous()
            rank = self.position.clone() if self.context == "causal" else start
            self._where = Layout(
                self.position.clone(), start, rank, start, start, torch.where(self.real, 0, NOWHERE)
            )
        return self._where

    def canvas(self, previous: Tensor | None = None, time: Tensor | None = None) -> Canvas:
        """What the model is shown. previous: int64 [R], the token before each block. time: [R, 1]
        mask probability, if it is told one."""
        time = None if time is None else time.float().expand(self.ids.shape)
        return Canvas(self.ids, self.masked, self.layout(), previous, time, self._fed())

    def _fed(self) -> Soft | None:
        """Mixtures of the rows that have them; the cells of the others as they are."""
        if self.soft is None or not bool(self.mixed.any()):
            return None
        row_mask = self.mixed[:, None, None]
        alone = torch.zeros_like(self.soft.weight)
        alone[..., 0] = 1
        ids = torch.where(row_mask, self.soft.ids, self.ids[..., None])
        return replace(self.soft, ids=ids, weight=torch.where(row_mask, self.soft.weight, alone))

    def apply(
        self,
        commit: Commit,
        log_prob: Tensor | None = None,
        rows: Tensor | None = None,
        changed: Tensor | None = None,
    ) -> None:
        """Carry out a decision. log_prob: float [R, n], recorded for the cells that are filled or
        overwritten.

        rows: bool [R], the rows that decided (None = all). changed: what `check` returned, if it
        was asked before.

        A decoder may fill masked cells, reopen or overwrite filled ones; given and missing cells
        are never touched. Nothing is changed by a decision that breaks this."""
        changed = self.check(commit) if changed is None else changed
        self.ids = torch.where(changed, commit.ids, self.ids)
        if log_prob is not None:
            self.log_prob = torch.where(changed, log_prob.to(self.log_prob.dtype), self.log_prob)
        self.masked = self.masked > commit.cells
        if commit.reopen is not None:
            self.masked = self.masked | commit.reopen
            self.ids = self.ids.masked_fill(commit.reopen, self.mask_id)
            self.draw, self._keys = self.draw + commit.reopen.long(), None
        if commit.end_block is not None:
            self._end(commit.end_block)
        row_mask = torch.ones_like(self.hold) if rows is None else rows
        if commit.hold is not None or self.holding:
            self.hold, self.holding = (
                torch.where(row_mask, False if commit.hold is None else commit.hold, self.hold),
                True,
            )
        if commit.soft is not None or self.soft is not None:
            self._mix(commit.soft, row_mask)
        self.step = self.step + (1 if rows is None else row_mask.long())
        for name, kept in commit.extra.items():
            old = self.state.get(name)
            shape = (-1, *[1] * (kept.ndim - 1))
            self.state[name] = torch.where(
                row_mask.view(shape), kept, torch.zeros_like(kept) if old is None else old
            )

    def check(self, commit: Commit, vocab: int | None = None) -> Tensor:
        """The cells that get a token, bool [R, n]. Raises DecoderError for a decision that breaks
        the rules.

        vocab: tokens that there are, if known. All rules are read from the device at once.
        """
        _check_form(commit, self.masked)
        changed, filled = commit.cells, self.filled
        broken = {"filled a cell that was not masked": commit.cells > self.masked}
        if commit.overwrite is not None:
            broken["overwrote a cell that it had not filled"] = commit.overwrite > filled
            changed = changed | commit.overwrite
        if commit.reopen is not None:
            broken["reopened a cell that it had not filled"] = commit.reopen > filled
        broken["wrote the mask token"] = changed & (commit.ids == self.mask_id)
        if vocab is not None:
            broken["wrote a token outside the vocabulary"] = changed & (
                (commit.ids < 0) | (commit.ids >= vocab)
            )
        if commit.end_block is not None:
            broken["ended a block before its first cell was filled"] = (
                commit.end_block & (self.masked > changed)[:, 0]
            )
        for rule, breaks in zip(
            broken, torch.stack([cells.any() for cells in broken.values()]).tolist(), strict=True
        ):
            if breaks:
                raise DecoderError(f"the decoder {rule}; correct its `choose`")
        return changed

    def _mix(self, soft: Soft | None, rows: Tensor) -> None:
        """What the rows that decided are fed at their next call."""
        self.mixed = torch.where(rows, soft is not None, self.mixed)
        if soft is not None:
            old, row_mask = self.soft or soft, rows[:, None, None]
            self.soft = replace(
                soft,
                ids=torch.where(row_mask, soft.ids, old.ids),
                weight=torch.where(row_mask, soft.weight, old.weight),
            )

    def _end(self, rows: Tensor) -> None:
        """Close the blocks of some rows after their filled prefix: later cells no longer exist (an
        adaptive block end)."""
        prefix = (~self.masked & self.real).long().cumprod(1).bool()
        keep = prefix | ~rows[:, None]
        self.real, self.masked, self._where = self.real & keep, self.masked & keep, None

    def follow(self, leaders: Tensor, rows: Tensor, prompt: Tensor) -> None:
        """Let some rows hold what others hold in their cells behind the prompt. leaders, rows,
        prompt: int64 [k]."""
        free = self.position[leaders] >= prompt[:, None]
        for name in ("ids", "draw", "real"):
            own = getattr(self, name)
            own[rows] = torch.where(free, own[leaders], own[rows])
        self.masked[rows] = self.masked[leaders] & free
        self.hold[rows], self._where = self.hold[leaders], None


def _wider(table: Tensor, more: int) -> Tensor:
    return torch.cat((table, table.new_zeros(table.shape[0], more, *table.shape[2:])), 1)


def _check_form(commit: Commit, masked: Tensor) -> None:
    """Raise DecoderError unless a decision's tensors are of the kinds and shapes of a block_state
    whose cells are `masked`, bool [R, n]."""
    if not isinstance(commit, Commit):
        raise DecoderError(
            f"the decoder's `choose` returned {type(commit).__name__}; return a Commit"
        )
    rows, bools = masked.shape[:1], ("cells", "reopen", "overwrite", "end_block", "hold")
    for name in (*bools, "ids"):
        value = getattr(commit, name)
        shape = rows if name in ("end_block", "hold") else masked.shape
        kind = torch.bool if name in bools else torch.long
        if value is None and name not in ("cells", "ids"):
            continue
        if not isinstance(value, Tensor) or value.dtype != kind or value.shape != shape:
            found = (
                f"{value.dtype} {list(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise DecoderError(
                f"the decoder's Commit.{name} is {found}; return {kind} {list(shape)}"
            )
