"""A head in 8 bits that bounds every logit from above, so that a draw reads the float weights of a
few tokens only.

In: the head's weights and bias; then states. Out: `LogitBounds` answers. With a large vocabulary
most of a call of few cells is reading the head: 8 bits are a quarter of it. The bound is rigorous
(Cauchy-Schwarz on what rounding took away), so draws are those of the float logits. Knows nothing
about layers, noise or sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.fused_cross_entropy import linear_cross_entropy
from bdlm.core.types import LogitBounds

LEVELS = 127  # of 8 bits with a sign
WORTH = 1 << 22  # weights of a head from which on screening is quicker than reading them all
ROUNDING = 1e-6  # of a sum in float32, against the sum of its terms' sizes
PIECE = 1 << 12  # pairs whose weights are gathered at a time


class Int8Head:
    """The head as 8-bit rows, each with a scale of its own. weight: [V, d], kept, not copied. bias:
    [V]. forbid: an id never written."""

    def __init__(self, weight: Tensor, bias: Tensor, forbid: int) -> None:
        self.weight, self.bias, self.forbid = weight, bias, forbid
        scale = weight.abs().amax(1).clamp(min=1e-30) / LEVELS
        rounded = (weight / scale[:, None]).round_()
        self.levels, self.scale = rounded.to(torch.int8).T, scale  # [d, V], stored by rows of V
        kept = torch.linalg.vector_norm(rounded, dim=1) * scale
        lost = torch.linalg.vector_norm(rounded.mul_(-scale[:, None]).add_(weight), dim=1)
        # what a logit can be above the product of levels: `of_state` times |h| and `of_lost` times
        # what h loses, see `__call__`
        self.of_state, self.of_lost = (
            (lost + ROUNDING * kept) * (1 + 10 * ROUNDING),
            kept * (1 + 10 * ROUNDING),
        )
        self.top = bias + ROUNDING * bias.abs()

    def __call__(self, hidden: Tensor) -> LogitBounds:
        """Bounds of the logits of states [M, d].

        w h = (w' + e)(h' + f) with w', h' what 8 bits keep: w h - w' h' = e h + w' f, at most |e|
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
        """Logits of pairs of a state of [M, d] and a token, int64 [K] each -> [K]; each pair by
        itself, so that no other matters."""
        pairs = zip(cell.split(PIECE), token.split(PIECE), strict=True)
        return torch.cat([(self.weight[t] * hidden[c]).sum(-1) + self.bias[t] for c, t in pairs])

    def log_probs(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Log-probability of one token each among all but the forbidden one, nats: states [K, d],
        int64 [K] -> float32 [K]."""
        return -linear_cross_entropy(hidden, self.weight, self.bias, token, self.forbid)


def worth_it(weight: Tensor, bias: Tensor) -> bool:
    """Whether screening a head [V, d] is quicker than reading it: a large one, finite, float32,
    with 8-bit products on a CPU."""
    large = (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= WORTH
    )
    return large and quick_products() and bool((weight.sum() + bias.sum()).isfinite())


def quick_products() -> bool:
    """Whether products of 8-bit numbers are exact and quick here: torch has them, and the processor
    VNNI."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and vnni is not None and vnni()
