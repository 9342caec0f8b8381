"""Text to token ids and back: bytes, a trained byte-level BPE, or any tokenizer that transformers
can load.

In: text. Out: ids in [0, vocab_size), where `vocab_size` counts the mask token and one end token
that separates documents and opens texts, as in GPT-2. Special tokens never come out of text: a text
that spells `<|end|>` is encoded as ordinary characters. A saved folder always holds
`bdlm_tokenizer.json`, which names the kind and the special ids. Knows nothing about models or files
of text."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bdlm.core import manifest
from bdlm.core.errors import ConfigError, DataError, pick
from bdlm.core.jsonfiles import read_json
from bdlm.core.types import NOWHERE
from bdlm.data.cutting import COMPOSED, PIECE, PLAIN, WORDS, cuts_at, cuts_of, encoded, pieces
from bdlm.data.files import write_new

DESCRIPTION = "bdlm_tokenizer.json"
HUB = "hf:"  # what a name begins with that is to be looked up on the Hugging Face hub
END, MASK = "<|end|>", "<|mask|>"


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer.

    vocab_size: number of ids, mask token included. mask_id: the mask token; NOWHERE (-1) where an
    autoregressive model's tokenizer has none. eos_id: ends a document, or None. bos_id: opens a
    window or a text, or None; the same as eos_id unless the tokenizer has its own. A tokenizer may
    also have a method `pieces(text)`, an iterator of parts of a text whose ids, joined, are those
    of the text: long texts then take little memory."""

    vocab_size: int
    mask_id: int
    eos_id: int | None
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; may use several threads, the result is the same."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Special tokens stand for nothing; bytes that are not UTF-8 become
        U+FFFD."""
        ...

    def byte_lengths(self, ids: Sequence[int]) -> list[int]:
        """How many bytes of text each id stands for; 0 for special tokens."""
        ...

    def fingerprint(self) -> str:
        """A string that is equal for two tokenizers only if they encode alike."""
        ...

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the tokenizer into a folder. Raises `DataError` if another one lies there and
        `overwrite` is not set."""
        ...


def _describe(tokenizer: Tokenizer, kind: str, **more: Any) -> bytes:
    """The content of `bdlm_tokenizer.json`."""
    special = {
        name: getattr(tokenizer, name) for name in ("vocab_size", "mask_id", "eos_id", "bos_id")
    }
    return (json.dumps({"kind": kind, **special, **more}, indent=2) + "\n").encode()


class ByteTokenizer:
    """The 256 bytes of UTF-8, then the end token (optional), then the mask: 258 ids, or 257 without
    the end token."""

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
        write_new(Path(folder) / DESCRIPTION, _describe(self, "bytes"), overwrite)
        manifest.record_if_listed(Path(folder), [DESCRIPTION])

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> ByteTokenizer:
        return cls(end=description["eos_id"] is not None)


class BPETokenizer:
    """A byte-level BPE: any text comes back exactly. The last two ids are the end token and the
    mask.

    definition: the content of a `tokenizer.json` whose vocabulary holds `<|end|>` and `<|mask|>`.
    """

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer as Engine

        try:
            self._engine = Engine.from_str(definition)
        except Exception as error:  # the library raises nothing narrower
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
        # these stand as they are spelt
        for i, token in self._engine.get_added_tokens_decoder().items():
            self._bytes[i] = 0 if token.content in (END, MASK) else len(token.content.encode())
        self._cuts = cache(lambda: cuts_of(definition))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return encoded(texts, self._cuts, self._encode)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [
            found.ids for found in self._engine.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def pieces(self, text: str) -> Iterator[str]:
        return pieces(text, self._cuts()) if len(text) > 2 * PIECE else iter((text,))

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
        write_new(Path(folder) / DESCRIPTION, _describe(self, "bpe"), overwrite)
        manifest.record_if_listed(Path(folder), [DESCRIPTION, "tokenizer.json"])

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> BPETokenizer:
        return cls((folder / "tokenizer.json").read_text(encoding="utf-8"))


WHOLE_WORDS = cuts_at(PLAIN + COMPOSED)  # of a text that is cut by `WORDS` and not normalised


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids (the 256 bytes, the merges, the end token
    and the mask together).

    A text too small for that many merges gives fewer ids. Raises `ConfigError` if `vocab_size` is
    under 258."""
    if vocab_size < 258:
        raise ConfigError(
            f"vocab_size is {vocab_size} but the 256 bytes, {END} and {MASK} alone are 258; use at"
            " least 258"
        )
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


class HFTokenizer:
    """A tokenizer of the transformers library, by name or folder; a mask token is added where there
    is none.

    The end token is the tokenizer's own (its separator token for BERT's kind), and so is the
    opening token. Byte counts are exact for byte-level tokenizers; for others, and for added tokens
    that take blanks beside them, they are those of the token's written form. Raises `DataError` if
    it cannot be loaded.
    masked: False leaves the tokenizer as it is, for autoregressive models, which know no mask
    token.
    opening: the token that it puts before every text, or None. unused_ids: ids below `vocab_size`
    that stand for no token."""

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
        self._cuts = cache(lambda: cuts_of(engine.backend_tokenizer.to_str()))
        # the first call sets the engine up, which must not happen while another thread is in it
        self.encode("")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return encoded(texts, self._cuts, self._encode)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        found = self._engine(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return list(found["input_ids"])

    def pieces(self, text: str) -> Iterator[str]:
        return pieces(text, self._cuts()) if len(text) > 2 * PIECE else iter((text,))

    def decode(self, ids: Sequence[int]) -> str:
        return self._engine.decode(
            [i for i in ids if i not in self._special], clean_up_tokenization_spaces=False
        )

    def byte_lengths(self, ids: Sequence[int]) -> list[int]:
        tokens = self._engine.convert_ids_to_tokens(list(ids))
        spelt = self._added  # added tokens stand as they are spelt, not in the byte alphabet
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
        write_new(Path(folder) / DESCRIPTION, _describe(self, "hf"), overwrite)
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
    except Exception as error:  # a folder of somebody else's: transformers raises anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"tokenizer '{name}' cannot be loaded ({reason}); give a folder with {DESCRIPTION} or "
            f"a tokenizer.json, {HUB}NAME for one of the Hugging Face hub, or one of: "
            f"{', '.join(TOKENIZERS)}"
        ) from error
    if getattr(engine, "backend_tokenizer", None) is None:
        raise DataError(
            f"tokenizer '{name}' has no fast form, which is needed; convert it to a tokenizer.json"
        )
    # documents are cut into windows later; a long one is no reason to warn
    engine.model_max_length = int(1e30)
    return engine


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' remarks on the model's config, which it reads beside the tokenizer."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(folder_or_name: str | os.PathLike[str], masked: bool = True) -> Tokenizer:
    """Return a tokenizer saved by `save`, one of `TOKENIZERS` by name, or one of transformers.

    folder_or_name: a folder, a name of `TOKENIZERS`, or "hf:NAME" for the Hugging Face hub.
    masked: False adds no mask token to one of transformers that has none (autoregressive models).
    Raises `DataError` if the folder is missing or damaged, or the name is unknown.
    """
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
            f"{folder / DESCRIPTION} or a file beside it is damaged ({error}); save the tokenizer"
            " again"
        ) from error
    for field in ("vocab_size", "mask_id", "eos_id"):
        if getattr(tokenizer, field) != description.get(field):
            raise DataError(
                f"{folder / DESCRIPTION} says {field} {description.get(field)} but the files beside"
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
