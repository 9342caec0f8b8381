"""Stores one long sequence of token ids, in memory or as checksummed shards on disk.

In: documents and a tokenizer. Out: `Stream`. A cache folder is named by a hash of everything that
determines its content; it is built under another name and renamed, so it is whole or absent; shards
that fail their checksum are built again. Knows nothing about windows."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bdlm.core.errors import DataError
from bdlm.core.manifest import sha256_of_file, sha256_of_json
from bdlm.data.cutting import PIECE, TOGETHER
from bdlm.data.tally import Tally
from bdlm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 2  # increase it when the same key would give other shards
SHARD_TOKENS = 1 << 24
INDEX = "index.json"
# raised when a damaged cache is opened
DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError)


def content_key(parts: dict[str, Any]) -> str:
    """Return a short hash of a JSON-able description."""
    return sha256_of_json(parts)[:32]


class Stream:
    """Hold all documents as one sequence of ids.

    tokens, documents: how many.
    bytes: UTF-8 bytes of text.
    key: identifies the content.
    shards: arrays of ids, each `per_shard` long except the last.
    starts: int64 [documents], where each document starts.
    tally: which records were left out when the text was read."""

    def __init__(
        self,
        shards: list[np.ndarray],
        per_shard: int,
        starts: np.ndarray,
        bytes: int,
        key: str,
        tally: Tally | None = None,
    ) -> None:
        self.shards = shards
        self.per_shard = per_shard
        self.starts = starts
        self.bytes = bytes
        self.key = key
        self.tally = Tally() if tally is None else tally
        self.tokens = sum(len(shard) for shard in shards)
        self.documents = len(starts)

    def part(self, first: int, stop: int, tokenizer: Tokenizer) -> Stream:
        """Return the ids [first, stop) as a sequence of its own; a document cut at `first` counts
        as one that starts there."""
        ids = self.read(first, stop)
        stop = first + len(ids)
        begun = np.searchsorted(self.starts, first, side="right") - 1
        ended = np.searchsorted(self.starts, stop, side="left")
        starts = np.maximum(self.starts[begun:ended] - first, 0)
        count = sum(
            sum(tokenizer.byte_lengths(ids[i : i + 65536].tolist()))
            for i in range(0, len(ids), 65536)
        )
        return Stream(
            [ids],
            max(1, len(ids)),
            starts,
            count,
            content_key({"of": self.key, "first": first, "stop": stop}),
        )

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return the ids [first, stop), as many as there are."""
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
        """Return the number of the document of each id in [first, stop), counted from 0 at `first`.
        int64."""
        document = np.searchsorted(self.starts, np.arange(first, stop), side="right")
        return np.cumsum(np.diff(document, prepend=document[:1]) > 0)


