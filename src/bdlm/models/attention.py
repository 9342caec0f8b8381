"""Rotary positions and attention under a plan, for any pass; the plain form of what `split`
(training on CPU) and `packing` (folded inference) do in fewer operations, each held to it by tests.

In: queries, keys, values [R, H, N, D] and a plan from `core.visibility`. Out: mixed values of all
heads, [R, Nq, d]. SDPA everywhere; FlexAttention on CUDA for whole windows. Knows nothing about
layers, caches or noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.visibility import Cells, Plan, flex_rule, split_plan


def rotary_table(
    position: Tensor, head_dim: int, dtype: torch.dtype, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings at any positions. int64 [R, N] -> two of [R, 1, N,
    D]."""
    frequency = base ** (
        -torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    )
    angle = position[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half form, [R, H, N, D]."""
    cos, sin = table
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@dataclass(frozen=True)
class FlexPlan:
    """A FlexAttention block mask for all queries of a call."""

    mask: Any

    def leading(self, count: int) -> FlexPlan:
        """The plan of the first `count` queries (rows of the tile map are cut; count must be a
        multiple of the tile)."""
        return FlexPlan(self.mask[:, :, : -(-count // self.mask.BLOCK_SIZE[0])])


AnyPlan = Plan | FlexPlan


def make_plan(
    query: Cells, key: Cells, dtype: torch.dtype, breaks: tuple[int, ...] = (), flex: bool = False
) -> AnyPlan:
    """How a call attends: split form, or a FlexAttention mask where `flex` (CUDA)."""
    if not flex:
        return split_plan(query, key, dtype, breaks=breaks)
    from torch.nn.attention.flex_attention import create_block_mask

    query, key = query.one_row_if_equal(), key.one_row_if_equal()
    rows = max(query.rank.shape[0], key.rank.shape[0])
    rule = flex_rule(query, key)
    mask = create_block_mask(
        rule, None if rows == 1 else rows, None, len(query), len(key), device=str(query.rank.device)
    )
    return FlexPlan(mask)


class LastPlan:
    """The plan of a model's last windows: in training those of the next step are mostly laid out
    alike.

    A plan takes 0.4 % of a step at 256 cells and 3 % at 4,096. Neither copied nor pickled with its
    model."""

    def __init__(self) -> None:
        # one value, so that threads do not mix two
        self._last: tuple[tuple[Any, ...], Cells, AnyPlan] | None = None

    def make(
        self, cells: Cells, dtype: torch.dtype, breaks: tuple[int, ...], flex: bool
    ) -> AnyPlan:
        """`make_plan` of cells that attend to each other."""
        cells, last = cells.one_row_if_equal(), self._last
        asked = (dtype, breaks, flex, cells.rank.device, torch.is_inference_mode_enabled())
        if last is not None and last[0] == asked and cells.same(last[1]):
            return last[2]
        last = self._last = None  # its masks go before there are others
        # a FlexAttention mask reads them again later, when the caller's may have changed
        own = cells.clone()
        plan = make_plan(own, own, dtype, breaks, flex)
        self._last = asked, own, plan
        return plan

    def __reduce__(self) -> tuple[type[LastPlan], tuple[()]]:
        return LastPlan, ()


_flex: Any = None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan | None) -> Tensor:
    """Attention of every query over its visible keys, the heads joined; plan None: all keys seen.
    Scale 1/sqrt(D)."""
    return _by_head(q, k, v, plan).transpose(1, 2).flatten(2)


def _by_head(q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan | None) -> Tensor:
    if plan is None:
        return F.scaled_dot_product_attention(q, k, v)
    if isinstance(plan, FlexPlan):
        return _flex_attend(q, k, v, plan)
    kernel = (
        _matmul_attention
        if q.dtype == torch.bfloat16 and q.device.type == "cpu"
        else F.scaled_dot_product_attention
    )
    parts = [
        kernel(q[:, :, s.start : s.stop], take(k, s.runs), take(v, s.runs), s.mask)
        for s in plan.segments
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as two matrix products. On CPUs with bfloat16 instructions the fused kernel's
    backward is three times slower."""
    return probabilities(q, k, mask) @ v


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Attention probabilities [R, H, Nq, Nk] by a matrix product, in the inputs' dtype. mask:
    additive."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores += mask
    return scores.softmax(-1)


def take(x: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """The keys, or values, of some runs of cells, [R, H, n, D]: a view where they are one run."""
    parts = [x[:, :, a:b] for a, b in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _flex_attend(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan) -> Tensor:
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex = torch.compile(flex_attention, dynamic=False)
    return _flex(q, k, v, block_mask=plan.mask)


def attention_weights(q: Tensor, k: Tensor, query: Cells, key: Cells) -> Tensor:
    """The attention probabilities themselves, mean over heads, float32 [R, Nq, Nk]. For decoders
    that look at attention."""
    from bdlm.core.visibility import sees

    scores = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~sees(query, key)[:, None], float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0).mean(1)
