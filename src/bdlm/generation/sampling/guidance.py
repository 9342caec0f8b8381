"""Classifier-free guidance: a request and its unconditional row are two rows of one call; their
logits become one.

The unconditional row holds the same text behind another (or no) prompt, aligned at the prompt's end
so that its blocks are the same cells. Knows nothing about decoders or blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.generation.sampling.sampler import NEVER


def guided(
    logits: Tensor, query_mask: Tensor, leaders: Tensor, unconditional: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(1 + w) log p(. | prompt) - w log p(. | negative prompt) for guided rows; the others as they
    are, the unconditional' lines gone.

    logits: [M, V] of the asked cells, bool [R, n], where unconditional ask what their leaders ask.
    leaders, unconditional: int64 [g]. weight: float [g]. Returns logits of the cells that are left,
    and those cells, bool [R, n]."""
    number = torch.zeros_like(query_mask, dtype=torch.long)
    number[query_mask] = torch.arange(len(logits), device=logits.device)
    cells = query_mask[leaders]
    row_mask, theirs = number[leaders][cells], number[unconditional][cells]
    w = weight[:, None].expand(cells.shape)[cells][:, None].to(logits.dtype)
    log, other = logits[row_mask].log_softmax(-1), logits[theirs].log_softmax(-1)
    mixed = torch.where(log == NEVER, NEVER, (1 + w) * log - w * other)
    logits = logits.index_copy(0, row_mask, mixed)
    left = query_mask.clone()
    left[unconditional] = False
    return logits[left[query_mask]], left
