"""The blocks being denoised, one per row: what is masked, what is filled, and the rules that every
`Commit` must keep.

In: blank blocks and commits. Out: the `Canvas` of a forward pass and, when a row's block is full,
its tokens. The boolean `masked` alone says what is still to be filled. Knows nothing about models,
decoders or text.

Shapes: R rows, n cells. Rows are independent; in a row without a block `real` is False throughout.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bdlm.core.errors import DecoderError
from bdlm.core.types import NOWHERE, Canvas, Commit, Layout, Soft
from bdlm.generation.sampling.noise import CellNoise

_CELL_TABLES = ("ids", "position", "draw", "real", "masked", "given", "log_prob")


class BlockState:
    """The blocks of R rows, each of at most n cells.

    [R, n]: ids, position, int64; draw, int64, how often a cell was reopened; real, masked, given,
    bool; log_prob, float32. [R]: seed; step, decisions made in the open block; start, position of
    its first cell; hold, bool, full blocks that stay open. state: what decoders want to see again
    (`Commit.extra`), by "Decoder.name". soft, mixed: mixtures of tokens, and the rows that are fed
    them."""

    def __init__(
        self, num_rows: int, cells: int, mask_id: int, context: str, device: torch.device
    ) -> None:
        self.context, self.mask_id, self.cells = context, mask_id, cells
        self.ids = torch.full((num_rows, cells), mask_id, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.ids)
        self.draw = torch.zeros_like(self.ids)
        self.real = torch.zeros(num_rows, cells, dtype=torch.bool, device=device)
        self.masked = torch.zeros_like(self.real)
        self.given = torch.zeros_like(self.real)
        self.log_prob = torch.zeros(num_rows, cells, dtype=torch.float32, device=device)
        self.seed = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.step = torch.zeros_like(self.seed)
        self.start = torch.zeros_like(self.seed)
        self.hold = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._may_hold = False  # some row may have been held
        self.state: dict[str, Tensor] = {}
        self.soft: Soft | None = None
        self.mixed = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._layout: Layout | None = None
        self._noise: CellNoise | None = None

    def widen(self, cells: int) -> None:
        """Make room for blocks of so many cells."""
        more = cells - self.cells
        if more > 0:
            for name in _CELL_TABLES:
                setattr(self, name, _wider(getattr(self, name), more))
            self.state = {name: _wider(kept, more) for name, kept in self.state.items()}
            if self.soft is not None:
                ids, weight = _wider(self.soft.ids, more), _wider(self.soft.weight, more)
                self.soft = replace(self.soft, ids=ids, weight=weight)
            self.cells, self._layout, self._noise = cells, None, None

    def open(self, rows: Tensor, start: Tensor, real: Tensor, ids: Tensor, given: Tensor) -> None:
        """Begin a blank block in some rows.

        rows: int64 [k]. start: int64 [k], position of the first cell. real: bool [k, n], cells that
        exist (a row may end inside the block). ids: int64 [k, n], tokens of the cells that are
        `given`, bool [k, n]."""
        offset = torch.arange(self.cells, device=rows.device)
        self.position[rows] = start[:, None] + offset
        self.real[rows] = real
        self.given[rows] = given
        self.masked[rows] = real & ~given
        blank = torch.full_like(real, self.mask_id, dtype=torch.long)
        self.ids[rows] = torch.where(given, ids, blank)
        for table in (self.draw, self.step, self.log_prob, self.hold, self.mixed):
            table[rows] = 0
        self.start[rows] = start
        for kept in self.state.values():
            kept[rows] = 0
        self._layout, self._noise = None, None

    def close(self, rows: Tensor) -> None:
        """Leave some rows, int64 [k], without a block."""
        self.real[rows] = False
        self.masked[rows] = False
        self.hold[rows] = False
        self._layout = None

    @property
    def full(self) -> Tensor:
        """Rows with a block that has no masked cell and is not held, bool [R]."""
        return self.real.any(1) > (self.masked.any(1) | self.hold)

    @property
    def filled(self) -> Tensor:
        """Cells that the decoder has filled, bool [R, n]."""
        return self.real > (self.masked | self.given)

    def noise(self) -> CellNoise:
        """Return the noise of the cells; the same object until a block opens or a cell is
        reopened."""
        if self._noise is None:
            self._noise = CellNoise(self.seed.clone(), self.position.clone(), self.draw.clone())
        return self._noise

    def layout(self) -> Layout:
        """Return the layout of the cells; the same object until a block opens, ends or closes, so
        that a model can keep what it derived from it."""
        if self._layout is None:
            start = self.start[:, None].expand_as(self.position).contiguous()
            rank = self.position.clone() if self.context == "causal" else start
            doc = torch.where(self.real, 0, NOWHERE)
            self._layout = Layout(self.position.clone(), start, rank, start, start, doc)
        return self._layout

    def canvas(self, previous: Tensor | None = None, time: Tensor | None = None) -> Canvas:
        """Return what the model is given. previous: int64 [R], the token before each block. time:
        [R, 1], the mask probability, for time-conditioned models."""
        time = None if time is None else time.float().expand(self.ids.shape)
        return Canvas(self.ids, self.masked, self.layout(), previous, time, self._soft_input())

    def _soft_input(self) -> Soft | None:
        """The mixtures of the rows that have them; cells of other rows are fed as they are."""
        if self.soft is None or not bool(self.mixed.any()):
            return None
        row_mask = self.mixed[:, None, None]
        single = torch.zeros_like(self.soft.weight)
        single[..., 0] = 1
        ids = torch.where(row_mask, self.soft.ids, self.ids[..., None])
        return replace(self.soft, ids=ids, weight=torch.where(row_mask, self.soft.weight, single))

    # -- decisions ---------------------------------------------------------------------------------

    def state_of(self, decoder: str) -> dict[str, Tensor]:
        """Return the state that decoders of this class name left (`Commit.extra`)."""
        prefix = f"{decoder}."
        return {
            name.removeprefix(prefix): kept
            for name, kept in self.state.items()
            if name.startswith(prefix)
        }

    def apply(
        self,
        commit: Commit,
        log_prob: Tensor | None = None,
        rows: Tensor | None = None,
        changed: Tensor | None = None,
    ) -> None:
        """Carry out a decision.

        log_prob: float [R, n], recorded for the cells that are filled or overwritten. rows: bool
        [R], the rows that decided (None = all). changed: the result of `check`, if it was called
        before. A decoder may fill masked cells and reopen or overwrite filled ones; given cells and
        cells that do not exist are never touched. A decision that breaks this raises DecoderError
        and changes nothing."""
        changed = self.check(commit) if changed is None else changed
        self.ids = torch.where(changed, commit.ids, self.ids)
        if log_prob is not None:
            self.log_prob = torch.where(changed, log_prob.to(self.log_prob.dtype), self.log_prob)
        self.masked = self.masked > commit.cells
        if commit.reopen is not None:
            self.masked = self.masked | commit.reopen
            self.ids = self.ids.masked_fill(commit.reopen, self.mask_id)
            self.draw, self._noise = self.draw + commit.reopen.long(), None
        if commit.end_block is not None:
            self._end(commit.end_block)
        row_mask = torch.ones_like(self.hold) if rows is None else rows
        if commit.hold is not None or self._may_hold:
            hold = False if commit.hold is None else commit.hold
            self.hold, self._may_hold = torch.where(row_mask, hold, self.hold), True
        if commit.soft is not None or self.soft is not None:
            self._mix(commit.soft, row_mask)
        self.step = self.step + (1 if rows is None else row_mask.long())
        for name, new in commit.extra.items():
            old = self.state.get(name, torch.zeros_like(new))
            shape = (-1, *[1] * (new.ndim - 1))
            self.state[name] = torch.where(row_mask.view(shape), new, old)

    def check(self, commit: Commit, vocab: int | None = None) -> Tensor:
        """Return the cells that get a token, bool [R, n]. Raises DecoderError for a decision that
        breaks the rules.

        vocab: the size of the vocabulary, if known. All rules are read from the device at once."""
        check_form(commit, self.masked)
        changed, filled = commit.cells, self.filled
        broken = {"filled a cell that was not masked": commit.cells > self.masked}
        if commit.overwrite is not None:
            broken["overwrote a cell that it had not filled"] = commit.overwrite > filled
            changed = changed | commit.overwrite
        if commit.reopen is not None:
            broken["reopened a cell that it had not filled"] = commit.reopen > filled
        broken["wrote the mask token"] = changed & (commit.ids == self.mask_id)
        if vocab is not None:
            outside = (commit.ids < 0) | (commit.ids >= vocab)
            broken["wrote a token outside the vocabulary"] = changed & outside
        if commit.end_block is not None:
            unfilled = (self.masked > changed)[:, 0]
            broken["ended a block before its first cell was filled"] = commit.end_block & unfilled
        found = torch.stack([cells.any() for cells in broken.values()]).tolist()
        for rule, breaks in zip(broken, found, strict=True):
            if breaks:
                raise DecoderError(f"the decoder {rule}; correct its `choose`")
        return changed

    def _mix(self, soft: Soft | None, rows: Tensor) -> None:
        """Record what the rows that decided are fed in the next forward pass."""
        self.mixed = torch.where(rows, soft is not None, self.mixed)
        if soft is not None:
            old, row_mask = self.soft or soft, rows[:, None, None]
            ids = torch.where(row_mask, soft.ids, old.ids)
            self.soft = replace(
                soft, ids=ids, weight=torch.where(row_mask, soft.weight, old.weight)
            )

    def _end(self, rows: Tensor) -> None:
        """Cut the blocks of some rows behind their filled prefix: later cells no longer exist (an
        adaptive block end)."""
        prefix = (~self.masked & self.real).long().cumprod(1).bool()
        keep = prefix | ~rows[:, None]
        self.real = self.real & keep
        self.masked = self.masked & keep
        self._layout = None

    def mirror(self, leaders: Tensor, rows: Tensor, prompt: Tensor) -> None:
        """Copy the cells behind the prompt from `leaders` to `rows`. leaders, rows, prompt (cells
        of the prompt): int64 [k]."""
        new = self.position[leaders] >= prompt[:, None]
        for table in (self.ids, self.draw, self.real):
            table[rows] = torch.where(new, table[leaders], table[rows])
        self.masked[rows] = self.masked[leaders] & new
        self.hold[rows] = self.hold[leaders]
        self._layout = None


def _wider(table: Tensor, more: int) -> Tensor:
    return torch.cat((table, table.new_zeros(table.shape[0], more, *table.shape[2:])), 1)


def check_form(commit: Commit, masked: Tensor) -> None:
    """Raise DecoderError unless the tensors of a decision have the types and shapes that fit
    `masked`, bool [R, n]."""
    if not isinstance(commit, Commit):
        raise DecoderError(
            f"the decoder's `choose` returned {type(commit).__name__}; return a Commit"
        )
    bools = ("cells", "reopen", "overwrite", "end_block", "hold")
    for name in (*bools, "ids"):
        value = getattr(commit, name)
        shape = masked.shape[:1] if name in ("end_block", "hold") else masked.shape
        dtype = torch.bool if name in bools else torch.long
        if value is None and name not in ("cells", "ids"):
            continue
        if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != shape:
            is_tensor = isinstance(value, Tensor)
            found = f"{value.dtype} {list(value.shape)}" if is_tensor else type(value).__name__
            raise DecoderError(
                f"the decoder's Commit.{name} is {found}; return {dtype} {list(shape)}"
            )
    for name, value in commit.extra.items():
        if not isinstance(value, Tensor) or value.shape[:1] != masked.shape[:1]:
            raise DecoderError(
                f"the decoder's Commit.extra[{name!r}] is not a tensor of {len(masked)} rows;"
                " return tensors of shape [R, n, ...]"
            )
