"""Tiny tokenizers of every kind that decodes in its own way, each with a random model over its
ids."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bdlm.api import LM
from bdlm.data.tokenizers import ByteTokenizer, HFTokenizer, train_bpe
from bdlm.models.dit import DiT, DiTConfig
from tests.contracts.builders import randomised

CORPUS = [
    "the cat sat on the mat, and the dog saw the cat!",
    "a bird sang; the sun rose, and all the town was glad of it.",
    "naïve café, 5 € — that's odd… don't you see?",
    "yes\nno\n\nKING: what, ho! who goes there?\n",
] * 5
SPECIAL = ["[UNK]", "[MASK]", "[SEP]"]


def hf(engine: Tokenizer) -> HFTokenizer:
    """An engine of the `tokenizers` library as the library loads it from a folder."""
    from transformers import PreTrainedTokenizerFast

    names = {"unk_token": "[UNK]", "mask_token": "[MASK]", "sep_token": "[SEP]"}
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=engine, **names).save_pretrained(folder)
        return HFTokenizer(Path(folder))


def metaspace() -> HFTokenizer:
    """SentencePiece's kind: a word begins with a marked space, which decoding drops at the
    start."""
    engine = Tokenizer(models.Unigram())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    engine.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
        ),
    )
    return hf(engine)


def llama() -> HFTokenizer:
    """Llama's kind: as `metaspace`, and bytes for characters that have no piece."""
    engine = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True))
    engine.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    plain = [text.replace("€", "").replace("ï", "").replace("…", "") for text in CORPUS]
    engine.train_from_iterator(
        plain,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=[*SPECIAL, *fallback], show_progress=False
        ),
    )
    strip = decoders.Strip(" ", 1, 0)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return hf(engine)


def wordpiece() -> HFTokenizer:
    """BERT's kind: a space before every piece that does not go on with a word."""
    engine = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    engine.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False),
    )
    return hf(engine)


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": ByteTokenizer,
    "byte-bpe": lambda: train_bpe(CORPUS, 300),
    "metaspace": metaspace,
    "llama": llama,
    "wordpiece": wordpiece,
}


@functools.cache
def writer(kind: str) -> LM:
    """A random model with a tokenizer of that kind; blocks of 4, windows of 64."""
    tokenizer = KINDS[kind]()
    sizes = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8}
    config = DiTConfig(
        tokenizer.vocab_size,
        tokenizer.mask_id,
        model_length=64,
        block_size=4,
        algo="bd3lm",
        first_token=tokenizer.bos_id,
        **sizes,
    )
    return LM(randomised(DiT(config)), tokenizer)
