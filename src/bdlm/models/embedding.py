"""What enters the transformer: a vector for each token, and one for the noise level.

In: ids or mixtures of them; noise levels. Out: vectors. Parameter names are the published ones.
Knows nothing about layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlm.core.types import Soft
from bdlm.models.soft import mixed_rows


class Embedding(nn.Module):
    """Token embedding; a soft input is a mixture of rows."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, ids: Tensor, soft: Soft | None = None) -> Tensor:
        if soft is None:
            return F.embedding(ids, self.embedding)
        return mixed_rows(self.embedding, soft)


class SigmaMap(nn.Module):
    """Noise level -> conditioning vector: sinusoids [cos, sin] of 256 dimensions, then a two-layer
    MLP."""

    def __init__(self, cond: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, sigma: Tensor) -> Tensor:
        frequency = torch.exp(
            -math.log(10000) * torch.arange(128, device=sigma.device, dtype=torch.float32) / 128
        )
        angle = sigma[..., None].float() * frequency
        return F.silu(
            self.mlp(
                torch.cat((angle.cos(), angle.sin()), -1).to(next(self.mlp.parameters()).dtype)
            )
        )
