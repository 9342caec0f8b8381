"""The paper's transformer (DiT with rotary positions and adaLN), with the published weight names.

In: a `Step`. Out: an `Out`. One trunk serves the two-stream training pass, the cached pass, MDLM,
SEDD and AR; what differs is the step's visibility and the config. Knows nothing about schedules,
losses or sampling.

Names under `backbone.` are those of the released checkpoints: vocab_embed.embedding,
sigma_map.mlp.*, blocks.{i}.{norm1, attn_qkv, attn_out, norm2, mlp.0, mlp.2, adaLN_modulation},
output_layer.{norm_final, linear, adaLN_modulation}."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlm.core.errors import ConfigError
from bdlm.core.types import ModelSpec, Out, Step
from bdlm.core.visibility import Cells, Plan, join
from bdlm.models import chunked_attention
from bdlm.models.attention import (
    AnyPlan,
    LastPlan,
    attend,
    attention_weights,
    make_plan,
    rotary_table,
    rotate,
)
from bdlm.models.cache import KVCache
from bdlm.models.embedding import Embedding, SigmaMap
from bdlm.models.fused_mlp import Norm, mlp

Mod = tuple[Tensor, ...] | None
Table = tuple[Tensor, Tensor]

SIGMA_MAX = 1 - 1e-3  # mask probability above which sigma is held, so that it stays finite


@dataclass(frozen=True)
class DiTConfig:
    """Sizes and conventions; field names are those of the published config.json.

    algo: "bd3lm", "mdlm", "sedd" or "ar" decides streams, time conditioning and causality.
    """

    vocab_size: int
    mask_id: int
    hidden_dim: int = 256
    n_blocks: int = 8
    n_heads: int = 8
    cond_dim: int = 64
    model_length: int = 256
    block_size: int = 8
    dropout: float = 0.0
    algo: str = "bd3lm"
    context: str = "block"
    first_token: int | None = None
    stop_token: int | None = None

    def __post_init__(self) -> None:
        if self.algo not in ("bd3lm", "mdlm", "sedd", "ar"):
            raise ConfigError(f"model.algo is '{self.algo}'; use bd3lm, mdlm, sedd or ar")
        for name in (
            "vocab_size",
            "hidden_dim",
            "n_blocks",
            "n_heads",
            "cond_dim",
            "model_length",
            "block_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; use 1 or more")
        if self.algo == "bd3lm" and self.block_size > self.model_length:
            raise ConfigError(
                f"model.block_size is {self.block_size}; use at most the model's length"
                f" ({self.model_length})"
            )
        if self.hidden_dim % self.n_heads or (self.hidden_dim // self.n_heads) % 2:
            raise ConfigError(
                f"model.hidden_dim is {self.hidden_dim} with {self.n_heads} heads; the width of a"
                " head must be a whole even number"
            )
        if not 0 <= self.mask_id < self.vocab_size:
            raise ConfigError(
                f"model.mask_id is {self.mask_id}, outside the vocabulary of {self.vocab_size}"
            )

    @property
    def adaln(self) -> bool:
        return self.algo != "ar"

    def spec(self) -> ModelSpec:
        """The conventions that core reads."""
        whole = self.algo in ("mdlm", "sedd")
        return ModelSpec(
            vocab_size=self.vocab_size,
            mask_id=self.mask_id,
            block_size=1 if self.algo == "ar" else self.model_length if whole else self.block_size,
            max_length=self.model_length,
            noise="none" if self.algo == "ar" else "mask",
            prediction="log_score" if self.algo == "sedd" else "tokens",
            time_conditioned=self.algo == "sedd",
            shift=self.algo == "ar",
            context="causal" if self.algo == "ar" else self.context,  # type: ignore[arg-type]
            streams=1 if whole or self.algo == "ar" else 2,
            first_token=self.first_token,
            stop_token=self.stop_token,
            supports=frozenset(
                {"cache", "hidden", "attention", "soft", "overwrite"}
                | ({"layer_reuse"} if whole else set())
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: layers begin as the identity, and the first logits are
    uniform."""

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)


