"""Cross-entropy of a linear head without the logits: hidden states and weights in, -log p of the
targets out.

The head is the largest tensor of training with a large vocabulary: M x V logits, their softmax and
their gradient. Here they exist one chunk of rows at a time. Two forms of the same function:

    linear_cross_entropy            any use of the losses afterwards; backward keeps or recomputes the softmax (3 or 4 products)
    weighted_linear_cross_entropy   the losses' factors are known beforehand, as in diffusion: the gradient is formed in the
                                    forward pass (3 products, nothing of size V kept but the
                                    gradient of the weights)

Products run in autocast's dtype where it is on, softmax and losses in float32 or better. Knows
nothing about noise or models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits held at once: 16 MiB in float32; smaller chunks starve the products, larger ones leave the
# cache
BUFFER = 1 << 22
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
    return _Losses.apply(hidden, weight, bias, target, forbid, _rows(weight, chunk))


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
        hidden, weight, bias, target, factor, forbid, _rows(weight, chunk)
    )
    return total, nll


def _rows(weight: Tensor, chunk: int | None) -> int:
    return max(16, BUFFER // weight.shape[0]) if chunk is None else max(1, chunk)


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

    def log_normalised(self, part: slice) -> tuple[Tensor, Tensor]:
        """Logits of a chunk in float32 or better, and their log-normaliser [m, 1]."""
        h = self.hidden[part]
        logits = (
            h @ self.weight.T if self.bias is None else torch.addmm(self.bias, h, self.weight.T)
        ).to(self.exact)
        if self.forbid is not None:
            logits[:, self.forbid] = float("-inf")
        return logits, logits.logsumexp(-1, keepdim=True)


class _Gradients:
    """Sums of the gradients of one head, fed d(loss)/d(logits) a chunk at a time."""

    def __init__(self, head: _Head, needed: tuple[bool, bool, bool]) -> None:
        self.head = head
        wide = {"dtype": head.exact, "device": head.weight.device}
        self.hidden = torch.empty_like(head.hidden) if needed[0] else None
        self.weight = torch.zeros(head.weight.shape, **wide) if needed[1] else None  # type: ignore[call-overload]
        self.bias = torch.zeros(head.weight.shape[0], **wide) if needed[2] else None  # type: ignore[call-overload]

    def add(self, part: slice, slope: Tensor) -> None:
        """slope: d(loss)/d(logits) of the chunk, [m, V]."""
        if self.bias is not None:
            self.bias += slope.sum(0)
        slope = slope.to(self.head.hidden.dtype)
        if self.hidden is not None:
            torch.mm(slope, self.head.weight, out=self.hidden[part])
        if self.weight is None:
            return
        if self.weight.dtype == slope.dtype:
            self.weight.addmm_(slope.T, self.head.hidden[part])
        else:
            self.weight += slope.T @ self.head.hidden[part]


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
            logits, norm = head.log_normalised(part)
            picked = target[part, None]
            nll[part] = (norm - logits.gather(1, picked))[:, 0]
            if sums is not None:
                slope = logits.sub_(norm).exp_()
                slope.scatter_add_(1, picked, torch.full_like(norm, -1.0))
                sums.add(part, slope.mul_(factor[part, None]))
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
        norms, kept = torch.empty_like(nll), []
        for part in head.chunks():
            logits, norm = head.log_normalised(part)
            nll[part] = (norm - logits.gather(1, target[part, None]))[:, 0]
            norms[part] = norm[:, 0]
            if keep:
                kept.append(logits.sub_(norm).exp_())
        ctx.save_for_backward(hidden, weight, bias, target, norms, *kept)
        ctx.settings = dtype, forbid, rows
        return nll

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, target, norms, *kept = ctx.saved_tensors
        head = _Head(hidden, weight, bias, *ctx.settings)
        sums = _Gradients(head, ctx.needs_input_grad[:3])
        for i, part in enumerate(head.chunks()):
            slope = (
                kept[i].clone()
                if kept
                else head.log_normalised(part)[0].sub_(norms[part, None]).exp_()
            )
            slope.scatter_add_(1, target[part, None], torch.full_like(norms[part, None], -1.0))
            sums.add(part, slope.mul_(upstream[part, None]))
        return (
            _cast(sums.hidden, hidden),
            _cast(sums.weight, weight),
            _cast(sums.bias, bias),
            None,
            None,
            None,
        )
