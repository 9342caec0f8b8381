"""Tiny random transformers models of every allowed family, for the tests of the adapter and for the
contract suites."""

from __future__ import annotations

from typing import Any

import torch

from bdlm.models.hf import Conventions, HFDenoiser

VOCAB, MASK = 23, 22


def tiny_config(family: str, **changes: Any) -> Any:
    """Two layers, width 32, grouped keys where the family has them; weights wide enough for
    attention to matter."""
    import transformers

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            **changes,
        )
    config = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
    }[family]
    more = {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "sliding_window": None,
    }
    if family == "llama":
        more.pop("sliding_window")
    if family == "qwen2":
        more.pop("head_dim")
    return getattr(transformers, config)(
        **{**common, **more, "bos_token_id": 0, "eos_token_id": 1, **changes}
    )


def tiny(family: str, **conventions: Any) -> HFDenoiser:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return HFDenoiser(
        AutoModelForCausalLM.from_config(tiny_config(family)), Conventions(**conventions)
    ).eval()