@dataclass
class Tokenised:
    """Tokenise documents into runs of ids, with `before` and `after` added to each; can be read
    once. A long document comes in several runs.

    bytes: of the text read so far.
    lengths: tokens of each document that has ended.
    tally: of the texts' records."""

    texts: Iterable[str]
    tokenizer: Tokenizer
    before: list[int]
    after: list[int]
    tally: Tally = field(default_factory=Tally)
    bytes: int = 0
    lengths: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32)

    def __iter__(self) -> Iterator[np.ndarray]:
        open_length = 0
        for group in self._groups():
            encoded = self.tokenizer.encode_batch([piece for piece, _, _ in group])
            for ids, (_, first, last) in zip(encoded, group, strict=True):
                run = np.array([*self.before * first, *ids, *self.after * last], dtype=self.dtype)
                open_length += len(run)
                if last:
                    self.lengths.append(open_length)
                    open_length = 0
                yield run

    def _groups(self) -> Iterator[list[tuple[str, bool, bool]]]:
        """Yield pieces (text, whether a document starts with it, whether it ends) in groups of
        bounded size that are encoded at once."""
        group: list[tuple[str, bool, bool]] = []
        size = 0
        for number, text in enumerate(self.texts):
            for piece, first, last in _marked(_pieces(self.tokenizer, text)):
                self.bytes += _byte_count(piece, number)
                group.append((piece, first, last))
                size += len(piece)
                if len(group) == 64 or size >= PIECE * TOGETHER:
                    yield group
                    group, size = [], 0
        if group:
            yield group


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Return the text, or parts that the tokenizer encodes to the same ids."""
    own = getattr(tokenizer, "pieces", None)
    return own(text) if own and len(text) > PIECE else iter((text,))


def _marked(pieces: Iterator[str]) -> Iterator[tuple[str, bool, bool]]:
    """Yield each piece with whether it is the first and whether it is the last."""
    piece, first = next(pieces, ""), True
    for following in pieces:
        yield piece, first, False
        piece, first = following, False
    yield piece, first, True


def _byte_count(text: str, number: int) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise DataError(
            f"document {number} cannot be written as UTF-8 ({error}); remove the lone surrogate"
        ) from error


def in_memory(documents: Tokenised, key: str) -> Stream:
    """Return the sequence of ids as one array."""
    # grows in place; a list of arrays would be copied at the end
    grown = array("H" if documents.dtype == np.uint16 else "i")
    for run in documents:
        grown.frombytes(run.tobytes())
    whole = np.frombuffer(grown, documents.dtype) if grown else np.zeros(0, documents.dtype)
    return Stream(
        [whole],
        max(1, len(whole)),
        _starts(documents.lengths),
        documents.bytes,
        key,
        documents.tally,
    )


def cached(
    documents: Tokenised, key: str, cache: str | os.PathLike[str], per_shard: int = SHARD_TOKENS
) -> Stream:
    """Return the sequence of ids as shards in `cache`/`key`: opened if they are there and whole,
    else built.

    Raises `DataError` if the folder cannot be written, or if more records were bad when it was
    built than the documents' tally allows."""
    folder = Path(cache) / f"{key}-{per_shard}"
    if folder.exists():
        try:
            stream = _open(folder, key)
            return _checked_against(stream, documents.tally)
        except DAMAGED as error:
            log.warning("the token cache %s is damaged (%s); it is built again", folder, error)
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
        try:
            _build(documents, temporary, per_shard)
            _put(temporary, folder, key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return _open(folder, key)
    except OSError as error:
        raise DataError(
            f"the token cache {folder} cannot be written ({error}); free the disk or name another"
            " cache folder"
        ) from error


def _checked_against(stream: Stream, tally: Tally) -> Stream:
    """Return the stream if as few records were left out when it was built as this tally allows."""
    tally.take_over(stream.tally)
    stream.tally = tally
    return stream


def _put(temporary: Path, folder: Path, key: str) -> None:
    """Rename the built folder into place; a whole one of another process is kept, a damaged one is
    replaced."""
    for _ in range(3):
        try:
            os.rename(temporary, folder)
            return
        except OSError:
            try:
                _open(folder, key)
                return
            except DAMAGED:
                shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)


def _build(documents: Tokenised, folder: Path, per_shard: int) -> None:
    files: dict[str, str] = {}
    waiting: list[np.ndarray] = []
    tokens = shards = 0

    def write(name: str, array: np.ndarray) -> None:
        with open(folder / name, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        files[name] = sha256_of_file(folder / name)

    for run in documents:
        waiting.append(run)
        tokens += len(run)
        while tokens >= (shards + 1) * per_shard:
            whole = np.concatenate(waiting)
            write(f"ids-{shards:05d}.npy", whole[:per_shard])
            waiting, shards = [whole[per_shard:]], shards + 1
    rest = np.concatenate(waiting) if waiting else np.zeros(0, documents.dtype)
    if len(rest) or not shards:
        write(f"ids-{shards:05d}.npy", rest)
    write("starts.npy", _starts(documents.lengths))
    index = {
        "format": FORMAT,
        "tokens": tokens,
        "bytes": documents.bytes,
        "per_shard": per_shard,
        "tally": documents.tally.to_dict(),
        "sha256": files,
    }
    (folder / INDEX).write_text(
        json.dumps({**index, "own_sha256": _own_digest(index)}, indent=2) + "\n"
    )


def _own_digest(index: dict[str, Any]) -> str:
    """Return the checksum of the index itself, of all its values but this one."""
    return sha256_of_json({k: v for k, v in index.items() if k != "own_sha256"})


def _open(folder: Path, key: str) -> Stream:
    """Open the ids in a folder. Raises one of `DAMAGED` for one that is damaged or of another
    version."""
    index = json.loads((folder / INDEX).read_text())
    if index["format"] != FORMAT:
        raise ValueError(f"format {index['format']}, not {FORMAT}")
    if index["own_sha256"] != _own_digest(index):
        raise ValueError(f"the checksum of {INDEX} does not fit")
    for name, digest in index["sha256"].items():
        if sha256_of_file(folder / name) != digest:
            raise ValueError(f"the checksum of {name} does not fit")
    names = sorted(name for name in index["sha256"] if name.startswith("ids-"))
    shards = [_map(folder / name) for name in names]
    starts = np.load(folder / "starts.npy")
    stream = Stream(
        shards, index["per_shard"], starts, index["bytes"], key, Tally.of(index["tally"])
    )
    if stream.tokens != index["tokens"]:
        raise ValueError(f"{stream.tokens} tokens, not {index['tokens']}")
    return stream


def _map(path: Path) -> np.ndarray:
    """Map the array from the disk, to be read as it is needed; an empty one cannot be mapped."""
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        return np.load(path)


def _starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])[: len(lengths)].astype(np.int64)
