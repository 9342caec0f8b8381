"""Cross-entropy of a linear head without the logits: hidden states and weights in, -log p of the
targets out.

The head is the largest tensor of training with a large vocabulary: M x V logits, their softmax and
their gradient. Here they exist one chunk of rows at a time. Two forms of the same function:

    linear_cross_entropy            for any use of the losses afterwards; backward keeps the softmax
                                    (3 products) or recomputes it (4)
    weighted_linear_cross_entropy   for losses that a known factor weights, as in diffusion: the
                                    forward pass computes the gradient (3 products), and nothing of
                                    size V is kept but the gradient of the weights

Products run in autocast's dtype where it is on, softmax and losses in float32 or better. This
module knows nothing about noise or models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits held at once: 16 MiB in float32; smaller chunks starve the products, larger ones gain
# nothing and cost memory
BUFFER = 1 << 22
# columns of logits that one product computes on CPU: BLAS copies that part of the weights to
# transpose it, and the copy stays in the cache
TILE = 512
# a softmax of at most this many numbers is kept for backward, a larger one is recomputed
KEEP = 1 << 22


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    forbid: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """-log softmax(hidden @ weight.T + bias)[target], in nats: float32 [M] (float64 for float64
    inputs).

    hidden: [M, d]. weight: [V, d]. bias: [V] or None. target: int64 [M].
    forbid: an id whose probability is zero (the mask token, SUBS: arXiv 2503.09573 B.3); its loss
    as a target is infinite.
    chunk: rows of logits held at once; by default as many as fit 16 MiB."""
    return _Losses.apply(hidden, weight, bias, target, forbid, _rows(hidden, weight, chunk))


def weighted_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    forbid: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of factor * nll, nll): the sum carries the gradient, which is formed here and only
    scaled in backward; nll is detached.

    factor: [M], what each loss counts for, held constant (`NoisedBatch.weight` over the number of
    scored tokens). Other arguments, and nll, as in `linear_cross_entropy`. Returns a scalar and
    [M]."""
    total, nll = _WeightedSum.apply(
        hidden, weight, bias, target, factor, forbid, _rows(hidden, weight, chunk)
    )
    return total, nll


