"""Commit long prompts chunk by chunk, so that memory grows with the prompt and not with its square.

A clean cell sees the clean cells of its own and of earlier blocks only. A prompt may therefore be
committed in runs of whole blocks, one forward pass each, with the result of a single pass.
Knows nothing about requests or decoders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdlm.core.blockmap import block_start
from bdlm.core.forward import extend
from bdlm.core.types import Denoiser
from bdlm.generation.engine.model_runner import CacheRollback
from bdlm.generation.engine.token_buffer import TokenBuffer

CHUNK = 1024  # cells of a row in one pass; attention masks take CHUNK x (cells before) numbers


def prefill(
    model: Denoiser, texts: TokenBuffer, cache: Any, rows: Tensor, leave: int, alone: bool = False
) -> Tensor:
    """Commit what waits in some rows until at most `leave` cells of each wait.

    rows: bool [R]. alone: one row a pass, so that the shape of every product depends on that row.
    Returns how many passes each row took part in, int64 [R]. A model that raises ends the prefill:
    the caller's next pass then holds the cells that are left, and finds out whose fault it was.
    """
    if alone:
        each = [torch.zeros_like(rows) for _ in range(len(rows))]
        for row, own in enumerate(each):
            own[row] = rows[row]
        return torch.stack([_together(model, texts, cache, own, leave) for own in each]).sum(0)
    return _together(model, texts, cache, rows, leave)


def _together(model: Denoiser, texts: TokenBuffer, cache: Any, rows: Tensor, leave: int) -> Tensor:
    passes = torch.zeros_like(texts.sent)
    size = texts.size.clamp(min=1)
    whole = block_start(torch.full_like(size, CHUNK), size).maximum(size)  # whole blocks
    while True:
        going = rows & (texts.done - texts.sent > leave)
        if not bool(going.any()):
            return passes
        begun = block_start(texts.sent, size)
        until = torch.minimum(begun + whole, texts.done)
        waits = texts.waiting(going, until)
        assert waits is not None, "rows with cells that wait have none"
        try:
            with CacheRollback(cache):
                extend(model, *waits, cache, append_only="ragged_batching" in model.spec.supports)
        except Exception:
            return passes
        texts.sent = torch.where(going, until, texts.sent)
        passes += going
