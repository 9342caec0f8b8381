"""Log-probabilities of written tokens that are computed later, many at once.

In: states of cells and what was drawn there by bounds alone (`core.types.LogitBounds`). Out: the
texts' log-probabilities, when a row ends or many are deferred: the head's weights are then read
once for all of them. Knows nothing about models or decoders."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.types import Head, LogitBounds
from bdlm.generation.engine.token_buffer import TokenBuffer

MANY = 64  # deferred cells that are worth reading the head for


class DeferredLogProbs:
    """What is deferred: row, place and token of cells [M], and their states [M, d]."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._head: Head | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(hidden.numel() * hidden.element_size() for *_, hidden in self._held)

    def note(self, row: Tensor, place: Tensor, ids: Tensor, bounds: LogitBounds) -> None:
        """Owe the log-probabilities of cells that were just drawn."""
        self._held.append((row, place, ids, bounds.hidden))
        self._head = bounds.head

    def settle(self, buffer: TokenBuffer, must: bool) -> None:
        """Compute those of finished blocks, if many are deferred or they must be known now. Those
        of active blocks stay deferred."""
        if self._head is None or not (must or sum(len(row) for row, *_ in self._held) >= MANY):
            return
        row, place, ids, hidden = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        done = place < buffer.done[row]
        self._held = [(row[~done], place[~done], ids[~done], hidden[~done])]
        if bool(done.any()):
            buffer.log_prob[row[done], place[done]] = self._head.log_probs(hidden[done], ids[done])

    def drop(self, rows: list[int]) -> None:
        """Forget what rows owe that leave."""
        gone = lambda row: torch.isin(row, torch.tensor(rows, device=row.device))
        self._held = [tuple(part[~gone(own[0])] for part in own) for own in self._held]  # type: ignore[misc]
