"""Soft inputs: a mixture of token embeddings fed in place of one, the same for every
transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bdlm.core.types import Soft


def mixed_rows(table: Tensor, soft: Soft) -> Tensor:
    """Weighted mean of K embedding rows a cell: table [V, d] -> [R, N, d]; with `keep_norm`, of
    their mean norm."""
    rows = F.embedding(soft.ids, table)
    weight = soft.weight.to(rows.dtype)[..., None]
    mixed = (weight * rows).sum(-2)
    if soft.keep_norm:
        norm = (weight[..., 0] * rows.norm(dim=-1)).sum(-1, keepdim=True)
        # a lone token keeps its embedding, bit for bit
        mixed = mixed * (norm / mixed.norm(dim=-1, keepdim=True).clamp(min=1e-9))
    return mixed
