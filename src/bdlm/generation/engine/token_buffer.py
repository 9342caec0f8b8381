"""The tokens of all rows, from the first cell of the prompt to the last new one, and their
log-probabilities.

In: requests' known tokens, finished blocks. Out: what the next block starts from, which cells to
commit to the cache, the final tokens. Each row is cut into [0, committed): in the cache;
[committed, done): final, to be committed by the next forward pass; [done, ...): the block being
denoised and what is still to come. Knows nothing about models or decoders.

Tokens that were drawn from bounds of the logits (`core.types.LogitBounds`) get their
log-probabilities later, many at a time, so that the head's weights are read once for all of them.

Shapes: R rows, T cells of the longest row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.blockmap import block_start
from bdlm.core.types import NOWHERE, Head, Layout, LogitBounds

MANY = 64  # deferred log-probabilities that are worth reading the head's weights for
CELL_BYTES = 21  # of the buffer, for each cell of a row


@dataclass(frozen=True)
class BlankBlock:
    """Where the next blocks of k rows are. start: int64 [k]. real: bool [k, n], cells that exist.
    ids: int64 [k, n]; given: bool [k, n], cells with a known token."""

    start: Tensor
    real: Tensor
    ids: Tensor
    given: Tensor


@dataclass(frozen=True)
class _Deferred:
    """M tokens without log-probabilities. row, position, ids: int64 [M]. hidden: [M, d]."""

    row: Tensor
    position: Tensor
    ids: Tensor
    hidden: Tensor

    def select(self, cells: Tensor) -> _Deferred:
        """Those marked in a bool [M]."""
        return _Deferred(self.row[cells], self.position[cells], self.ids[cells], self.hidden[cells])

    @classmethod
    def join(cls, parts: list[_Deferred]) -> _Deferred:
        return cls(
            torch.cat([part.row for part in parts]),
            torch.cat([part.position for part in parts]),
            torch.cat([part.ids for part in parts]),
            torch.cat([part.hidden for part in parts]),
        )


class TokenBuffer:
    """Tokens by row and position.

    [R, T]: ids; start, the first cell of each cell's block; given, tokens known beforehand;
    log_prob, float32. int64 [R]: first, the position of the first known cell; prompt, cells before
    the first new one; total, all cells; committed and done (see above); reported, up to where
    events hold the tokens; size, cells of a block; first_block_end, where the first block ends at
    the earliest."""

    def __init__(self, num_rows: int, context: str, device: torch.device) -> None:
        self.context, self.device = context, device
        self.ids = torch.zeros(num_rows, 0, dtype=torch.long, device=device)
        self.start = torch.zeros_like(self.ids)
        self.given = torch.zeros(num_rows, 0, dtype=torch.bool, device=device)
        self.log_prob = torch.zeros(num_rows, 0, dtype=torch.float32, device=device)
        self.total = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.prompt = torch.zeros_like(self.total)
        self.first = torch.zeros_like(self.total)
        self.committed = torch.zeros_like(self.total)
        self.done = torch.zeros_like(self.total)
        self.reported = torch.zeros_like(self.total)
        self.size = torch.zeros_like(self.total)
        self.first_block_end = torch.zeros_like(self.total)
        # rows with given cells behind the prompt
        self._infills = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._uncommitted = False  # some row may have cells to commit
        self._deferred: list[_Deferred] = []
        self._head: Head | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tables and of the states of deferred log-probabilities."""
        tables = [self.ids, self.start, self.given, self.log_prob]
        tables += [part.hidden for part in self._deferred]
        return sum(table.numel() * table.element_size() for table in tables)

    def reserve(self, length: int) -> None:
        """Make room for rows of so many cells."""
        more = length - self.ids.shape[1]
        if more > 0:
            for name in ("ids", "start", "given", "log_prob"):
                old = getattr(self, name)
                setattr(self, name, torch.cat((old, old.new_zeros(old.shape[0], more)), 1))

    # -- rows come and go --------------------------------------------------------------------------

    def enter(
        self,
        rows: list[int],
        known: list[dict[int, int]],
        prompt: list[int],
        total: list[int],
        size: list[int],
        first_block_end: list[int],
    ) -> None:
        """Write the known tokens of new requests into their rows.

        known: of each row, tokens by position. prompt: cells before the first new one. total: all
        cells. size: cells of a block. first_block_end: where the first block ends at the earliest
        (beyond `size` for a block that reaches over a gap), 0 for no condition."""
        self.reserve(max(total))
        index = torch.tensor(rows, device=self.device)
        for table in (self.ids, self.given, self.log_prob, self.start):
            table[index] = 0
        row = [i for i, tokens in zip(rows, known, strict=True) for _ in tokens]
        position = [p for tokens in known for p in tokens]
        ids = [t for tokens in known for t in tokens.values()]
        self.ids[row, position] = torch.tensor(ids, device=self.device)
        self.given[row, position] = True
        self.prompt[index] = torch.tensor(prompt, device=self.device)
        self.total[index] = torch.tensor(total, device=self.device)
        self.size[index] = torch.tensor(size, device=self.device)
        self.first_block_end[index] = torch.tensor(first_block_end, device=self.device)
        # a row without a known cell before the new ones (an unconditional row) begins with these
        first = [min([*tokens, p]) for tokens, p in zip(known, prompt, strict=True)]
        self.first[index] = torch.tensor(first, device=self.device)
        self.committed[index] = self.first[index]
        self.done[index] = block_start(self.prompt[index], self.size[index])
        self.reported[index] = self.prompt[index]
        self._uncommitted = True
        infills = [max(tokens, default=0) >= p for tokens, p in zip(known, prompt, strict=True)]
        self._infills[index] = torch.tensor(infills, device=self.device)
        position_T = torch.arange(self.ids.shape[1], device=self.device)
        self.start[index] = block_start(position_T, self.size[index][:, None])

    def leave(self, rows: list[int]) -> None:
        """Empty some rows and forget their deferred log-probabilities."""
        index = torch.tensor(rows, device=self.device)
        for table in (self.total, self.committed, self.done):
            table[index] = 0
        self._infills[index] = False
        self._deferred = [part.select(~torch.isin(part.row, index)) for part in self._deferred]

    # -- blocks ------------------------------------------------------------------------------------

    def blank(self, rows: Tensor, cells: int) -> BlankBlock:
        """Return the next block of some rows, int64 [k], of at most `cells` cells."""
        start, total, size = self.done[rows], self.total[rows], self.size[rows]
        end = torch.minimum(torch.maximum(start + size, self.first_block_end[rows]), total)
        position = start[:, None] + torch.arange(cells, device=rows.device)
        real = (position < end[:, None]) & (position >= self.first[rows][:, None])
        at = position.clamp(max=self.ids.shape[1] - 1)
        ids, given = self.ids[rows[:, None], at], self.given[rows[:, None], at]
        return BlankBlock(start, real, ids, given & real)

    def skip_given(self, rows: Tensor) -> None:
        """Mark the next whole blocks of some rows, int64 [k], as done while all their tokens are
        given: they are committed at once."""
        if not bool(self._infills[rows].any()):
            return
        position = torch.arange(self.ids.shape[1], device=rows.device)
        done, size, total = self.done[rows], self.size[rows], self.total[rows]
        unknown = ~self.given[rows] & (position >= done[:, None]) & (position < total[:, None])
        first = torch.where(unknown.any(1), unknown.int().argmax(1), total)
        over = torch.where(first < total, block_start(first - done, size), first - done)
        skipped = (position >= done[:, None]) & (position < (done + over)[:, None])
        own = done[:, None] + block_start(position - done[:, None], size[:, None])
        self.start[rows] = torch.where(skipped, own, self.start[rows])
        self.done[rows] = done + over
        self._uncommitted = True

    def store(
        self,
        rows: Tensor,
        real: Tensor,
        position: Tensor,
        start: Tensor,
        ids: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Store finished blocks of some rows [k]. real: bool [k, n]; position, ids: int64 [k, n];
        start: int64 [k]; log_prob: float32 [k, n]."""
        k, cell = real.nonzero(as_tuple=True)
        row, at = rows[k], position[k, cell]
        self.ids[row, at] = ids[k, cell]
        self.start[row, at] = start[k]
        self.log_prob[row, at] = log_prob[k, cell]
        self.done[rows] = torch.where(real, position + 1, 0).amax(1)
        self._uncommitted = True

    def unreported(self, rows: Tensor) -> list[list[int]]:
        """Return the final tokens of some rows, int64 [k], that no event holds yet."""
        begin, count = self.reported[rows], (self.done - self.reported)[rows].clamp(min=0).tolist()
        position = begin[:, None] + torch.arange(max(count, default=0), device=rows.device)
        ids = self.ids[rows[:, None], position.clamp(max=self.ids.shape[1] - 1)].tolist()
        return [tokens[:n] for tokens, n in zip(ids, count, strict=True)]

    def previous(self) -> Tensor:
        """Return the token just before each row's block, int64 [R]."""
        if not self.ids.shape[1]:
            return self.done
        return self.ids.gather(1, (self.done - 1).clamp(min=0)[:, None])[:, 0]

    # -- cells for the cache -----------------------------------------------------------------------

    def num_to_commit(self) -> Tensor:
        """Return how many final cells each row has yet to commit, int64 [R]."""
        return (self.done - self.committed).clamp(min=0)

    def to_commit(
        self, rows: Tensor | None = None, until: Tensor | None = None
    ) -> tuple[Tensor, Layout] | None:
        """Return the cells to commit, int64 [R, m], and their layout; None if there are none.

        rows: bool [R], of these alone. until: int64 [R], up to this position; default all final
        ones."""
        if not self._uncommitted:
            return None
        count = ((self.done if until is None else until) - self.committed).clamp(min=0)
        if rows is not None:
            count = torch.where(rows, count, 0)
        width = int(count.max())
        if width <= 0:
            return None
        position = self.committed[:, None] + torch.arange(width, device=self.device)
        real = position < (self.committed + count)[:, None]
        at = position.clamp(max=self.ids.shape[1] - 1)
        return self.ids.gather(1, at), self._layout(position, self.start.gather(1, at), real)

    def mark_committed(self, rows: Tensor | None = None, until: Tensor | None = None) -> None:
        """Record that the cells of `to_commit` (same arguments) are in the cache."""
        if rows is None or until is None:
            self.committed = torch.maximum(self.committed, self.done)
            self._uncommitted = False
        else:
            self.committed = torch.where(rows, until, self.committed)

    def mark_copied(self, rows: Tensor, cells: int) -> None:
        """Record that the first cells of some rows, int64 [k], were copied into the cache."""
        self.committed[rows] = cells

    def _layout(self, position: Tensor, start: Tensor, real: Tensor) -> Layout:
        """The layout of cells in blocks that begin at `start`. A block is named by its first
        position, so that blocks may have any size."""
        rank = position if self.context == "causal" else start
        return Layout(position, start, rank, start, start, torch.where(real, 0, NOWHERE))

    # -- deferred log-probabilities ----------------------------------------------------------------

    def defer(self, row: Tensor, position: Tensor, ids: Tensor, bounds: LogitBounds) -> None:
        """Compute the log-probabilities of tokens later. row, position, ids: int64 [M]; bounds: of
        these M cells."""
        self._deferred.append(_Deferred(row, position, ids, bounds.hidden))
        self._head = bounds.head

    def settle(self, must: bool) -> None:
        """Compute the deferred log-probabilities of finished blocks, if there are many or they
        `must` be known now. Those of the blocks being denoised stay deferred."""
        if self._head is None or not self._deferred:
            return
        if not must and sum(len(part.row) for part in self._deferred) < MANY:
            return
        deferred = _Deferred.join(self._deferred)
        done = deferred.position < self.done[deferred.row]
        self._deferred = [deferred.select(~done)]
        if bool(done.any()):
            ready = deferred.select(done)
            log_probs = self._head.log_probs(ready.hidden, ready.ids)
            self.log_prob[ready.row, ready.position] = log_probs
