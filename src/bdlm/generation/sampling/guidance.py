"""Classifier-free guidance: combine the logits of a request's row and of its unconditional row.

The unconditional row holds the same new tokens behind another prompt (or none), aligned at the
prompt's end, so that its blocks are the same cells. Knows nothing about decoders or blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.generation.sampling.logits_filters import NEVER


def guided(
    logits: Tensor, query_mask: Tensor, leaders: Tensor, unconditional: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute (1 + w) log p(. | prompt) - w log p(. | negative prompt) for guided rows.

    logits: [M, V] of the cells of `query_mask`, bool [R, n], the same cells in an unconditional row
    as in its leader. leaders, unconditional: int64 [g]. scale: w, float [g]. Returns the logits
    without those of unconditional rows (other rows unchanged), and the remaining cells, bool [R,
    n]."""
    number = torch.zeros_like(query_mask, dtype=torch.long)
    number[query_mask] = torch.arange(len(logits), device=logits.device)
    cells = query_mask[leaders]
    own, other = number[leaders][cells], number[unconditional][cells]
    w = scale[:, None].expand(cells.shape)[cells][:, None].to(logits.dtype)
    log_own, log_other = logits[own].log_softmax(-1), logits[other].log_softmax(-1)
    mixed = torch.where(log_own == NEVER, NEVER, (1 + w) * log_own - w * log_other)
    logits = logits.index_copy(0, own, mixed)
    left = query_mask.clone()
    left[unconditional] = False
    return logits[left[query_mask]], left
