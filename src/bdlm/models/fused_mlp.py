"""Parts of a layer that go over memory less often: a norm that takes in its modulation, an MLP
whose GELU and its slope are one trip.

In: states. Out: states. Knows nothing about attention or noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SLOPE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form
PIECE = 1 << 17  # numbers that stay in a processor's cache from one operation to the next


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """gelu(x @ up.T + up_bias) @ down.T + down_bias, GELU in its tanh form. Differentiable once.

    x: [..., d]. up: [w, d]. up_bias: [w]. down: [d, w]. down_bias: [d].
    """
    if not torch.is_grad_enabled():
        return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)
    given, kind = [x, up, up_bias, down, down_bias], x.device.type
    if torch.is_autocast_enabled(kind):  # inside a Function autocast is off: cast as it would
        given = [t.to(torch.get_autocast_dtype(kind)) for t in given]
    return _MLP.apply(*given)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
    ) -> Tensor:
        pieces = (
            x.is_cpu
            and x.dtype in (torch.float32, torch.float64)
            and not torch.compiler.is_compiling()
        )
        h, slope = (_by_pieces if pieces else _whole)(F.linear(x, up, up_bias))
        ctx.save_for_backward(x, up, down, h, slope)
        return F.linear(h, down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, up, down, h, slope = ctx.saved_tensors
        to_u = (grad @ down).mul_(slope)
        flat, flat_u = grad.flatten(0, -2), to_u.flatten(0, -2)
        return (
            to_u @ up,
            flat_u.mT @ x.flatten(0, -2),
            flat_u.sum(0),
            flat.mT @ h.flatten(0, -2),
            flat.sum(0),
        )


def _whole(u: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u) and its derivative."""
    return F.gelu(u, approximate="tanh"), torch.ops.aten.gelu_backward(
        torch.ones_like(u), u, approximate="tanh"
    )


def _by_pieces(u: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u), which is put into u, and its derivative.

    Piece by piece through the processor's cache, in passes of one operation each: half the time on
    CPU. Each pass rounds, so it is not for low precision."""
    slope, spare, rate, one = (
        torch.empty_like(u),
        u.new_empty(PIECE),
        u.new_tensor(SLOPE),
        u.new_ones(()),
    )
    for x, share in zip(u.view(-1).split(PIECE), slope.view(-1).split(PIECE), strict=True):
        # gelu(x) = x s, s = sigmoid(z), z = SLOPE x (1 + CUBE x^2); its derivative is s + (1 - s) x
        # s z'
        torch.addcmul(rate, x, x, value=SLOPE * CUBE, out=share).mul_(x).sigmoid_()
        rise = torch.addcmul(rate, x, x, value=3 * SLOPE * CUBE, out=spare[: len(x)])
        rise.mul_(x.mul_(share))
        torch.lerp(rise, one, share, out=share)
    return u, slope


class Norm(nn.Module):
    """LayerNorm in float32 (float64 for float64 models) with a weight and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """norm(x) * (1 + scale) + shift; what is the same for all cells goes into the norm's own
        weight and bias."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = self.modulated()
        if same := shift is not None and scale is not None and shift.numel() == len(weight):
            weight, bias = self.modulated(shift.to(wide), scale.to(wide))
        h = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias).to(x.dtype)
        return h if same or shift is None or scale is None else h * (1 + scale) + shift

    def modulated(
        self, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias [d] of the norm followed by x * (1 + scale) + shift, for a modulation of
        d numbers; its own without one."""
        if shift is None or scale is None:
            return self.weight, None
        return self.weight * (1 + scale.flatten()), shift.flatten()
