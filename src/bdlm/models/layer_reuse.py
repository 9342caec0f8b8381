"""Reuses layers of the native backbone: a forward pass over some cells of a window, with the other
cells' activations kept from earlier passes.

In: a window whose cells all see each other (a full-sequence model), the activations that earlier
passes left in each layer, the cells that go through the layers, and a rule that decides layer by
layer what is computed again. Out: an `Out` for those cells, and a count of the work. Every part is
the layer's own (`Block.attention_input`, `attention_output`, `add_residuals`, `after_attention`);
this module only decides what is skipped. Knows nothing about steps of decoding: the caller decides
when to refresh.

Shapes: one row, L cells of the window, m cells of the pass, H heads, D width of a head, d width of
the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.types import Out, Step
from bdlm.models.attention import attend, rotary_table, rotate
from bdlm.models.dit import Block, DiT

PARTS = ("query", "key", "value", "attention", "mlp")
_QUERY, _KEY, _VALUE = range(3)

Table = tuple[Tensor, Tensor]
Mod = tuple[Tensor, ...] | None


@dataclass
class Work:
    """Count how much of each part was computed, in cells times layers; `full` is the count of each
    part without reuse.

    weights: multiply-adds of each part for one cell, in units of d^2, in the order of PARTS: a
    projection 1, the attention row with its output projection 1 + 2 L / d, the MLP 8."""

    weights: tuple[float, ...] = (1, 1, 1, 1, 8)
    full: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))

    def add(self, every: int = 0, **parts: int) -> None:
        """Count cells of one layer: `every` of each part, and more of some."""
        for part in PARTS:
            self.counts[part] += every + parts.get(part, 0)

    def share(self, part: str | None = None) -> float:
        """Return the computed share of one part, or of all multiply-adds, in [0, 1]."""
        if not self.full:
            return 0.0
        if part is not None:
            return self.counts[part] / self.full
        done = sum(w * self.counts[p] for w, p in zip(self.weights, PARTS, strict=True))
        return done / (self.full * sum(self.weights))


@dataclass
class LayerState:
    """Hold the activations that passes over one window left in one layer.

    queries, keys, values: [1, H, L, D], rotated, of each cell's last refresh.
    attention: [1, L, d], the projected attention.
    change: [1, L, d], what the whole layer added to the cell's state.
    first: whether it is the first layer."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor
    change: Tensor
    first: bool


