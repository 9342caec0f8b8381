"""The network that the suites of this folder look at: small, and with weights large enough to care
about its context."""

from __future__ import annotations

import torch

from bdlm.models.dit import DiT, DiTConfig


def small_network(length: int) -> DiT:
    """Two layers, width 16, six tokens and the mask, blocks of 4 in windows of `length`. The same
    weights at every call."""
    torch.manual_seed(0)
    sizes = {
        "hidden_dim": 16,
        "n_blocks": 2,
        "n_heads": 2,
        "cond_dim": 8,
        "model_length": length,
        "block_size": 4,
    }
    model = DiT(DiTConfig(vocab_size=7, mask_id=6, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model
