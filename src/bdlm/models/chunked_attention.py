"""Split attention of whole windows on CPU: rotary positions and every call of a plan as one
differentiable operation.

In: states and their projection to queries, keys and values, a rotary table and a `Plan`. Out: mixed
values, cell by cell. Through autograd each slice of the keys would fill a zero tensor of their
whole length, and each rotation make five; here rotations are in place, and gradients are put where
the projection takes them back, added up only where several calls saw a cell. Calls that see cells
of their own beside common ones share one copy of these. The kernels are those of SDPA, and plain
products where numbers are bfloat16 (SDPA's backward is three times slower there). Knows nothing
about layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdlm.core.visibility import Plan
from bdlm.models.attention import probabilities

Three = tuple[Tensor, Tensor, Tensor]


def split_attention(
    x: Tensor, weight: Tensor, turns: tuple[Tensor, Tensor], plan: Plan, heads: int
) -> Tensor:
    """Attention of the plan's queries (the first cells of the call) over all cells. Scale
    1/sqrt(D). Differentiable once.

    x: [R, N, d]. weight: [3 * d, d], the projection to queries, keys and values. turns: of `turns`.
    Returns [R, n, d], n = the plan's queries."""
    if torch.is_autocast_enabled("cpu"):  # inside a Function autocast is off: cast as it would
        x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))
    return _SplitAttention.apply(x, weight, turns, plan, heads)


def supported(x: Tensor) -> bool:
    """Whether `split_attention` serves this tensor: on CPU, outside torch.compile (which fuses the
    plain form itself)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def turns(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What pairs of numbers are multiplied by, and its inverse: complex [R or 1, N, 1, 1, D / 2].

    table: cosines and sines [R or 1, 1, N, D] of `rotary_table`.
    """
    cos, sin = (t[:, 0, :, None, None, : t.shape[-1] // 2] for t in table)
    wide = torch.promote_types(cos.dtype, torch.float32)
    turn = torch.complex(cos.to(wide), sin.to(wide))
    return turn, turn.conj_physical()


def _paired(weight: Tensor, heads: int, back: bool = False) -> Tensor:
    """The projection's rows with the two numbers that a rotation mixes side by side: one complex
    number. back: the inverse.

    Queries and keys change their order alike, so their products stay; values keep theirs.
    """
    half, out = weight.shape[0] // 6 // heads, torch.empty_like(weight)
    (qk, v), (to_qk, to_v) = (t.tensor_split((4 * half * heads,)) for t in (weight, out))
    to_v.copy_(v)
    pair = (half, 2) if back else (2, half)
    to_qk.view(2 * heads, *reversed(pair), -1).copy_(
        qk.unflatten(0, (2 * heads, *pair)).transpose(1, 2)
    )
    return out


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, turns: tuple[Tensor, Tensor], plan: Plan, heads: int
    ) -> Tensor:
        weight = _paired(weight, heads)
        qkv = F.linear(x, weight).unflatten(2, (3, heads, -1))
        _turn(qkv[:, :, :2], turns[0])
        q, kv = _by_head(qkv)
        forward, each = (
            _kernel(x).forward,
            zip(plan.segments, _parts(q, plan), _seen(kv, plan), strict=True),
        )
        calls = [forward(query, seen[0], seen[1], s.mask) for s, query, seen in each]
        mixed = torch.cat([out.transpose(1, 2) for out, _ in calls], 1)
        ctx.save_for_backward(x, weight, qkv, mixed, turns[1], *(held for _, held in calls))
        ctx.plan = plan
        return mixed.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, qkv, mixed, turn, *kept = ctx.saved_tensors
        grad, kernel, plan, written = (
            torch.empty_like(qkv),
            _kernel(x),
            ctx.plan,
            bytearray(x.shape[1]),
        )
        grad[:, mixed.shape[1] :, 0] = 0
        (q, kv), (to_q, to_kv) = _by_head(qkv), _by_head(grad)
        slopes, outs = (_parts(t.transpose(1, 2), plan) for t in (upstream.view_as(mixed), mixed))
        calls = zip(
            plan.segments, kept, slopes, outs, _parts(q, plan), _parts(to_q, plan), strict=True
        )
        # the last segments first: they see the most cells, whose gradients are then written rather
        # than added up
        for (s, held, slope, out, query, to), seen in zip(
            reversed(list(calls)), _seen(kv, plan, back=True), strict=True
        ):
            to_query, *to_seen = kernel.backward(slope, query, seen[0], seen[1], out, held, s.mask)
            to.copy_(to_query)
            _put(to_kv, to_seen, s.runs, written)
        _clear(to_kv, written, 0, len(written))
        _turn(grad[:, :, :2], turn)
        flat = grad.view(-1, len(weight))
        return (
            (flat @ weight).view_as(x),
            _paired(flat.mT @ x.flatten(0, 1), qkv.shape[3], back=True),
            None,
            None,
            None,
        )


def _turn(x: Tensor, turn: Tensor) -> None:
    """Rotate the pairs of x [R, N, 2, H, D] in place: each is a complex number, turned by that of
    its position."""
    wide = x.to(turn.dtype.to_real())
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turn)
    if wide is not x:
        x.copy_(wide)


