"""Every kind of denoiser that the contract suites run over: name -> a function that builds it, tiny
and random.

To add a backbone: one function here and one line in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bdlm.core.blockmap import BlockMap, Contiguous, Layout, make_layout
from bdlm.core.types import Denoiser
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.toy import TOYS


@dataclass(frozen=True)
class Built:
    """A model, the block map to run it under, and the cells of a window. tolerance: what rounding
    may change in its logits."""

    model: Denoiser
    map: BlockMap
    length: int
    tolerance: float

    def layout(self, doc: torch.Tensor | None = None) -> Layout:
        length = self.length if doc is None else doc.shape[1]
        return make_layout(self.map, length, doc, context=self.model.spec.context)


def randomised(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Every parameter drawn anew, so that nothing is zero (a fresh head and fresh adaLN are)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def tiny_dit(
    algo: str, block_size: int = 4, length: int = 16, context: str = "block", vocab: int = 11
) -> DiT:
    """Two layers of width 16 over `vocab` ids; the last is the mask."""
    sizes = {"hidden_dim": 16, "n_blocks": 2, "n_heads": 2, "cond_dim": 8}
    model = DiT(
        DiTConfig(
            vocab,
            vocab - 1,
            model_length=length,
            block_size=block_size,
            algo=algo,
            context=context,
            **sizes,
        )
    )
    randomised(model)
    return model


def _dit(algo: str, block_size: int = 4, context: str = "block") -> Callable[[], Built]:
    def build() -> Built:
        model = tiny_dit(algo, block_size, context=context)
        return Built(model, Contiguous(model.spec.block_size), 16, 1e-5)

    return build


def _hf(family: str, **conventions: Any) -> Callable[[], Built]:
    def build() -> Built:
        from tests.models.tiny_hf import MASK, tiny

        model = tiny(family, mask_id=MASK, **conventions)
        return Built(model, Contiguous(model.spec.block_size), 16, 1e-5)

    return build


def _toy(name: str) -> Callable[[], Built]:
    world = TOYS[name]
    return lambda: Built(world.make(), world.map, world.length, 1e-9)


BUILDERS: dict[str, Callable[[], Built]] = {
    "dit-bd3lm": _dit("bd3lm"),
    "dit-bd3lm-1": _dit("bd3lm", block_size=1),
    "dit-bd3lm-causal": _dit("bd3lm", context="causal"),
    "dit-mdlm": _dit("mdlm"),
    "dit-sedd": _dit("sedd"),
    "dit-ar": _dit("ar"),
    "hf-llama": _hf("llama"),
    "hf-qwen3": _hf("qwen3"),
    "hf-qwen3-shift": _hf("qwen3", shift=True),
    "hf-llama-causal": _hf("llama", context="causal"),
    "hf-llama-ar": _hf("llama", autoregressive=True),
    **{f"toy-{name}": _toy(name) for name in TOYS},
}
