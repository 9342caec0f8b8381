"""Split attention of whole windows on CPU: rotary positions and every call of a plan as one differentiable operation.

In: states and their projection to queries, keys and values, a rotary table and a `Plan`. Out: mixed values, cell by cell.
Through autograd each slice of the keys would fill a zero tensor of their whole length, and each rotation make five; here rotations are
in place, and gradients are added up in place in the layout that the projection takes them back in. The kernels are those of SDPA, and
plain products where numbers are bfloat16 (SDPA's backward is three times slower there). Knows nothing about layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdlm.core.visibility import Plan
from bdlm.models.attention import probabilities, take

Three = tuple[Tensor, Tensor, Tensor]


def split_attention(x: Tensor, weight: Tensor, table: tuple[Tensor, Tensor], plan: Plan, heads: int) -> Tensor:
    """Attention of the plan's queries (the first cells of the call) over all cells. Scale 1/sqrt(D). Differentiable once.

    x: [R, N, d]. weight: [3 * d, d], the projection to queries, keys and values. table: cosines and sines [R or 1, 1, N, D] of
    `rotary_table`. Returns [R, n, d], n = the plan's queries.
    """
    if torch.is_autocast_enabled("cpu"):  # inside a Function autocast is off: cast as it would
        x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))
    cos, sin = (t[:, 0, :, None, None, : t.shape[-1] // 2] for t in table)
    wide = torch.promote_types(cos.dtype, torch.float32)
    turn = torch.complex(cos.to(wide), sin.to(wide))
    return _SplitAttention.apply(x, _paired(weight, heads), turn, plan, heads)


def supported(x: Tensor) -> bool:
    """Whether `split_attention` serves this tensor: on CPU, outside torch.compile (which fuses the plain form itself)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _paired(weight: Tensor, heads: int) -> Tensor:
    """The projection's rows with the two numbers that a rotation mixes side by side: one complex number.

    Queries and keys change their order alike, so their products stay; values keep theirs.
    """
    half = weight.shape[0] // 6 // heads
    qk, v = weight.tensor_split((4 * half * heads,))
    return torch.cat((qk.unflatten(0, (2 * heads, 2, half)).transpose(1, 2).flatten(0, 2), v))


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turn: Tensor, plan: Plan, heads: int) -> Tensor:
        qkv = F.linear(x, weight).unflatten(2, (3, heads, -1))
        _turn(qkv[:, :, :2], turn)
        q, k, v = _by_head(qkv)
        mixed = x.new_empty(len(x), plan.segments[-1].stop, *qkv.shape[3:])
        out, kept, kernel = mixed.transpose(1, 2), [], _kernel(x)
        for s in plan.segments:
            out[:, :, s.start : s.stop], held = kernel.forward(q[:, :, s.start : s.stop], take(k, s.runs), take(v, s.runs), s.mask)
            kept.append(held)
        ctx.save_for_backward(x, weight, qkv, mixed, turn, *kept)
        ctx.plan = plan
        return mixed.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, qkv, mixed, turn, *kept = ctx.saved_tensors
        grad, kernel = torch.empty_like(qkv), _kernel(x)
        grad[:, :, 1:] = 0
        grad[:, mixed.shape[1] :, 0] = 0
        (q, k, v), (to_q, to_k, to_v) = _by_head(qkv), _by_head(grad)
        slopes, outs = upstream.view_as(mixed).transpose(1, 2), mixed.transpose(1, 2)
        for s, held in zip(ctx.plan.segments, kept, strict=True):
            slope, out, query = (t[:, :, s.start : s.stop] for t in (slopes, outs, q))
            to_q[:, :, s.start : s.stop], *pair = kernel.backward(slope, query, take(k, s.runs), take(v, s.runs), out, held, s.mask)
            for to, some in zip((to_k, to_v), pair, strict=True):
                for (a, b), part in zip(s.runs, some.split([b - a for a, b in s.runs], 2), strict=True):
                    to[:, :, a:b].add_(part)
        _turn(grad[:, :, :2], turn.conj_physical())
        flat = grad.view(-1, len(weight))
        return (flat @ weight).view_as(x), flat.mT @ x.flatten(0, 1), None, None, None


def _turn(x: Tensor, turn: Tensor) -> None:
    """Rotate the pairs of x [R, N, 2, H, D] in place: each is a complex number, turned by that of its position."""
    wide = x.to(turn.dtype.to_real())
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turn)
    if wide is not x:
        x.copy_(wide)


def _by_head(qkv: Tensor) -> Three:
    """Queries, keys and values of [R, N, 3, H, D] as views [R, H, N, D]."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return q, k, v


class _Fused:
    """The kernel behind `scaled_dot_product_attention` on CPU; keeps the log-normalisers."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)

    @staticmethod
    def backward(slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, held: Tensor, mask: Tensor | None) -> Three:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(slope, q, k, v, out, held, 0.0, False, attn_mask=mask)


class _Products:
    """Attention as matrix products; the probabilities are computed again."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return probabilities(q, k, mask) @ v, q.new_empty(0)

    @staticmethod
    def backward(slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, held: Tensor, mask: Tensor | None) -> Three:
        p = probabilities(q, k, mask)
        d = torch._softmax_backward_data(slope @ v.mT, p, -1, p.dtype)
        d *= q.shape[-1] ** -0.5
        return d @ k, d.mT @ q, p.mT @ slope


def _kernel(x: Tensor) -> type[_Fused] | type[_Products]:
    return _Products if x.dtype == torch.bfloat16 else _Fused
