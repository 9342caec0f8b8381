"""Loads tokenizers of the transformers library, by folder or by name.

In: a folder, a `tokenizer.json`, or "hf:NAME". Out: a `Tokenizer`. No code of a folder is run; only
"hf:NAME" is looked up on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bdlm.core import manifest
from bdlm.core.errors import DataError
from bdlm.core.types import NOWHERE
from bdlm.data.cutting import PIECE, cuts_of, encoded, pieces
from bdlm.data.files import write_new
from bdlm.data.tokenizer_base import BUILT_IN, DESCRIPTION, END, MASK, describe

HUB = "hf:"  # prefix of names on the Hugging Face hub


class HFTokenizer:
    """Use a tokenizer of the transformers library, by name or folder; adds a mask token if there is
    none.

    The end token is the tokenizer's own (the separator token for BERT's kind), and so is the
    opening token. Byte counts are exact for byte-level tokenizers; for others, and for added tokens
    that take the blanks around them, they are those of the token's written form.
    masked: False leaves the tokenizer unchanged, for autoregressive models without a mask token.
    opening: the token that it puts before every text, or None.
    unused_ids: ids below `vocab_size` without a token.
    Raises `DataError` if it cannot be loaded."""

    def __init__(self, name: str | os.PathLike[str], masked: bool = True) -> None:
        self._engine = _from_pretrained(os.fspath(name))
        if masked and self._engine.mask_token_id is None:
            self._engine.add_special_tokens({"mask_token": MASK})
        if masked and self._engine.eos_token_id is None and self._engine.sep_token_id is None:
            self._engine.add_special_tokens({"eos_token": END})
        engine = self._engine
        self.mask_id: int = NOWHERE if engine.mask_token_id is None else engine.mask_token_id
        self.eos_id: int | None = (
            engine.eos_token_id if engine.eos_token_id is not None else engine.sep_token_id
        )
        starts = (engine.bos_token_id, engine.cls_token_id, self.eos_id)
        self.bos_id: int | None = next((i for i in starts if i is not None), None)
        first = engine("", return_attention_mask=False)["input_ids"][:1]
        self.opening: int | None = (
            first[0] if first and first[0] in (engine.bos_token_id, engine.cls_token_id) else None
        )
        used = set(engine.get_vocab().values())
        self.vocab_size = max(used, default=-1) + 1
        self.unused_ids = frozenset(range(self.vocab_size)) - used
        # unknown words stay visible
        self._special = set(engine.all_special_ids) - (
            {engine.unk_token_id} - {self.eos_id, self.bos_id}
        )
        self._byte_level = "ByteLevel" in str(getattr(engine.backend_tokenizer, "decoder", ""))
        self._added = {
            i: len(token.content.encode()) for i, token in engine.added_tokens_decoder.items()
        }
        # the first call initialises the engine, which is not safe while another thread uses it
        self.encode("")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @cached_property
    def _cuts(self) -> re.Pattern[str] | None:
        return cuts_of(self._engine.backend_tokenizer.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return encoded(texts, lambda: self._cuts, self._encode)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        found = self._engine(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return list(found["input_ids"])

    def pieces(self, text: str) -> Iterator[str]:
        return pieces(text, self._cuts) if len(text) > 2 * PIECE else iter((text,))

    def decode(self, ids: Sequence[int]) -> str:
        return self._engine.decode(
            [i for i in ids if i not in self._special], clean_up_tokenization_spaces=False
        )

    def byte_lengths(self, ids: Sequence[int]) -> list[int]:
        tokens = self._engine.convert_ids_to_tokens(list(ids))
        spelt = self._added  # added tokens are not in the byte alphabet
        return [
            0 if i in self._special else spelt.get(i) or self._length(t)
            for i, t in zip(ids, tokens, strict=True)
        ]

    def _length(self, token: str) -> int:
        if self._byte_level:
            return len(token)  # one character of the byte alphabet per byte
        if len(token) == 6 and token.startswith("<0x"):
            return 1  # a byte that SentencePiece had no piece for
        written = (
            token.removeprefix("##") if token.startswith("##") else token.replace("\u2581", " ")
        )
        return len(written.encode("utf-8"))

    def fingerprint(self) -> str:
        return (
            self._engine.backend_tokenizer.to_str() + f" {self.mask_id} {self.eos_id} {self.bos_id}"
        )

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        write_new(Path(folder) / DESCRIPTION, describe(self, "hf"), overwrite)
        written = self._engine.save_pretrained(os.fspath(folder))
        manifest.record_if_listed(
            Path(folder), [DESCRIPTION, *(Path(file).name for file in written)]
        )

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> HFTokenizer:
        return cls(folder, masked=description["mask_id"] != NOWHERE)


def _from_pretrained(name: str) -> Any:
    """Return transformers' fast tokenizer of a folder, of a bare `tokenizer.json`, or of "hf:NAME".

    Runs no code of a folder and asks nothing. Only "hf:NAME" is looked up on the hub (or in its
    local cache): a folder that is missing is not taken for a name there.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(name) if name.endswith(".json") else Path(name) / "tokenizer.json"
    engine: Any
    try:
        if file.is_file() and not (file.parent / "tokenizer_config.json").is_file():
            engine = PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            if not name.startswith(HUB) and not Path(name).is_dir():
                raise FileNotFoundError("there is no such folder")
            with _quiet():
                engine = AutoTokenizer.from_pretrained(
                    name.removeprefix(HUB),
                    use_fast=True,
                    trust_remote_code=False,
                    local_files_only=not name.startswith(HUB),
                )
    except Exception as error:  # on a foreign folder transformers may raise anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"tokenizer '{name}' cannot be loaded ({reason}); give a folder with {DESCRIPTION} or "
            f"a tokenizer.json, {HUB}NAME for one of the Hugging Face hub, or one of: "
            f"{', '.join(BUILT_IN)}"
        ) from error
    if getattr(engine, "backend_tokenizer", None) is None:
        raise DataError(
            f"tokenizer '{name}' has no fast form, which is needed; convert it to a tokenizer.json"
        )
    # documents are cut into windows later, so long ones need no warning
    engine.model_max_length = int(1e30)
    return engine


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' remarks on the model's config, which it reads with the tokenizer."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