def _rows(hidden: Tensor, weight: Tensor, chunk: int | None) -> int:
    """Rows of each chunk: by default chunks of equal size, as few as the buffer allows."""
    if chunk is not None:
        return max(1, chunk)
    count, most = max(1, hidden.shape[0]), max(16, BUFFER // weight.shape[0])
    return -(-count // -(-count // most))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _Head:
    """The head's tensors in the dtype of its products, and what is done a chunk at a time."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        forbid: int | None,
        rows: int,
    ) -> None:
        self.hidden, self.weight, self.forbid, self.rows = (
            hidden.to(dtype),
            weight.to(dtype),
            forbid,
            rows,
        )
        self.bias = None if bias is None else bias.to(dtype)
        self.exact = torch.promote_types(dtype, torch.float32)

    def chunks(self) -> list[slice]:
        count = self.hidden.shape[0]
        return [slice(a, min(a + self.rows, count)) for a in range(0, count, self.rows)]

    def logits(self, part: slice) -> Tensor:
        """Logits of a chunk in float32 or better, [m, V]."""
        h, size = self.hidden[part], self.weight.shape[0]
        out = torch.empty(h.shape[0], size, dtype=h.dtype, device=h.device)
        step = TILE if h.is_cpu else size
        for start in range(0, size, step):
            tile = slice(start, start + step)
            if self.bias is None:
                torch.mm(h, self.weight[tile].T, out=out[:, tile])
            else:
                torch.addmm(self.bias[tile], h, self.weight[tile].T, out=out[:, tile])
        out = out.to(self.exact)
        if self.forbid is not None:
            out[:, self.forbid] = float("-inf")
        return out

    def softmax(self, part: slice, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk's softmax up to a factor [m, V], the sums that it is to be divided by [m, 1], and
        -log p of the targets [m]."""
        logits = self.logits(part)
        picked = logits.gather(1, target[part, None])
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        return weights, total, (total.log() + top - picked)[:, 0]


class _Gradients:
    """Sums of the gradients of one head, fed the softmax a chunk at a time."""

    def __init__(self, head: _Head, needed: tuple[bool, bool, bool]) -> None:
        self.head = head
        wide: Any = {"dtype": head.exact, "device": head.weight.device}
        # the first chunk writes the gradient of the weights, the others add to it
        self.fresh = head.hidden.shape[0] > 0
        new = torch.empty if self.fresh else torch.zeros
        self.hidden = torch.empty_like(head.hidden) if needed[0] else None
        weight, bias = head.weight, head.weight[:, 0]
        self.weight = new(weight.shape, **wide) if needed[1] else None
        self.bias = torch.zeros(bias.shape, **wide) if needed[2] else None

    def add(
        self, part: slice, weights: Tensor, total: Tensor, target: Tensor, factor: Tensor
    ) -> None:
        """Add those of a chunk, given what `_Head.softmax` returns; `weights` is used up.

        factor: [M], the derivative by each loss. That by the logits is factor * (softmax - 1 at the
        target); its factors of a whole row go into the narrow sides of the products."""
        weights.scatter_add_(1, target[part, None], -total)
        scale, h = factor[part, None] / total, self.head.hidden[part]
        if self.bias is not None:
            self.bias.addmv_(weights.T, scale[:, 0])
        if weights.dtype == h.dtype:
            scaled = h * scale
        else:
            weights, scaled = weights.mul_(scale).to(h.dtype), h
        if self.hidden is not None:
            torch.mm(weights, self.head.weight, out=self.hidden[part])
            if scaled is not h:
                self.hidden[part] *= scale
        if self.weight is not None:
            self._add_to_weight(weights, scaled)

    def _add_to_weight(self, slope: Tensor, hidden: Tensor) -> None:
        assert self.weight is not None
        fresh, self.fresh = self.fresh, False
        if self.weight.dtype != slope.dtype:
            product = slope.T @ hidden
            self.weight = self.weight.copy_(product) if fresh else self.weight.add_(product)
        elif fresh:
            torch.mm(slope.T, hidden, out=self.weight)
        else:
            self.weight.addmm_(slope.T, hidden)


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


class _WeightedSum(torch.autograd.Function):
    """Sum of factor * nll with its gradient formed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        factor: Tensor,
        forbid: int | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, bias, _compute_dtype(hidden), forbid, rows)
        needed = ctx.needs_input_grad[:3]
        sums = _Gradients(head, needed) if any(needed) else None
        nll = torch.empty(hidden.shape[0], dtype=head.exact, device=hidden.device)
        factor = factor.to(head.exact)
        for part in head.chunks():
            weights, total, nll[part] = head.softmax(part, target)
            if sums is not None:
                sums.add(part, weights, total, target, factor)
            del weights  # before the next chunk
        ctx.mark_non_differentiable(nll)
        if sums is not None:
            ctx.gradients = (
                _cast(sums.hidden, hidden),
                _cast(sums.weight, weight),
                _cast(sums.bias, bias),
            )
        return (factor * nll).sum(), nll

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, scale: Tensor, _nll: Tensor) -> tuple[Any, ...]:
        # the gradients are made once: scaling them in place keeps a second copy of the weights'
        # size away
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "a weighted_linear_cross_entropy is differentiated once; use linear_cross_entropy"
                " to go twice"
            )
        if not scale.is_cpu or scale.item() != 1:
            gradients = tuple(g if g is None else g.mul_(scale) for g in gradients)
        return *gradients, None, None, None, None


class _Losses(torch.autograd.Function):
    """nll with the softmax kept (small) or recomputed (large) for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        forbid: int | None,
        rows: int,
    ) -> Tensor:
        dtype = _compute_dtype(hidden)
        head = _Head(hidden, weight, bias, dtype, forbid, rows)
        keep = any(ctx.needs_input_grad[:3]) and hidden.shape[0] * weight.shape[0] <= KEEP
        nll = torch.empty(hidden.shape[0], dtype=head.exact, device=hidden.device)
        kept = []
        for part in head.chunks():
            weights, total, nll[part] = head.softmax(part, target)
            if keep:
                kept += [weights, total]
            del weights  # before the next chunk
        ctx.save_for_backward(hidden, weight, bias, target, *kept)
        ctx.settings = dtype, forbid, rows
        return nll

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, target, *kept = ctx.saved_tensors
        head = _Head(hidden, weight, bias, *ctx.settings)
        sums = _Gradients(head, ctx.needs_input_grad[:3])
        for i, part in enumerate(head.chunks()):
            if kept:
                weights, total = kept[2 * i].clone(), kept[2 * i + 1]
            else:
                weights, total, _ = head.softmax(part, target)
            sums.add(part, weights, total, target, upstream)
            del weights  # before the next chunk
        return (
            _cast(sums.hidden, hidden),
            _cast(sums.weight, weight),
            _cast(sums.bias, bias),
            None,
            None,
            None,
        )
