"""A head in 8 bits that bounds every logit from above, so that a draw reads the float weights of a few tokens only.

In: the head's weights and bias; then states. Out: `Rough` answers. With a large vocabulary most of a call of few cells is reading the
head: 8 bits are a quarter of it. The bound is rigorous (Cauchy-Schwarz on what rounding took away), so draws are those of the float
logits. Knows nothing about layers, noise or sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.fused import linear_cross_entropy
from bdlm.core.types import Rough

LEVELS = 127  # of 8 bits with a sign
WORTH = 1 << 22  # weights of a head from which on screening is quicker than reading them all


class Screen:
    """The head as 8-bit rows, each with a scale of its own. weight: [V, d], kept, not copied. bias: [V]. forbid: an id never written."""

    def __init__(self, weight: Tensor, bias: Tensor, forbid: int) -> None:
        self.weight, self.bias, self.forbid = weight, bias, forbid
        scale = weight.abs().amax(1).clamp(min=1e-30) / LEVELS
        rounded = (weight / scale[:, None]).round_()
        self.levels, self.scale = rounded.to(torch.int8).T, scale  # [d, V], stored by rows of V
        lost = torch.linalg.vector_norm(weight - rounded * scale[:, None], dim=1)
        # of |error| <= |w lost| |h| + |w kept| |h lost|, see `__call__`
        self.margins = torch.stack((lost, torch.linalg.vector_norm(rounded, dim=1) * scale))

    def __call__(self, hidden: Tensor) -> Rough:
        """Bounds of the logits of states [M, d].

        w h = (w' + e)(h' + f) with w', h' what 8 bits keep: w h - w' h' = e h + w' f, at most |e| |h| + |w'| |f|.
        """
        scale = hidden.abs().amax(1, keepdim=True).clamp(min=1e-30) / LEVELS
        rounded = (hidden / scale).round_()
        norms = torch.stack((hidden, hidden - rounded * scale), 1)
        upper = torch.addmm(self.bias, torch.linalg.vector_norm(norms, dim=2), self.margins)
        product = torch._int_mm(rounded.to(torch.int8), self.levels).float()
        upper.add_(product.mul_(self.scale).mul_(scale))
        return Rough(upper, hidden, self)

    def exact(self, hidden: Tensor, token: Tensor) -> Tensor:
        """The logit of one token each: states [K, d], int64 [K] -> [K], whatever else is asked."""
        return (self.weight[token] * hidden).sum(-1) + self.bias[token]

    def log_probs(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Log-probability of one token each among all but the forbidden one, nats: states [K, d], int64 [K] -> float32 [K]."""
        return -linear_cross_entropy(hidden, self.weight, self.bias, token, self.forbid)


def screen_of(weight: Tensor, bias: Tensor, forbid: int) -> Screen | None:
    """The screen of a head, None where it would not be quicker: small heads, other devices and dtypes, no 8-bit products."""
    quick = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= WORTH and hasattr(torch, "_int_mm")
    return Screen(weight, bias, forbid) if quick and torch.cpu._is_vnni_supported() else None