class WindowState:
    """Hold the state of all layers for one window of `length` cells, and the work so far.
    `work.full` grows by L a layer at every pass."""

    def __init__(self, model: DiT, length: int) -> None:
        weight = model.backbone.vocab_embed.embedding
        width, heads = model.config.hidden_dim, model.config.n_heads
        rows = lambda: weight.new_zeros(1, heads, length, width // heads)
        cells = lambda: weight.new_zeros(1, length, width)
        self.layers = [
            LayerState(rows(), rows(), rows(), cells(), cells(), i == 0)
            for i in range(len(model.layers))
        ]
        self.length, self.work = length, Work((1, 1, 1, 1 + 2 * length / width, 8))


# x [1, m, d] -> x after the layer; arguments: layer, x, modulation, rotary table, layer state,
# cells, work
Rule = Callable[[Block, Tensor, Mod, Table, LayerState, Tensor, Work], Tensor]


@torch.inference_mode()
def reuse_step(model: DiT, step: Step, memo: WindowState, cells: Tensor, rule: Rule) -> Out:
    """Run one pass over some cells of a window.

    step: the whole window, one row.
    cells: int64 [m], ascending, those that go through the layers; all cells of `step.query_mask`
    are among them.
    Returns Out as `DiT.step`, for `step.query_mask`."""
    assert step.shape == (1, memo.length) and "layer_reuse" in model.spec.supports
    pick = lambda t: None if t is None else t.expand(step.shape)[:, cells]
    fields: dict[str, Any] = {
        n: pick(getattr(step, n))
        for n in ("ids", "position", "rank", "group", "limit", "doc", "query_mask", "time")
    }
    part = replace(step, **fields)
    c = model.condition(part)
    x = model.backbone.vocab_embed(part.ids)
    table = rotary_table(part.position, model.head_dim, x.dtype)
    for block, kept in zip(model.layers, memo.layers, strict=True):
        x = rule(block, x, block.modulation(c), table, kept, cells, memo.work)
    memo.work.full += memo.length * len(memo.layers)
    return model.output(x, c, part, x.shape[1], None)


def _project(block: Block, h: Tensor, part: int, table: Table) -> Tensor:
    """Project to queries, keys or values alone, [1, m, d] -> [1, H, m, D]; queries and keys are
    rotated."""
    x = (
        F.linear(h, block.attn_qkv.weight.chunk(3)[part])
        .unflatten(2, (block.heads, -1))
        .transpose(1, 2)
    )
    return x if part == _VALUE else rotate(x, table)


def _likeness(new: Tensor, old: Tensor) -> Tensor:
    """Return the cosine of each cell's vectors, all heads joined: two of [1, H, m, D] -> [m], at
    most 1."""
    join = lambda t: t.transpose(1, 2).flatten(2)[0]
    return F.cosine_similarity(join(new), join(old), dim=-1).clamp(max=1.0)


def _some(table: Table, pick: Tensor) -> Table:
    return table[0][:, :, pick], table[1][:, :, pick]


@dataclass(frozen=True)
class FullRefresh:
    """Compute every cell of the pass in full; the other cells of the window keep their keys and
    values."""

    def __call__(
        self,
        block: Block,
        x: Tensor,
        mod: Mod,
        table: Table,
        kept: LayerState,
        cells: Tensor,
        work: Work,
    ) -> Tensor:
        q, k, v = block.qkv(x, mod, table)
        kept.queries[:, :, cells] = q
        kept.keys[:, :, cells] = k
        kept.values[:, :, cells] = v
        a = block.attention_output(attend(q, kept.keys, kept.values, None))
        after = block.add_residuals(x, a, mod)
        kept.attention[:, cells], kept.change[:, cells] = a, after - x
        work.add(len(cells))
        return after


@dataclass(frozen=True)
class ByValue:
    """Update as dLLM-Cache does: compute the values of all cells, and in full the share `rho` whose
    values changed direction most.

    The other cells add to their state what the layer added at their last full computation.
    always: how many leading cells of the pass are computed in full in any case (a prompt that is
    due).
    Source: arXiv 2506.06295 and its code, which caches the attention's and the MLP's output
    separately; both are renewed together, so their sum is kept here."""

    rho: float
    always: int = 0

    def __call__(
        self,
        block: Block,
        x: Tensor,
        mod: Mod,
        table: Table,
        kept: LayerState,
        cells: Tensor,
        work: Work,
    ) -> Tensor:
        h = block.attention_input(x, mod)
        v = _project(block, h, _VALUE, table)
        near = _likeness(v, kept.values[:, :, cells])
        near[: self.always] = -2.0
        count = self.always + math.ceil(self.rho * (len(cells) - self.always))
        pick = near.topk(count, largest=False).indices.sort().values
        q, k = (_project(block, h[:, pick], part, _some(table, pick)) for part in (_QUERY, _KEY))
        kept.values[:, :, cells], kept.keys[:, :, cells[pick]] = v, k
        before, after = x[:, pick], x + kept.change[:, cells]
        after[:, pick] = block.after_attention(before, attend(q, kept.keys, kept.values, None), mod)
        kept.change[:, cells[pick]] = after[:, pick] - before
        work.add(count, value=len(cells) - count)
        return after


@dataclass(frozen=True)
class ByQuery:
    """Update as DARE does: compute the queries of all cells, and refresh a cell whose query has
    changed by at least `tau` since its last refresh.

    The change is 1 - cosine.
    fresh: bool [m], cells that are refreshed in any case.
    output: False keeps the key and value of the other cells. True computes those, and keeps the
    projected attention, except in the first layer: there a query depends on the cell's own token
    only, so its change does not tell what the cell sees; if that layer's attention were kept, no
    later query would ever change.
    Source: arXiv 2605.08134, its abstract; the test against a threshold, the cells that are always
    refreshed and that exception are inferred."""

    tau: float
    output: bool
    fresh: Tensor

    def __call__(
        self,
        block: Block,
        x: Tensor,
        mod: Mod,
        table: Table,
        kept: LayerState,
        cells: Tensor,
        work: Work,
    ) -> Tensor:
        h = block.attention_input(x, mod)
        q = _project(block, h, _QUERY, table)
        turned = 1 - _likeness(q, kept.queries[:, :, cells])
        pick = (self.fresh | (turned >= self.tau) | (self.output and kept.first)).nonzero()[:, 0]
        kept.queries[:, :, cells[pick]] = q[:, :, pick]
        renewed = torch.arange(len(cells), device=x.device) if self.output else pick
        k, v = (
            _project(block, h[:, renewed], part, _some(table, renewed)) for part in (_KEY, _VALUE)
        )
        kept.keys[:, :, cells[renewed]], kept.values[:, :, cells[renewed]] = k, v
        rows = pick if self.output else torch.arange(len(cells), device=x.device)
        if len(rows):
            kept.attention[:, cells[rows]] = block.attention_output(
                attend(q[:, :, rows], kept.keys, kept.values, None)
            )
        work.add(
            query=len(cells),
            key=len(renewed),
            value=len(renewed),
            attention=len(rows),
            mlp=len(cells),
        )
        return block.add_residuals(x, kept.attention[:, cells], mod)
