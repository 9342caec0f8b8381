"""Commits the prompts of newly admitted rows: copied from rows that hold the same start, and the
rest computed in chunks, so that memory grows with the prompt and not with its square.

A clean cell sees the clean cells of its own and of earlier blocks only. A prompt may therefore be
committed in runs of whole blocks, one forward pass each, with the result of a single pass. Knows
nothing about decoders."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from bdlm.core.blockmap import block_start
from bdlm.core.forward import extend
from bdlm.core.types import Denoiser
from bdlm.generation.engine.model_runner import CacheRollback
from bdlm.generation.engine.row_cache import RowCache
from bdlm.generation.engine.slots import Slot
from bdlm.generation.engine.token_buffer import TokenBuffer

LOGGER = logging.getLogger("bdlm.engine")
CHUNK = 1024  # cells of a row in one pass; an attention mask has CHUNK x (cells before) entries


class Prefill:
    """Commits prompts. row_by_row: one row a pass, so that the shape of every product depends on
    that row alone."""

    def __init__(
        self, model: Denoiser, cache: RowCache, tokens: TokenBuffer, row_by_row: bool = False
    ) -> None:
        self.model, self.cache, self.tokens = model, cache, tokens
        self.row_by_row = row_by_row

    def commit(self, rows: list[int], leave: int | None = None) -> tuple[int, list[int]]:
        """Commit the final cells of some rows until each has at most `leave` left (default: one
        chunk, which the next forward pass commits).

        Returns how many passes were made, and in how many of them each row took part, [R]. A model
        that raises ends it early: the next forward pass then holds the cells that are left, and
        finds out which request caused it."""
        leave = CHUNK if leave is None else leave
        passes = torch.zeros_like(self.tokens.committed)
        if self.cache.exists:
            for group in [[row] for row in sorted(rows)] if self.row_by_row else [rows]:
                row_mask = torch.zeros_like(passes, dtype=torch.bool)
                row_mask[group] = True
                passes += self._commit(row_mask, leave)
        own: list[int] = passes.tolist()
        return sum(own) if self.row_by_row else max(own), own

    def _commit(self, rows: Tensor, leave: int) -> Tensor:
        """Commit the rows marked in a bool [R] together. Returns the passes of each row, int64
        [R]."""
        tokens, passes = self.tokens, torch.zeros_like(self.tokens.committed)
        size = tokens.size.clamp(min=1)
        # whole blocks, at least one
        chunk = torch.maximum(block_start(torch.full_like(size, CHUNK), size), size)
        while True:
            going = rows & (tokens.done - tokens.committed > leave)
            if not bool(going.any()):
                return passes
            until = torch.minimum(block_start(tokens.committed, size) + chunk, tokens.done)
            cells = tokens.to_commit(going, until)
            assert cells is not None, "rows with cells to commit have none"
            cache = self.cache.model_cache
            packed = "ragged_batching" in self.model.spec.supports
            try:
                with CacheRollback(cache):
                    extend(self.model, *cells, cache, append_only=packed)
            except Exception as error:
                LOGGER.warning(
                    "the prefill of %d rows raised %s: %s; the next forward pass commits the rest",
                    int(going.sum()),
                    type(error).__name__,
                    error,
                )
                return passes
            tokens.mark_committed(going, until)
            passes += going

    def is_complete(self, rows: list[int]) -> bool:
        """Whether some rows have committed all their final cells."""
        return not bool(self.tokens.num_to_commit()[rows].any())

    def copy(self, slots: list[Slot]) -> None:
        """Copy the start of prompts from the rows that hold them."""
        for cells in {slot.num_copied for slot in slots}:
            alike = [slot for slot in slots if slot.num_copied == cells]
            rows = torch.tensor([slot.row for slot in alike], device=self.tokens.device)
            source = torch.tensor([slot.source for slot in alike], device=self.tokens.device)
            moved = rows != source
            if bool(moved.any()):
                position = torch.arange(cells, device=rows.device).expand(int(moved.sum()), -1)
                causal = self.model.spec.context == "causal"
                rank = position if causal else self.tokens.start[rows[moved], :cells]
                self.cache.copy(source[moved], rows[moved], rank, position)
            self.tokens.mark_copied(rows, cells)
