"""The paper's transformer (DiT with rotary positions and adaLN), with the published weight names.

In: a `Step`. Out: an `Out`. One trunk serves the two-stream training pass, the cached pass, MDLM,
SEDD and AR; they differ in the step's visibility and the config. Knows nothing about schedules,
losses or sampling.

Names under `backbone.` are those of the released checkpoints: vocab_embed.embedding,
sigma_map.mlp.*, blocks.{i}.{norm1, attn_qkv, attn_out, norm2, mlp.0, mlp.2, adaLN_modulation},
output_layer.{norm_final, linear, adaLN_modulation}."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bdlm.core.types import ModelSpec, Out, Step
from bdlm.core.visibility import Cells, Plan, join
from bdlm.models import chunked_attention
from bdlm.models.attention import (
    AnyPlan,
    PlanCache,
    attend,
    attention_weights,
    make_plan,
    rotary_table,
)
from bdlm.models.cache import KVCache
from bdlm.models.dit_layers import Backbone, Block, DiTConfig, Table, first_cells
from bdlm.models.embedding import Embedding
from bdlm.models.fused_mlp import Norm

__all__ = ["Block", "DiT", "DiTConfig", "Embedding", "Norm"]

SIGMA_MAX = 1 - 1e-3  # highest mask probability, so that sigma stays finite


class DiT(nn.Module):
    """Predict clean tokens with the native transformer; `step` is its forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self._assemble(config)

    def _assemble(self, config: DiTConfig) -> None:
        self.backbone = Backbone(config)
        self.gradient_checkpointing = False
        self.layer_call: Any = None  # a compiled form of Block.forward, set by `compile_trunk`
        self._plan_cache = PlanCache()
        self._spec = config.spec()

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def layers(self) -> list[Block]:
        """Return the transformer layers, in order."""
        return list(self.backbone.blocks)  # type: ignore[arg-type]

    @property
    def head_dim(self) -> int:
        return self.config.hidden_dim // self.config.n_heads

    def new_cache(self, rows: int, capacity: int, slack: int | None = None) -> KVCache:
        """Return an empty cache of `capacity` cells a row, in the dtype and on the device of the
        weights."""
        weight = self.backbone.vocab_embed.embedding
        slack = 2 * min(self.spec.block_size, capacity) if slack is None else slack
        return KVCache(
            self.config.n_blocks,
            rows,
            self.config.n_heads,
            self.head_dim,
            capacity,
            slack,
            weight.dtype,
            weight.device,
        )

    def compile_trunk(self, **options: Any) -> None:
        """Compile the layers of the uncached pass (static shapes, head outside). Rounding may
        differ from eager mode."""
        # graphs for the last layer, padded batches and each layout exceed the default limit
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.layer_call = torch.compile(Block.forward, dynamic=False, **options)

    def forward(self, step: Step, cache: KVCache | None = None) -> Out:
        return self.step(step, cache)

    def step(self, step: Step, cache: KVCache | None = None) -> Out:
        c, cells = self.condition(step), step.shape[1]
        num_queries = cells if step.num_queries is None else step.num_queries
        x = self.backbone.vocab_embed(step.ids, step.soft)
        table = rotary_table(step.position, self.head_dim, self._compute_dtype(x))
        attention: list[Tensor] | None = [] if "attention" in step.outputs else None
        if cache is None and attention is None:
            x = self._uncached(x, c, table, step, num_queries)
        else:
            x = self._cached(x, c, table, step, cache, num_queries, attention)
        mixed = None if not attention else torch.stack(attention).mean(0)
        return self.output(x, c, step, num_queries, mixed)

    # -- the layers, without and with a cache ------------------------------------------------------

    def _uncached(
        self, x: Tensor, c: Tensor | None, table: Table, step: Step, num_queries: int
    ) -> Tensor:
        """Run the layers without a cache. In eager mode the last one returns the queried cells
        alone: [M, d]."""
        compiled = self.layer_call is not None and self.training
        call = self.layer_call if compiled else Block.forward
        plan, cells = self._plan(step, None, num_queries), x.shape[1]
        ends: list[tuple[AnyPlan | None, int, Tensor | None]] = [(plan, cells, None)] * (
            len(self.layers) - 1
        )
        if isinstance(plan, Plan) and chunked_attention.supported(x) and not compiled:
            table = chunked_attention.complex_rotation(table)
        query_index = (
            None
            if step.query_mask is None or compiled
            else step.query_mask[:, :num_queries].flatten().nonzero()[:, 0]
        )
        ends.append(
            (
                plan if plan is None or num_queries == cells else plan.truncated(num_queries),
                num_queries,
                query_index,
            )
        )
        for block, end in zip(self.layers, ends, strict=True):
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(
                    call, block, x, c, table, *end, use_reentrant=False
                )
            else:
                x = call(block, x, c, table, *end)
        return x

    def _cached(
        self,
        x: Tensor,
        c: Tensor | None,
        table: Table,
        step: Step,
        cache: KVCache | None,
        num_queries: int,
        attention: list[Tensor] | None,
    ) -> Tensor:
        plan = self._plan(step, cache, num_queries)
        last = len(self.layers) - 1
        cells = x.shape[1]
        for i, block in enumerate(self.layers):
            mod, keep = block.modulation(c), num_queries if i == last else cells
            q, k, v = block.qkv(x, mod, table)
            keys, values = (k, v) if cache is None else cache.append(i, k, v)
            if attention is not None:
                attention.append(self._own_attention(q, keys, step, cache))
            if keep:
                own = plan if plan is None or keep == cells else plan.truncated(keep)
                x = block.after_attention(
                    x[:, :keep], attend(q[:, :, :keep], keys, values, own), first_cells(mod, keep)
                )
            else:
                x = x[:, :0]
            if step.write is not None and cache is not None:
                cache.store(i, k, v, step)
        if cache is not None:
            cache.slots.record(step)
        return x

    def _plan(self, step: Step, cache: KVCache | None, num_queries: int) -> AnyPlan | None:
        if step.full_attention:
            return None
        query, dtype = Cells.of(step), self._compute_dtype(self.backbone.vocab_embed.embedding)
        breaks = (num_queries,) if 0 < num_queries < step.shape[1] else ()
        if cache is None:
            flex = (
                step.ids.device.type == "cuda"
                and step.shape[1] >= 256
                and "attention" not in step.outputs
            )
            return self._plan_cache.make(query, dtype, breaks, flex)
        key = join(cache.slots.cells(step), query) if cache.slots.used else query
        return make_plan(query, key, dtype, breaks)

    def _own_attention(self, q: Tensor, keys: Tensor, step: Step, cache: KVCache | None) -> Tensor:
        query = Cells.of(step)
        key = (
            query if cache is None or not cache.slots.used else join(cache.slots.cells(step), query)
        )
        return attention_weights(q, keys, query, key)[:, :, -step.shape[1] :]

    # -- conditioning and head ---------------------------------------------------------------------

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype that linear layers produce: autocast's where it is on."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def _sigma(self, step: Step) -> Tensor:
        """Return total noise -log(1 - p) of each cell, [R, 1] if it is equal within rows, else [R,
        N]."""
        assert step.time is not None, "a time-conditioned model needs Step.time"
        time = step.time[:, :1] if bool((step.time == step.time[:, :1]).all()) else step.time
        return -torch.log1p(-time.clamp(max=SIGMA_MAX))

    def condition(self, step: Step) -> Tensor | None:
        """Return the conditioning [1 or R, 1 or N, c]; sigma is 0 unless the model is
        time-conditioned. None without adaLN."""
        return (
            self.backbone.sigma_map(self._sigma(step))
            if self.spec.time_conditioned
            else self.conditioning()
        )

    def conditioning(self) -> Tensor | None:
        """Return the conditioning [1, 1, c] for sigma 0, of models without time; None without
        adaLN."""
        if not self.config.adaln:
            return None
        return self.backbone.sigma_map(
            torch.zeros(
                1, 1, dtype=torch.float32, device=self.backbone.vocab_embed.embedding.device
            )
        )

    def output(
        self, x: Tensor, c: Tensor | None, step: Step, num_queries: int, attention: Tensor | None
    ) -> Out:
        """Return the output of a forward pass, from the last layer's states x: [R, num_queries, d],
        or [M, d] if the queried cells are selected already."""
        query_mask = None if step.query_mask is None else step.query_mask[:, :num_queries]
        if query_mask is not None:
            if c is not None and c.shape[:2] != (1, 1):
                c = c.expand(*step.shape, -1)[:, :num_queries][query_mask]
            elif c is not None:
                c = c[0]
            x = x if x.dim() == 2 else x[query_mask]
        h = self.backbone.output_layer.hidden(x, c)
        logits = self._logits(h, step, query_mask) if "logits" in step.outputs else None
        return Out(logits, h if "hidden" in step.outputs else None, attention)

    def _logits(self, h: Tensor, step: Step, query_mask: Tensor | None) -> Tensor:
        logits = self.backbone.output_layer.linear(h)
        if self.spec.prediction == "tokens":
            return logits
        num_queries = h.shape[1] if query_mask is None else query_mask.shape[1]
        sigma = self._sigma(step).expand(step.shape)[:, :num_queries]
        ids = step.ids[:, :num_queries]
        sigma, ids = (sigma, ids) if query_mask is None else (sigma[query_mask], ids[query_mask])
        # arXiv 2310.16834, absorbing noise: log s_y = o_y - log(e^sigma - 1) - log(V - 1), and 0 at
        # the current token
        score = (
            logits.float()
            - torch.log(torch.expm1(sigma))[..., None]
            - math.log(self.config.vocab_size - 1)
        )
        return score.scatter(-1, ids[..., None], 0.0)

    @property
    def head(self) -> nn.Linear:
        """Return the linear head, for losses that never build the logits."""
        return self.backbone.output_layer.linear
