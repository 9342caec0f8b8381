"""Parts of a layer that keep less for the backward pass: a norm that takes in its modulation, and GELU computed again instead of kept.

In: states. Out: states. What a layer keeps is written and read again, so less of it is also faster; one more GELU costs less than the
memory traffic of keeping its result. Knows nothing about attention or noise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def gelu_linear(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(u) @ weight.T + bias, GELU in its tanh form. u: [..., w]. weight: [d, w]. bias: [d]. Differentiable once."""
    kind = u.device.type
    if torch.is_autocast_enabled(kind):  # inside a Function autocast is off: cast as it would
        dtype = torch.get_autocast_dtype(kind)
        u, weight, bias = u.to(dtype), weight.to(dtype), bias.to(dtype)
    return _GeluLinear.apply(u, weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(u, weight)
        return F.linear(F.gelu(u, approximate="tanh"), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        to_weight = flat.mT @ F.gelu(u, approximate="tanh").flatten(0, -2)
        return torch.ops.aten.gelu_backward(grad @ weight, u, approximate="tanh"), to_weight, flat.sum(0)


class Norm(nn.Module):
    """LayerNorm in float32 (float64 for float64 models) with a weight and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """norm(x) * (1 + scale) + shift; what is the same for all cells goes into the norm's own weight and bias."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = self.modulated()
        if same := shift is not None and scale is not None and shift.numel() == len(weight):
            weight, bias = self.modulated(shift.to(wide), scale.to(wide))
        h = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias).to(x.dtype)
        return h if same or shift is None or scale is None else h * (1 + scale) + shift

    def modulated(self, shift: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias [d] of the norm followed by x * (1 + scale) + shift, for a modulation of d numbers; its own without one."""
        if shift is None or scale is None:
            return self.weight, None
        return self.weight * (1 + scale.flatten()), shift.flatten()
