"""Computes rotary positions and attention under a plan, for any forward pass.

In: queries, keys, values [R, H, N, D] and a plan from `core.visibility`. Out: attention outputs of
all heads, [R, Nq, d]. Uses SDPA; FlexAttention on CUDA for whole windows. `chunked_attention`
(training on CPU) and `ragged_batching` (inference form) do the same in fewer operations; tests hold
each to this module. Knows nothing about layers, caches or noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.visibility import Cells, Plan, chunked_plan, flex_mask


def rotary_table(
    position: Tensor, head_dim: int, dtype: torch.dtype, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary embeddings at any positions. int64 [R, N] -> two of [R, 1,
    N, D]."""
    frequency = base ** (
        -torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    )
    angle = position[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [R, H, N, D] by a table, in the rotate-half form."""
    cos, sin = table
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@dataclass(frozen=True)
class FlexPlan:
    """Hold a FlexAttention block mask for all queries of a forward pass."""

    mask: Any

    def truncated(self, count: int) -> FlexPlan:
        """Return the plan of the first `count` queries (rows of the tile map are cut; count must be
        a multiple of the tile)."""
        return FlexPlan(self.mask[:, :, : -(-count // self.mask.BLOCK_SIZE[0])])


AnyPlan = Plan | FlexPlan


def make_plan(
    query: Cells, key: Cells, dtype: torch.dtype, breaks: tuple[int, ...] = (), flex: bool = False
) -> AnyPlan:
    """Plan how queries attend to keys: in chunks, or by a FlexAttention mask with `flex` (CUDA)."""
    if not flex:
        return chunked_plan(query, key, dtype, breaks=breaks)
    from torch.nn.attention.flex_attention import create_block_mask

    query, key = query.one_row_if_equal(), key.one_row_if_equal()
    rows = max(query.rank.shape[0], key.rank.shape[0])
    rule = flex_mask(query, key)
    mask = create_block_mask(
        rule, None if rows == 1 else rows, None, len(query), len(key), device=str(query.rank.device)
    )
    return FlexPlan(mask)


class PlanCache:
    """Keep the plan of a model's last windows: in training most steps have the same layout as the
    one before.

    Making a plan takes 0.4 % of a step at 256 cells and 3 % at 4,096. A copy or a pickle of the
    model starts empty."""

    def __init__(self) -> None:
        # one tuple, so that threads do not mix the parts of two
        self._last: tuple[tuple[Any, ...], Cells, AnyPlan] | None = None

    def make(
        self, cells: Cells, dtype: torch.dtype, breaks: tuple[int, ...], flex: bool
    ) -> AnyPlan:
        """Return `make_plan` of cells that attend to each other."""
        cells, last = cells.one_row_if_equal(), self._last
        settings = (dtype, breaks, flex, cells.rank.device, torch.is_inference_mode_enabled())
        if last is not None and last[0] == settings and cells.equals(last[1]):
            return last[2]
        last = self._last = None  # free the old masks first
        # FlexAttention masks read the cells later, when the caller's may have changed
        own = cells.clone()
        plan = make_plan(own, own, dtype, breaks, flex)
        self._last = settings, own, plan
        return plan

    def __reduce__(self) -> tuple[type[PlanCache], tuple[()]]:
        return PlanCache, ()


_flex: Any = None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan | None) -> Tensor:
    """Attend from every query to its visible keys and join the heads; plan None: all keys are seen.
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
        kernel(q[:, :, s.start : s.stop], select_runs(k, s.runs), select_runs(v, s.runs), s.mask)
        for s in plan.segments
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention as two matrix products. On CPUs with bfloat16 instructions the fused
    kernel's backward is three times slower."""
    return probabilities(q, k, mask) @ v


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention probabilities [R, H, Nq, Nk] by a matrix product, in the inputs' dtype.
    mask: additive."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores += mask
    return scores.softmax(-1)


def select_runs(x: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Return the keys, or values, of some runs of cells, [R, H, n, D]: a view for a single run."""
    parts = [x[:, :, a:b] for a, b in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _flex_attend(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan) -> Tensor:
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex = torch.compile(flex_attention, dynamic=False)
    return _flex(q, k, v, block_mask=plan.mask)


def attention_weights(q: Tensor, k: Tensor, query: Cells, key: Cells) -> Tensor:
    """Compute the attention probabilities, mean over heads, float32 [R, Nq, Nk]. For decoders that
    read the attention."""
    from bdlm.core.visibility import sees

    scores = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~sees(query, key)[:, None], float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0).mean(1)
