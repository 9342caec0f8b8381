"""One long run of token ids, in memory or as checksummed shards on disk.

In: documents and a tokenizer. Out: `Stream`. A cache folder is named by a hash of everything that determines its content; it is
built under another name and renamed, so it is whole or absent; shards that fail their checksum are built again.
Knows nothing about windows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bdlm.core.errors import DataError
from bdlm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same key would give other shards
SHARD_TOKENS = 1 << 24
INDEX = "index.json"


def content_key(parts: dict[str, Any]) -> str:
    """A short hash of a JSON-able description."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Stream:
    """All documents one after the other. tokens, documents: how many. bytes: UTF-8 bytes of text. key: what the content is.

    shards: arrays of ids, each `per_shard` long but the last. starts: int64 [documents], where each document starts.
    """

    def __init__(self, shards: list[np.ndarray], per_shard: int, starts: np.ndarray, bytes: int, key: str) -> None:
        self.shards, self.per_shard, self.starts, self.bytes, self.key = shards, per_shard, starts, bytes, key
        self.tokens = sum(len(shard) for shard in shards)
        self.documents = len(starts)

    def part(self, first: int, stop: int, tokenizer: Tokenizer) -> Stream:
        """The ids [first, stop) as a run of their own; a document cut at `first` counts as one that starts there."""
        ids = self.read(first, stop)
        stop = first + len(ids)
        begun = np.searchsorted(self.starts, first, side="right") - 1
        ended = np.searchsorted(self.starts, stop, side="left")
        starts = np.maximum(self.starts[begun:ended] - first, 0)
        count = sum(sum(tokenizer.byte_lengths(ids[i : i + 65536].tolist())) for i in range(0, len(ids), 65536))
        return Stream([ids], max(1, len(ids)), starts, count, content_key({"of": self.key, "first": first, "stop": stop}))

    def read(self, first: int, stop: int) -> np.ndarray:
        """The ids [first, stop) as far as there are any."""
        stop = min(stop, self.tokens)
        parts = []
        while first < stop:
            number, offset = divmod(first, self.per_shard)
            part = self.shards[number][offset : offset + stop - first]
            parts.append(part)
            first += len(part)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else self.shards[0][:0]

    def pieces(self, first: int, stop: int) -> np.ndarray:
        """Number of the document of each id in [first, stop), counted from 0 at `first`. int64."""
        document = np.searchsorted(self.starts, np.arange(first, stop), side="right")
        return np.cumsum(np.diff(document, prepend=document[:1]) > 0)


@dataclass
class Tokenised:
    """Documents as arrays of ids, `before` and `after` added to each; can be read once. bytes: of the text read so far."""

    texts: Iterable[str]
    tokenizer: Tokenizer
    before: list[int]
    after: list[int]
    bytes: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32)

    def __iter__(self) -> Iterator[np.ndarray]:
        remaining = iter(self.texts)
        while texts := list(islice(remaining, 64)):
            try:
                self.bytes += sum(len(text.encode()) for text in texts)
            except UnicodeEncodeError as error:
                raise DataError(f"a document cannot be written as UTF-8 ({error}); remove the lone surrogate") from error
            for ids in self.tokenizer.encode_batch(texts):
                yield np.array([*self.before, *ids, *self.after], dtype=self.dtype)


def in_memory(documents: Tokenised, key: str) -> Stream:
    """The run of ids as one array."""
    arrays = list(documents)
    whole = np.concatenate(arrays) if arrays else np.zeros(0, documents.dtype)
    return Stream([whole], max(1, len(whole)), _starts([len(a) for a in arrays]), documents.bytes, key)


def cached(documents: Tokenised, key: str, cache: str | os.PathLike[str], per_shard: int = SHARD_TOKENS) -> Stream:
    """The run of ids as shards in `cache`/`key`: opened if they are there and whole, else built. Raises `DataError` if it cannot."""
    folder = Path(cache) / f"{key}-{per_shard}"
    if folder.exists():
        try:
            return _open(folder, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the token cache %s is damaged (%s); it is built again", folder, error)
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
        try:
            _build(documents, beside, per_shard)
            _put(beside, folder, key)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return _open(folder, key)
    except OSError as error:
        raise DataError(f"the token cache {folder} cannot be written ({error}); free the disk or name another cache folder") from error


def _put(beside: Path, folder: Path, key: str) -> None:
    """Rename the built folder into place; another process's whole one is as good, a damaged one is replaced."""
    for _ in range(3):
        try:
            os.rename(beside, folder)
            return
        except OSError:
            try:
                _open(folder, key)
                return
            except (OSError, ValueError, KeyError, TypeError):
                shutil.rmtree(folder, ignore_errors=True)
    os.rename(beside, folder)


def _build(documents: Tokenised, folder: Path, per_shard: int) -> None:
    files: dict[str, str] = {}
    lengths: list[int] = []
    waiting: list[np.ndarray] = []
    tokens = shards = 0

    def write(name: str, array: np.ndarray) -> None:
        with open(folder / name, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        files[name] = _digest(folder / name)

    for array in documents:
        lengths.append(len(array))
        waiting.append(array)
        tokens += len(array)
        while tokens >= (shards + 1) * per_shard:
            whole = np.concatenate(waiting)
            write(f"ids-{shards:05d}.npy", whole[:per_shard])
            waiting, shards = [whole[per_shard:]], shards + 1
    rest = np.concatenate(waiting) if waiting else np.zeros(0, documents.dtype)
    if len(rest) or not shards:
        write(f"ids-{shards:05d}.npy", rest)
    write("starts.npy", _starts(lengths))
    index = {"format": FORMAT, "tokens": tokens, "bytes": documents.bytes, "per_shard": per_shard, "sha256": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _open(folder: Path, key: str) -> Stream:
    index = json.loads((folder / INDEX).read_text())
    if index["format"] != FORMAT:
        raise ValueError(f"format {index['format']}, not {FORMAT}")
    for name, digest in index["sha256"].items():
        if _digest(folder / name) != digest:
            raise ValueError(f"the checksum of {name} does not fit")
    names = sorted(name for name in index["sha256"] if name.startswith("ids-"))
    shards = [_map(folder / name) for name in names]
    stream = Stream(shards, index["per_shard"], np.load(folder / "starts.npy"), index["bytes"], key)
    if stream.tokens != index["tokens"]:
        raise ValueError(f"{stream.tokens} tokens, not {index['tokens']}")
    return stream


def _map(path: Path) -> np.ndarray:
    """The array, read from the disk as it is needed; an empty one cannot be mapped."""
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        return np.load(path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])[: len(lengths)].astype(np.int64)
