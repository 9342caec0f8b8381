"""Defines the contract of every tokenizer, and the description that is saved with it.

In: a tokenizer. Out: the content of `bdlm_tokenizer.json`. Knows nothing about kinds of tokenizers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

DESCRIPTION = "bdlm_tokenizer.json"
BUILT_IN = ("bytes", "bytes-no-end")  # names of `tokenizers.TOKENIZERS`
END, MASK = "<|end|>", "<|mask|>"


@runtime_checkable
class Tokenizer(Protocol):
    """State what the library needs of a tokenizer.

    vocab_size: number of ids, mask token included.
    mask_id: the mask token; NOWHERE (-1) if an autoregressive model's tokenizer has none.
    eos_id: ends a document, or None.
    bos_id: opens a window or a text, or None; the same as eos_id unless the tokenizer has its own.

    A tokenizer may also have a method `pieces(text)`, an iterator of parts of a text whose
    concatenated ids are those of the text: long texts then take little memory."""

    vocab_size: int
    mask_id: int
    eos_id: int | None
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text; may use several threads, the result is the same."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Special tokens give no text; bytes that are not UTF-8 become
        U+FFFD."""
        ...

    def byte_lengths(self, ids: Sequence[int]) -> list[int]:
        """Return how many bytes of text each id stands for; 0 for special tokens."""
        ...

    def fingerprint(self) -> str:
        """Return a string that is equal for two tokenizers only if they encode alike."""
        ...

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the tokenizer into a folder. Raises `DataError` if it holds another one and
        `overwrite` is not set."""
        ...


def describe(tokenizer: Tokenizer, kind: str, **more: Any) -> bytes:
    """Return the content of `bdlm_tokenizer.json`."""
    special = {
        name: getattr(tokenizer, name) for name in ("vocab_size", "mask_id", "eos_id", "bos_id")
    }
    return (json.dumps({"kind": kind, **special, **more}, indent=2) + "\n").encode()
