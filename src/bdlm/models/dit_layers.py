"""Configuration and layers of the paper's transformer, with the published weight names.

In: states and their adaLN modulation. Out: states. `models.dit` runs the layers with and without a
cache. Knows nothing about steps, caches or noise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bdlm.core.errors import ConfigError
from bdlm.core.types import ModelSpec
from bdlm.core.validation import Count, validate_fields
from bdlm.core.visibility import Plan
from bdlm.models import chunked_attention
from bdlm.models.attention import AnyPlan, attend, rotate
from bdlm.models.embedding import Embedding, SigmaMap
from bdlm.models.fused_mlp import Norm, mlp

Mod = tuple[Tensor, ...] | None
Table = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DiTConfig:
    """State sizes and conventions; field names are those of the published config.json.

    algo: "bd3lm", "mdlm", "sedd" or "ar" decides streams, time conditioning and causality.
    Raises ConfigError for sizes that do not fit together."""

    vocab_size: Count
    mask_id: int
    hidden_dim: Count = 256
    n_blocks: Count = 8
    n_heads: Count = 8
    cond_dim: Count = 64
    model_length: Count = 256
    block_size: Count = 8
    dropout: float = 0.0
    algo: Literal["bd3lm", "mdlm", "sedd", "ar"] = "bd3lm"
    context: Literal["block", "causal"] = "block"
    first_token: int | None = None
    stop_token: int | None = None

    def __post_init__(self) -> None:
        validate_fields(self, "model.")
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
        """Return the conventions that core reads."""
        one_block = self.algo in ("mdlm", "sedd")
        return ModelSpec(
            vocab_size=self.vocab_size,
            mask_id=self.mask_id,
            block_size=1
            if self.algo == "ar"
            else self.model_length
            if one_block
            else self.block_size,
            max_length=self.model_length,
            noise="none" if self.algo == "ar" else "mask",
            prediction="log_score" if self.algo == "sedd" else "tokens",
            time_conditioned=self.algo == "sedd",
            shift=self.algo == "ar",
            context="causal" if self.algo == "ar" else self.context,
            streams=1 if one_block or self.algo == "ar" else 2,
            first_token=self.first_token,
            stop_token=self.stop_token,
            supports=frozenset(
                {"cache", "hidden", "attention", "soft", "overwrite"}
                | ({"layer_reuse"} if one_block else set())
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ZeroLinear(nn.Linear):
    """Start a linear layer at zero: layers begin as the identity, and the first logits are
    uniform."""

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)


class Block(nn.Module):
    """Compute one transformer layer. `forward` is the uncached layer; the other methods are its
    parts, for passes with a cache."""

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
        """Return (shift, scale, gate) of attention and of the MLP, each [1 or R, 1 or N, d]."""
        return None if c is None else self.adaLN_modulation(c).chunk(6, -1)

    def attention_input(self, x: Tensor, mod: Mod) -> Tensor:
        """Return the states that queries, keys and values are projected from: [R, N, d]."""
        return self.norm1(x) if mod is None else self.norm1(x, mod[0], mod[1])

    def qkv(self, x: Tensor, mod: Mod, table: Table) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q and k, and v: [R, H, N, D]."""
        rows, cells, width = x.shape
        qkv = self.attn_qkv(self.attention_input(x, mod))
        q, k, v = (
            qkv.view(rows, cells, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        # a view would keep all of qkv for the backward pass
        return rotate(q, table), rotate(k, table), v.contiguous()

    def after_attention(self, x: Tensor, mixed: Tensor, mod: Mod) -> Tensor:
        """Add both residual branches, given the heads' output: x, mixed [..., d]. Gates that are
        equal for all cells are multiplied into the weights."""
        if mod is None or mod[2].numel() != x.shape[-1] or self.dropout:
            return self.add_residuals(x, self.attention_output(mixed), mod)
        weight = mod[2].flatten()[:, None] * self.attn_out.weight
        return self.add_mlp(x + F.linear(mixed, weight), mod)

    def attention_output(self, mixed: Tensor) -> Tensor:
        """Project the heads' output back: [..., d]."""
        return self.attn_out(mixed)

    def add_residuals(self, x: Tensor, a: Tensor, mod: Mod) -> Tensor:
        """Add both residual branches to x [..., d], given the projected attention a [..., d]."""
        a = self._drop(a)
        return self.add_mlp(x + (a if mod is None else mod[2] * a), mod)

    def add_mlp(self, x: Tensor, mod: Mod) -> Tensor:
        """Add the residual branch of the MLP to x [..., d]."""
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
        num_queries: int,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Run the uncached layer; returns the first `num_queries` cells, [R, num_queries, d], or
        those of them in `query_index`, [M, d].

        query_index: int64 [M], of the R * num_queries cells."""
        mod = self.modulation(c)
        mixed = self.attention(x, mod, table, plan, num_queries)
        x = x[:, :num_queries]
        mod = first_cells(mod, num_queries)
        if query_index is not None:
            mod = _select_cells(mod, x, query_index)
            x, mixed = x.flatten(0, 1)[query_index], mixed.flatten(0, 1)[query_index]
        return self.after_attention(x, mixed, mod)

    def attention(
        self, x: Tensor, mod: Mod, table: Table, plan: AnyPlan | None, num_queries: int
    ) -> Tensor:
        """Return the heads' output for the first `num_queries` cells: [R, num_queries, d].

        table: of `rotary_table`, or of `chunked_attention.complex_rotation` where that module
        attends."""
        if isinstance(plan, Plan) and chunked_attention.supported(x):
            return chunked_attention.attend_chunked(
                self.attention_input(x, mod), self.attn_qkv.weight, table, plan, self.heads
            )
        q, k, v = self.qkv(x, mod, table)
        return attend(q[:, :, :num_queries], k, v, plan)


def first_cells(mod: Mod, num_queries: int) -> Mod:
    """Return the modulation of the first cells, if it differs by cell."""
    return None if mod is None else tuple(m if m.shape[1] == 1 else m[:, :num_queries] for m in mod)


def _select_cells(mod: Mod, x: Tensor, query_index: Tensor) -> Mod:
    """Return the modulation of some of the cells of x [R, N, d]: [d] if it is the same for all,
    else [M, d]."""
    same = lambda m: m.numel() == x.shape[-1]
    return (
        None
        if mod is None
        else tuple(
            m.flatten() if same(m) else m.expand_as(x).flatten(0, 1)[query_index] for m in mod
        )
    )


class OutputLayer(nn.Module):
    """Apply the final norm, its modulation and the linear head."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = Norm(config.hidden_dim)
        self.linear = ZeroLinear(config.hidden_dim, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = ZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def hidden(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Return the state that the head reads: [..., d]."""
        return (
            self.norm_final(x)
            if c is None
            else self.norm_final(x, *self.adaLN_modulation(c).chunk(2, -1))
        )


class Backbone(nn.Module):
    """Hold embedding, layers and head under the published names."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        if config.adaln:
            self.sigma_map = SigmaMap(config.cond_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.output_layer = OutputLayer(config)
