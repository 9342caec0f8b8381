"""Names of tensors and fields as published checkpoints have them, and what those files leave out.

In: tensors and a config as stored. Out: weights under their published names, the learned clipped
schedule, and a config with the known omissions filled in. Knows nothing about files or models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import CheckpointError, shown

SCALARS = ("sampling_eps_min", "sampling_eps_max")  # the learned clipped schedule [beta, omega]
# GPT-2's tokens and the mask; its <|endoftext|> opens and ends published texts
OWT_VOCAB, OWT_END = 50258, 50256

Config = Mapping[str, Any]


def plain_name(name: str) -> str:
    """Return a tensor's published name: without the marks of torch.compile and DDP, with the
    `backbone.` prefix."""
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    return name if name.startswith("backbone.") or name in SCALARS else f"backbone.{name}"


def sort_out(
    tensors: Mapping[str, Tensor], config: Config
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[float, float] | None]:
    """Return weights under their plain names, the names of tensors that are not weights, and the
    learned interval."""
    if "backbone" in config:
        return dict(tensors), (), None
    weights: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = plain_name(name)
        if plain in weights:
            raise CheckpointError(
                f"tensor {plain} is in the checkpoint twice (once as {name}); keep one"
            )
        weights[plain] = value
    scalars = {name: _scalar(name, weights.pop(name)) for name in SCALARS if name in weights}
    aside = [*scalars]
    base = "backbone.rotary_emb.inv_freq"
    if base in weights:
        _check_rotary(weights.pop(base))
        aside.append(base)
    low, high = (_share(name, scalars.get(name, config.get(name))) for name in SCALARS)
    clip = None if low is None or high is None else (low, high)
    return weights, tuple(aside), clip


def _scalar(name: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise CheckpointError(f"tensor {name} has shape {list(value.shape)}; it must be one number")
    return float(value)


def _share(name: str, value: Any) -> float | None:
    """Return a mask probability of the config or the file, or None if there is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(f"{name} is {shown(value)}; it must be a number from 0 to 1")
    return float(value)


def _check_rotary(stored: Tensor) -> None:
    """Raise CheckpointError unless the stored table is that of base 10000, the only one
    supported."""
    half = stored.numel()
    expected = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    if not torch.allclose(stored.flatten().double(), expected, rtol=1e-2):
        raise CheckpointError(
            "tensor backbone.rotary_emb.inv_freq is not that of base 10000; this model has other"
            " rotary positions"
        )


def fill_in_config(
    config: Config, weights: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Fill in what published configs leave out; returns the config and a note on each entry."""
    config, notes = dict(config), []
    found = len({n.split(".")[2] for n in weights if n.startswith("backbone.blocks.")})
    stated = config.get("n_blocks")
    if isinstance(stated, int) and stated > found:  # before anything of that size is built
        raise CheckpointError(
            f"{path}: config.json says n_blocks {stated}, the weights have {found}; give the"
            " config.json of these weights"
        )
    embedding, sigma = (
        weights.get("backbone.vocab_embed.embedding"),
        weights.get("backbone.sigma_map.mlp.2.bias"),
    )
    if embedding is not None and config.get("vocab_size") not in (None, embedding.shape[0]):
        differ = (
            f"config.json says vocab_size {shown(config['vocab_size'])}, the weights have"
            f" {embedding.shape[0]} rows"
        )
        raise CheckpointError(f"{path}: {differ}; give the config.json of these weights")
    if sigma is not None and config.get("cond_dim", 129) == 129 and sigma.shape[0] != 129:
        config["cond_dim"] = int(sigma.shape[0])
        notes.append(
            f"cond_dim taken from the weights: {config['cond_dim']} (the published default 129 is a"
            " slip)"
        )
    if isinstance(config.get("vocab_size"), int) and config.get("mask_id") is None:
        config["mask_id"] = config.get("mask_token_id", config["vocab_size"] - 1)
        notes.append(f"mask_id not in config.json: taken as {config['mask_id']}")
    if "first_token" not in config and config.get("vocab_size") == OWT_VOCAB:
        config["first_token"] = config["stop_token"] = OWT_END
        notes.append(
            f"first_token and stop_token not in config.json: taken as {OWT_END}, GPT-2's"
            " <|endoftext|>"
        )
    return config, notes
