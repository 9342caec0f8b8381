"""A head in 8 bits that bounds every logit from above, so that a draw reads the float weights of a
few tokens only.

In: the head's weights and bias; then states. Out: `LogitBounds`. With a large vocabulary, reading
the head is most of a forward pass of few cells: 8 bits are a quarter of it. The bound is rigorous
(Cauchy-Schwarz on the rounding error), so draws are those of the float logits. Knows nothing about
layers, noise or sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.fused_cross_entropy import linear_cross_entropy
from bdlm.core.types import LogitBounds

LEVELS = 127  # of 8 bits with a sign
MIN_WEIGHTS = 1 << 22  # weights of a head from which on bounds are faster than reading them all
ROUNDING = 1e-6  # of a sum in float32, against the sum of its terms' sizes
PIECE = 1 << 12  # pairs whose weights are gathered at a time


class Int8Head:
    """Store the head as 8-bit rows, each with a scale of its own.

    weight: [V, d], kept, not copied. bias: [V]. forbid: an id that is never written."""

    def __init__(self, weight: Tensor, bias: Tensor, forbid: int) -> None:
        self.weight = weight
        self.bias = bias
        self.forbid = forbid
        scale = weight.abs().amax(1).clamp(min=1e-30) / LEVELS
        rounded = (weight / scale[:, None]).round_()
        self.levels, self.scale = rounded.to(torch.int8).T, scale  # [d, V], stored by rows of V
        kept = torch.linalg.vector_norm(rounded, dim=1) * scale
        lost = torch.linalg.vector_norm(rounded.mul_(-scale[:, None]).add_(weight), dim=1)
        # a logit exceeds the product of levels by at most `of_state` times |h| plus `of_lost` times
        # the rounding error of h, see `__call__`
        self.of_state, self.of_lost = (
            (lost + ROUNDING * kept) * (1 + 10 * ROUNDING),
            kept * (1 + 10 * ROUNDING),
        )
        self.top = bias + ROUNDING * bias.abs()

    def __call__(self, hidden: Tensor) -> LogitBounds:
        """Return bounds of the logits of states [M, d].

        w h = (w' + e)(h' + f), with w', h' their 8-bit forms: w h - w' h' = e h + w' f, at most |e|
        |h| + |w'| |f|."""
        scale = hidden.abs().amax(1, keepdim=True).clamp(min=1e-30) / LEVELS
        rounded = (hidden / scale).round_()
        lost = torch.linalg.vector_norm(hidden - rounded * scale, dim=1, keepdim=True)
        upper = (
            torch._int_mm(rounded.to(torch.int8), self.levels)
            .float()
            .mul_(self.scale)
            .mul_(scale)
            .add_(self.top)
        )
        upper.addcmul_(
            torch.linalg.vector_norm(hidden, dim=1, keepdim=True), self.of_state
        ).addcmul_(lost, self.of_lost)
        return LogitBounds(upper, hidden, self)

    def exact(self, hidden: Tensor, cell: Tensor, token: Tensor) -> Tensor:
        """Return the logits of pairs of a state of [M, d] and a token, int64 [K] each -> [K]; each
        pair is computed by itself, so that it does not depend on the others."""
        pairs = zip(cell.split(PIECE), token.split(PIECE), strict=True)
        return torch.cat([(self.weight[t] * hidden[c]).sum(-1) + self.bias[t] for c, t in pairs])

    def log_probs(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Return the log-probability of one token each among all but the forbidden one, nats:
        states [K, d], int64 [K] -> float32 [K]."""
        return -linear_cross_entropy(hidden, self.weight, self.bias, token, self.forbid)


def is_worthwhile(weight: Tensor, bias: Tensor) -> bool:
    """Return whether bounds of a head [V, d] are faster than reading it: a large one, finite,
    float32, on a CPU with fast 8-bit products."""
    large = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHTS
    )
    return large and has_fast_int8() and bool((weight.sum() + bias.sum()).isfinite())


def has_fast_int8() -> bool:
    """Return whether products of 8-bit numbers are exact and fast here: torch has them, and the
    processor has VNNI."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and vnni is not None and vnni()
