"""Folders as transformers writes them: a tiny random causal model and a tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

END, START = "<|endoftext|>", "<|begin|>"
TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 8
SPARE = 5  # rows of the embedding that no token has


def tiny_tokenizer(opens: bool = False) -> Any:
    """A byte-level BPE of transformers. opens: whether it puts `START` before every text, as
    Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, START] if opens else [END]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    engine.train_from_iterator(TEXT, trainer)
    if opens:
        start = (START, engine.token_to_id(START))
        engine.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[start]
        )
    edges = {"eos_token": END, "bos_token": START if opens else END}
    return PreTrainedTokenizerFast(tokenizer_object=engine, **edges)


def causal_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A folder of a causal model of `family` ("gpt2", "llama", "qwen2", "qwen3") and its tokenizer.

    changes: fields of the model's config.
    """
    from transformers import AutoModelForCausalLM

    from tests.models.tiny_hf import tiny_config

    tokenizer = tiny_tokenizer(opens=family == "llama")
    rows = len(tokenizer) + SPARE
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = tiny_config(family)
    for name, value in {"vocab_size": rows, **ids, **changes}.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