def _by_head(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [R, H, N, D], and keys and values [2, R, H, N, D], of [R, N, 3, H, D] as views."""
    parts = qkv.permute(2, 0, 3, 1, 4)
    return parts[0], parts[1:]


def _parts(x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """The queries of each segment, of x [R, H, N, D]."""
    return x[:, :, : plan.segments[-1].stop].split([s.stop - s.start for s in plan.segments], 2)


def _seen(kv: Tensor, plan: Plan, back: bool = False) -> Iterator[Tensor]:
    """The keys and values that each segment sees, [2, R, H, n, D], in order or from the last one
    back; valid until the next.

    Segments that see cells of their own before a run that starts where the others' does share one
    copy of it."""
    rooms: dict[int, tuple[Tensor, int]] = {}
    for s in reversed(plan.segments) if back else plan.segments:
        *own, (start, stop) = s.runs
        if not own:
            yield kv[:, :, :, start:stop]
            continue
        if start not in rooms:
            same = [t for t in plan.segments if len(t.runs) > 1 and t.runs[-1][0] == start]
            end = max(t.runs[-1][1] for t in same)
            first = max(t.keys - (t.runs[-1][1] - start) for t in same)
            room = kv.new_empty(*kv.shape[:3], first + end - start, kv.shape[4])
            room[:, :, :, first:] = kv[:, :, :, start:end]
            rooms[start] = room, first
        room, first = rooms[start]
        at = first
        for a, b in reversed(own):
            at -= b - a
            room[:, :, :, at : at + b - a] = kv[:, :, :, a:b]
        yield room[:, :, :, at : first + stop - start]


def _put(
    to: Tensor, parts: list[Tensor], runs: tuple[tuple[int, int], ...], written: bytearray
) -> None:
    """Add gradients of the keys and values of some runs, [R, H, n, D] each, to those of all cells
    [2, R, H, N, D].

    written: which cells hold something already; updated.
    """
    sizes, fresh = [b - a for a, b in runs], [1 not in written[a:b] for a, b in runs]
    for (a, b), new in zip(runs, fresh, strict=True):
        if not new:
            _clear(to, written, a, b)
        written[a:b] = b"\1" * (b - a)
    for some, part in zip(to, parts, strict=True):
        for (a, b), new, piece in zip(runs, fresh, part.split(sizes, 2), strict=True):
            there = some[:, :, a:b]
            there.copy_(piece) if new else there.add_(piece)


def _clear(to: Tensor, written: bytearray, start: int, stop: int) -> None:
    """Zero the gradients of those of the cells [start, stop) that hold nothing yet."""
    while (hole := written.find(0, start, stop)) >= 0:
        end = written.find(1, hole, stop)
        end = stop if end < 0 else end
        to[:, :, :, hole:end] = 0
        written[hole:end] = b"\1" * (end - hole)


class _Fused:
    """The kernel behind `scaled_dot_product_attention` on CPU; keeps the log-normalisers."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask
        )

    @staticmethod
    def backward(
        slope: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        held: Tensor,
        mask: Tensor | None,
    ) -> Three:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(slope, q, k, v, out, held, 0.0, False, attn_mask=mask)


class _Products:
    """Attention as matrix products; the probabilities are computed again."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return probabilities(q, k, mask) @ v, q.new_empty(0)

    @staticmethod
    def backward(
        slope: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        held: Tensor,
        mask: Tensor | None,
    ) -> Three:
        p = probabilities(q, k, mask)
        d = torch._softmax_backward_data(slope @ v.mT, p, -1, p.dtype)
        d *= q.shape[-1] ** -0.5
        return d @ k, d.mT @ q, p.mT @ slope


def _kernel(x: Tensor) -> type[_Fused] | type[_Products]:
    return _Products if x.dtype == torch.bfloat16 else _Fused