class Block(nn.Module):
    """One transformer layer. `forward` takes its adaLN modulation (or None) and a function that
    lays keys beside a cache."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_dim, config.n_heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.dropout = config.dropout
        if config.adaln:
            self.adaLN_modulation = ZeroLinear(config.cond_dim, 6 * width)

    def modulation(self, c: Tensor | None) -> Mod:
        """(shift, scale, gate) of attention and of the MLP, each [1 or R, 1 or N, d]."""
        return None if c is None else self.adaLN_modulation(c).chunk(6, -1)

    def entering(self, x: Tensor, mod: Mod) -> Tensor:
        """What queries, keys and values are projected from: [R, N, d]."""
        return self.norm1(x) if mod is None else self.norm1(x, mod[0], mod[1])

    def queries(self, x: Tensor, mod: Mod, table: Table) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v: [R, H, N, D]."""
        rows, cells, width = x.shape
        qkv = self.attn_qkv(self.entering(x, mod))
        q, k, v = (
            qkv.view(rows, cells, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        # a view would keep all of qkv for the backward pass
        return rotate(q, table), rotate(k, table), v.contiguous()

    def finish(self, x: Tensor, mixed: Tensor, mod: Mod) -> Tensor:
        """Residual branches after attention: x, mixed [..., d]. Gates that are the same for all
        cells go into products."""
        if mod is None or mod[2].numel() != x.shape[-1] or self.dropout:
            return self.feed(x, self.leaving(mixed), mod)
        weight = mod[2].flatten()[:, None] * self.attn_out.weight
        return self.widen(x + F.linear(mixed, weight), mod)

    def leaving(self, mixed: Tensor) -> Tensor:
        """The heads' mixed values projected back: [..., d]."""
        return self.attn_out(mixed)

    def feed(self, x: Tensor, a: Tensor, mod: Mod) -> Tensor:
        """Both residual branches of x [..., d], given the projected attention a [..., d]."""
        a = self._drop(a)
        return self.widen(x + (a if mod is None else mod[2] * a), mod)

    def widen(self, x: Tensor, mod: Mod) -> Tensor:
        """The residual branch of the MLP: x [..., d]."""
        up, down = self.mlp[0], self.mlp[2]
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        h = self.norm2(x) if mod is None else self.norm2(x, mod[3], mod[4])
        if mod is not None and mod[5].numel() == x.shape[-1] and not self.dropout:
            gate = mod[5].flatten()
            return x + mlp(h, up.weight, up.bias, gate[:, None] * down.weight, gate * down.bias)
        m = self._drop(mlp(h, up.weight, up.bias, down.weight, down.bias))
        return x + (m if mod is None else mod[5] * m)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        table: Table,
        plan: AnyPlan | None,
        leading: int,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The uncached layer; only the first `leading` cells leave it, [R, leading, d], or those of
        them that `wanted` names, [M, d].

        wanted: int64 [M], of the R * leading cells.
        """
        mod = self.modulation(c)
        mixed, x, mod = (
            self.mixed(x, mod, table, plan, leading),
            x[:, :leading],
            _lead(mod, leading),
        )
        if wanted is not None:
            mod = _some(mod, x, wanted)
            x, mixed = x.flatten(0, 1)[wanted], mixed.flatten(0, 1)[wanted]
        return self.finish(x, mixed, mod)

    def mixed(
        self, x: Tensor, mod: Mod, table: Table, plan: AnyPlan | None, leading: int
    ) -> Tensor:
        """What the heads of the first `leading` cells attend to: [R, leading, d]. table: where
        `split` attends, of `chunked_attention.turns`."""
        if isinstance(plan, Plan) and chunked_attention.supported(x):
            return chunked_attention.split_attention(
                self.entering(x, mod), self.attn_qkv.weight, table, plan, self.heads
            )
        q, k, v = self.queries(x, mod, table)
        return attend(q[:, :, :leading], k, v, plan)


def _lead(mod: Mod, leading: int) -> Mod:
    """Modulation of the first cells, where it differs by cell."""
    return None if mod is None else tuple(m if m.shape[1] == 1 else m[:, :leading] for m in mod)


def _some(mod: Mod, x: Tensor, wanted: Tensor) -> Mod:
    """Modulation of some of the cells of x [R, N, d]: [d] where it is the same for all, else [M,
    d]."""
    same = lambda m: m.numel() == x.shape[-1]
    return (
        None
        if mod is None
        else tuple(m.flatten() if same(m) else m.expand_as(x).flatten(0, 1)[wanted] for m in mod)
    )


class OutputLayer(nn.Module):
    """Final norm, modulation and the linear head."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = Norm(config.hidden_dim)
        self.linear = ZeroLinear(config.hidden_dim, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = ZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def hidden(self, x: Tensor, c: Tensor | None) -> Tensor:
        """The state that the head reads: [..., d]."""
        return (
            self.norm_final(x)
            if c is None
            else self.norm_final(x, *self.adaLN_modulation(c).chunk(2, -1))
        )


class Backbone(nn.Module):
    """Embedding, layers and head under the published names."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        if config.adaln:
            self.sigma_map = SigmaMap(config.cond_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.output_layer = OutputLayer(config)


class DiT(nn.Module):
    """The native denoiser: `step` is its forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self._assemble(config)

    def _assemble(self, config: DiTConfig) -> None:
        self.backbone = Backbone(config)
        self.gradient_checkpointing = False
        self.layer_call: Any = None  # a compiled form of Block.forward, set by `compile_trunk`
        self._last_plan = LastPlan()
        self._spec = config.spec()

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def layers(self) -> list[Block]:
        """The transformer layers, in order."""
        return list(self.backbone.blocks)  # type: ignore[arg-type]

    @property
    def head_dim(self) -> int:
        return self.config.hidden_dim // self.config.n_heads

    def new_cache(self, rows: int, capacity: int, slack: int | None = None) -> KVCache:
        """An empty cache of `capacity` cells a row, in the dtype and on the device of the
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
        # a graph for the last layer, for padded batches and for each layout: more than the default
        # allowance
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.layer_call = torch.compile(Block.forward, dynamic=False, **options)

    def forward(self, step: Step, cache: KVCache | None = None) -> Out:
        return self.step(step, cache)

    def step(self, step: Step, cache: KVCache | None = None) -> Out:
        c, cells = self.condition(step), step.shape[1]
        leading = cells if step.num_queries is None else step.num_queries
        x = self.backbone.vocab_embed(step.ids, step.soft)
        table = rotary_table(step.position, self.head_dim, self._compute_dtype(x))
        attention: list[Tensor] | None = [] if "attention" in step.outputs else None
        if cache is None and attention is None:
            x = self._whole(x, c, table, step, leading)
        else:
            x = self._cached(x, c, table, step, cache, leading, attention)
        mixed = None if not attention else torch.stack(attention).mean(0)
        return self.answer(x, c, step, leading, mixed)

    # -- the two passes over the layers: the same parts, with and without a cache ------------------

    def _whole(self, x: Tensor, c: Tensor | None, table: Table, step: Step, leading: int) -> Tensor:
        """The layers without a cache. In eager mode the wanted cells alone leave the last one: [M,
        d]."""
        compiled = self.layer_call is not None and self.training
        call = self.layer_call if compiled else Block.forward
        plan, cells = self._plan(step, None, leading), x.shape[1]
        ends: list[tuple[AnyPlan | None, int, Tensor | None]] = [(plan, cells, None)] * (
            len(self.layers) - 1
        )
        if isinstance(plan, Plan) and chunked_attention.supported(x) and not compiled:
            table = chunked_attention.turns(table)
        wanted = (
            None
            if step.query_mask is None or compiled
            else step.query_mask[:, :leading].flatten().nonzero()[:, 0]
        )
        ends.append(
            (plan if plan is None or leading == cells else plan.leading(leading), leading, wanted)
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
        leading: int,
        attention: list[Tensor] | None,
    ) -> Tensor:
        plan, last, cells = self._plan(step, cache, leading), len(self.layers) - 1, x.shape[1]
        for i, block in enumerate(self.layers):
            mod, keep = block.modulation(c), leading if i == last else cells
            q, k, v = block.queries(x, mod, table)
            keys, values = (k, v) if cache is None else cache.lay(i, k, v)
            if attention is not None:
                attention.append(self._own_attention(q, keys, step, cache))
            if keep:
                own = plan if plan is None or keep == cells else plan.leading(keep)
                x = block.finish(
                    x[:, :keep], attend(q[:, :, :keep], keys, values, own), _lead(mod, keep)
                )
            else:
                x = x[:, :0]
            if step.write is not None and cache is not None:
                cache.store(i, k, v, step)
        if cache is not None:
            cache.slots.record(step)
        return x

    def _plan(self, step: Step, cache: KVCache | None, leading: int) -> AnyPlan | None:
        if step.full_attention:
            return None
        query, dtype = Cells.of(step), self._compute_dtype(self.backbone.vocab_embed.embedding)
        breaks = (leading,) if 0 < leading < step.shape[1] else ()
        if cache is None:
            flex = (
                step.ids.device.type == "cuda"
                and step.shape[1] >= 256
                and "attention" not in step.outputs
            )
            return self._last_plan.make(query, dtype, breaks, flex)
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
        """The dtype that linear layers produce: autocast's where it is on."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def _sigma(self, step: Step) -> Tensor:
        """Total noise -log(1 - p) of each cell, [R, 1] where a row has one, else [R, N]."""
        assert step.time is not None, "a time-conditioned model needs Step.time"
        time = step.time[:, :1] if bool((step.time == step.time[:, :1]).all()) else step.time
        return -torch.log1p(-time.clamp(max=SIGMA_MAX))

    def condition(self, step: Step) -> Tensor | None:
        """Conditioning [1 or R, 1 or N, c]; sigma is 0 unless the model is time-conditioned, None
        without adaLN."""
        return (
            self.backbone.sigma_map(self._sigma(step))
            if self.spec.time_conditioned
            else self.conditioning()
        )

    def conditioning(self) -> Tensor | None:
        """The conditioning [1, 1, c] of a model that is not told the time (sigma is 0), None
        without adaLN."""
        if not self.config.adaln:
            return None
        return self.backbone.sigma_map(
            torch.zeros(
                1, 1, dtype=torch.float32, device=self.backbone.vocab_embed.embedding.device
            )
        )

    def answer(
        self, x: Tensor, c: Tensor | None, step: Step, leading: int, attention: Tensor | None
    ) -> Out:
        """What a call returns, from the last layer's states x: [R, leading, d], or [M, d] where the
        wanted cells are picked already."""
        at = None if step.query_mask is None else step.query_mask[:, :leading]
        if at is not None:
            if c is not None and c.shape[:2] != (1, 1):
                c = c.expand(*step.shape, -1)[:, :leading][at]
            elif c is not None:
                c = c[0]
            x = x if x.dim() == 2 else x[at]
        h = self.backbone.output_layer.hidden(x, c)
        logits = self._logits(h, step, at) if "logits" in step.outputs else None
        return Out(logits, h if "hidden" in step.outputs else None, attention)

    def _logits(self, h: Tensor, step: Step, query_mask: Tensor | None) -> Tensor:
        logits = self.backbone.output_layer.linear(h)
        if self.spec.prediction == "tokens":
            return logits
        leading = h.shape[1] if query_mask is None else query_mask.shape[1]
        sigma = self._sigma(step).expand(step.shape)[:, :leading]
        ids = step.ids[:, :leading]
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
        """The linear head, for losses that never build the logits."""
        return self.backbone.output_layer.linear
