"""Turns text into token ids and back: bytes, a trained byte-level BPE, or any tokenizer that
transformers can load.

In: text. Out: ids in [0, vocab_size), where `vocab_size` counts the mask token and one end token
that separates documents and opens texts, as in GPT-2. Special tokens never come out of text: a text
that spells `<|end|>` is encoded as ordinary characters. A saved folder always holds
`bdlm_tokenizer.json`, which names the kind and the special ids. Knows nothing about models or files
of text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from bdlm.core import manifest
from bdlm.core.errors import DataError, pick
from bdlm.core.jsonfiles import read_json
from bdlm.core.validation import AtLeast, coerce
from bdlm.data.cutting import COMPOSED, PIECE, PLAIN, WORDS, cuts_at, cuts_of, encoded, pieces
from bdlm.data.files import write_new
from bdlm.data.hf_tokenizer import HFTokenizer
from bdlm.data.tokenizer_base import DESCRIPTION, END, MASK, Tokenizer, describe

__all__ = [
    "DESCRIPTION",
    "END",
    "KINDS",
    "MASK",
    "TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "HFTokenizer",
    "Tokenizer",
    "check_fits",
    "load_tokenizer",
    "train_bpe",
]

BPESize = Annotated[int, AtLeast(258, f"use at least 258: the 256 bytes, {END} and {MASK}")]


class ByteTokenizer:
    """Encode text as the 256 bytes of UTF-8, then the end token (optional), then the mask: 258 ids,
    or 257 without the end token."""

    def __init__(self, end: bool = True) -> None:
        self.eos_id: int | None = 256 if end else None
        self.bos_id: int | None = self.eos_id
        self.mask_id = 257 if end else 256
        self.vocab_size = self.mask_id + 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def pieces(self, text: str) -> Iterator[str]:
        return (text[i : i + PIECE] for i in range(0, len(text), PIECE))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def byte_lengths(self, ids: Sequence[int]) -> list[int]:
        return [int(0 <= i < 256) for i in ids]

    def fingerprint(self) -> str:
        return f"bytes-{self.vocab_size}"

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        write_new(Path(folder) / DESCRIPTION, describe(self, "bytes"), overwrite)
        manifest.record_if_listed(Path(folder), [DESCRIPTION])

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> ByteTokenizer:
        return cls(end=description["eos_id"] is not None)


class BPETokenizer:
    """Encode text by a byte-level BPE: any text comes back exactly. The last two ids are the end
    token and the mask.

    definition: the content of a `tokenizer.json` with `<|end|>` and `<|mask|>` in its vocabulary.
    Raises `DataError` for other content."""

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer as Engine

        try:
            self._engine = Engine.from_str(definition)
        except Exception as error:  # the library raises no narrower type
            raise DataError(f"this is not the content of a tokenizer.json: {error}") from error
        self._engine.encode_special_tokens = True  # text that spells a special token stays text
        self._definition = definition
        end, mask = self._engine.token_to_id(END), self._engine.token_to_id(MASK)
        if end is None or mask is None:
            raise DataError(
                f"the tokenizer has no {END} or {MASK} token; train it with train_bpe, or load it"
                " with HFTokenizer"
            )
        self.mask_id: int = mask
        self.eos_id: int | None = end
        self.bos_id: int | None = end
        self.vocab_size: int = self._engine.get_vocab_size()
        tokens = (str(self._engine.id_to_token(i)) for i in range(self.vocab_size))
        self._bytes = [len(t) for t in tokens]  # one character of the byte alphabet per byte
        # added tokens are not in the byte alphabet
        for i, token in self._engine.get_added_tokens_decoder().items():
            self._bytes[i] = 0 if token.content in (END, MASK) else len(token.content.encode())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        return cuts_of(self._definition)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return encoded(texts, lambda: self._cuts, self._encode)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [
            found.ids for found in self._engine.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def pieces(self, text: str) -> Iterator[str]:
        return pieces(text, self._cuts) if len(text) > 2 * PIECE else iter((text,))

    def decode(self, ids: Sequence[int]) -> str:
        return self._engine.decode(
            [i for i in ids if i not in (self.eos_id, self.mask_id)], skip_special_tokens=False
        )

    def byte_lengths(self, ids: Sequence[int]) -> list[int]:
        return [self._bytes[i] for i in ids]

    def fingerprint(self) -> str:
        return self._definition

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        write_new(Path(folder) / "tokenizer.json", self._definition.encode(), overwrite)
        write_new(Path(folder) / DESCRIPTION, describe(self, "bpe"), overwrite)
        manifest.record_if_listed(Path(folder), [DESCRIPTION, "tokenizer.json"])

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> BPETokenizer:
        return cls((folder / "tokenizer.json").read_text(encoding="utf-8"))


WHOLE_WORDS = cuts_at(PLAIN + COMPOSED)  # for text that `WORDS` splits, not normalised


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids (the 256 bytes, the merges, the end token
    and the mask together).

    A text too small for that many merges gives fewer ids. Raises `ConfigError` if `vocab_size` is
    under 258."""
    coerce("vocab_size", vocab_size, BPESize)
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Engine

    engine = Engine(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(
        (piece for text in texts for piece in pieces(text, WHOLE_WORDS)), trainer
    )
    engine.add_special_tokens([END, MASK])
    return BPETokenizer(engine.to_str(pretty=True))


def load_tokenizer(folder_or_name: str | os.PathLike[str], masked: bool = True) -> Tokenizer:
    """Load a tokenizer saved by `save`, one of `TOKENIZERS` by name, or one of transformers.

    folder_or_name: a folder, a name of `TOKENIZERS`, or "hf:NAME" for the Hugging Face hub.
    masked: False adds no mask token to one of transformers that has none (autoregressive models).
    Raises `DataError` if the folder is missing or damaged, or the name is unknown."""
    name = os.fspath(folder_or_name)
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    folder = Path(name)
    if not (folder / DESCRIPTION).is_file():
        return HFTokenizer(name, masked)
    description = read_json(folder / DESCRIPTION, DataError)
    try:
        tokenizer = pick("tokenizer kind", description["kind"], KINDS).load(folder, description)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DataError) as error:
        raise DataError(
            f"{folder / DESCRIPTION} or another file of its folder is damaged ({error}); save"
            " the tokenizer again"
        ) from error
    for field in ("vocab_size", "mask_id", "eos_id"):
        if getattr(tokenizer, field) != description.get(field):
            raise DataError(
                f"{folder / DESCRIPTION} says {field} {description.get(field)} but the files with"
                f" it give {getattr(tokenizer, field)}; save the tokenizer again"
            )
    return tokenizer


def check_fits(tokenizer: Tokenizer, vocab_size: int, mask_id: int, padded: bool = False) -> None:
    """Raise `DataError` unless a model of `vocab_size` ids (mask included) with that `mask_id` can
    read the tokenizer's ids.

    padded: whether the model may have more ids than the tokenizer, as rounded vocabularies do.
    """
    if tokenizer.vocab_size > vocab_size or (tokenizer.vocab_size < vocab_size and not padded):
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model has vocab_size"
            f" {vocab_size} (mask included both times); use the tokenizer that the model was"
            " trained with"
        )
    if tokenizer.mask_id != mask_id:
        raise DataError(
            f"the tokenizer has mask_id {tokenizer.mask_id} but the model {mask_id}; use the"
            " tokenizer that the model was trained with"
        )


# what bdlm_tokenizer.json may name
KINDS: dict[str, Any] = {"bytes": ByteTokenizer, "bpe": BPETokenizer, "hf": HFTokenizer}
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "bytes-no-end": lambda: ByteTokenizer(end=False),
}
