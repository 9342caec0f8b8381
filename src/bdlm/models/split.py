"""Split attention for training: rotary positions and every attention call of a plan as one differentiable operation.

In: packed queries, keys and values as the projection leaves them, a rotary table and a `Plan`. Out: mixed values, token by token.
Autograd through slices would fill a zero tensor of the whole length for every slice and keep a copy of every key range; here the
gradients are summed in place and only rotated queries, keys, values and the output are kept. Two kernels: SDPA's own on CPU, and plain
matrix products where numbers are bfloat16 (SDPA's backward is three times slower there). Knows nothing about layers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdlm.core.visibility import Plan, Segment

KEEP = 1 << 24  # bytes of attention probabilities that one call keeps for backward; above, they are computed again

Table = tuple[Tensor, Tensor]


def split_attention(qkv: Tensor, table: Table, plan: Plan, heads: int) -> Tensor:
    """Attention of the plan's queries (the first cells of the call) over all cells.

    qkv: [R, N, 3 * d], not yet rotated. table: cosines and sines [R or 1, 1, N, D]. Returns [R, n, d], n = the plan's last query.
    """
    return _SplitAttention.apply(qkv, *table, plan, heads)


def supported(x: Tensor) -> bool:
    """Whether `split_attention` serves this tensor: on CPU, outside torch.compile (which fuses the plain form itself)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and (x.dtype == torch.bfloat16 or _HAS_KERNEL)


def turn(x: Tensor, table: Table, out: Tensor, back: bool = False) -> Tensor:
    """Rotate-half form of [R, H, N, D] into `out`; `back` turns the other way (the gradient)."""
    cos, sin = table
    half, sign = x.shape[-1] // 2, -1 if back else 1
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


class _SplitAttention(torch.autograd.Function):
    """Forward and backward over the segments of a plan."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, plan: Plan, heads: int) -> Tensor:
        rows, cells, width = qkv.shape
        count, size = plan.segments[-1].stop, width // 3 // heads
        raw = qkv.view(rows, cells, 3, heads, size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.new_empty(rows, heads, count, size), qkv.new_empty(rows, heads, cells, size), raw[2].contiguous()
        turn(raw[0, :, :, :count], _first((cos, sin), count), q)
        turn(raw[1], (cos, sin), k)
        kernel = Products() if qkv.dtype == torch.bfloat16 else Fused()
        mixed = qkv.new_empty(rows, count, heads, size)
        kept = []
        for s in plan.segments:
            out, held = kernel.forward(q[:, :, s.start : s.stop], take(k, s), take(v, s), s.mask)
            mixed[:, s.start : s.stop] = out.transpose(1, 2)
            kept.append(held)
        ctx.save_for_backward(q, k, v, mixed, cos, sin, *kept)
        ctx.plan, ctx.kernel = plan, kernel
        return mixed.view(rows, count, heads * size)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        q, k, v, mixed, cos, sin, *kept = ctx.saved_tensors
        rows, heads, cells, size = k.shape
        count = q.shape[2]
        upstream = upstream.view(rows, count, heads, size).transpose(1, 2)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for s, held in zip(ctx.plan.segments, kept, strict=True):
            mine = slice(s.start, s.stop)
            out = mixed[:, mine].transpose(1, 2)
            dq, dk, dv = ctx.kernel.backward(upstream[:, :, mine], q[:, :, mine], take(k, s), take(v, s), out, held, s.mask)
            grad_q[:, :, mine] = dq
            begin = 0
            for a, b in s.runs:
                grad_k[:, :, a:b] += dk[:, :, begin : begin + b - a]
                grad_v[:, :, a:b] += dv[:, :, begin : begin + b - a]
                begin += b - a
        grad = q.new_empty(rows, cells, 3, heads, size)
        packed = grad.permute(2, 0, 3, 1, 4)
        turn(grad_q, _first((cos, sin), count), packed[0, :, :, :count], back=True)
        packed[0, :, :, count:] = 0
        turn(grad_k, (cos, sin), packed[1], back=True)
        packed[2] = grad_v
        return grad.view(rows, cells, -1), None, None, None, None


def _first(table: Table, count: int) -> Table:
    return table[0][:, :, :count], table[1][:, :, :count]


def take(x: Tensor, segment: Segment) -> Tensor:
    """The keys (or values) of a segment: a view where they are one run."""
    parts = [x[:, :, a:b] for a, b in segment.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Kernel(Protocol):
    """One attention call and its gradient. [R, H, n, D] each; `held` is what forward keeps."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, held: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


_HAS_KERNEL = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")


class Fused:
    """The kernel behind `scaled_dot_product_attention` on CPU; keeps the log-normalisers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)

    def backward(
        self, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, held: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(upstream, q, k, v, out, held, 0.0, False, attn_mask=mask)


class Products:
    """Attention as matrix products; keeps the probabilities where they are small."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        p = self._probabilities(q, k, mask)
        return p @ v, p if p.nbytes <= KEEP else p.new_empty(0)

    def backward(
        self, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, held: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = held if held.numel() else self._probabilities(q, k, mask)
        upstream = upstream.contiguous()
        slope = torch.ops.aten._softmax_backward_data(upstream @ v.mT, p, -1, p.dtype)
        slope *= q.shape[-1] ** -0.5
        return slope @ k, slope.mT @ q, p.mT @ upstream

    def _probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if mask is not None:
            scores += mask
        return scores.softmax(-1)
