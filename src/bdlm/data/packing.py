"""Packs documents into windows of L cells: concatenate and cut, nothing dropped; the ids are cached
as shards on disk.

In: documents and a tokenizer. Out: `Windows`, which give token ids and the document of each cell.
The last window is padded (doc = NOWHERE). The cache holds the sequence of ids, not the windows: it
serves every length. Knows nothing about batches or order."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, DataError, pick
from bdlm.core.types import NOWHERE
from bdlm.data.detokenizers import DETOKENIZERS
from bdlm.data.shards import Stream, Tokenised, cached, content_key, in_memory
from bdlm.data.sources import Found, ListSource, documents, find_sources
from bdlm.data.tally import BAD_RECORDS, Tally
from bdlm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Packing:
    """State how documents become windows of `length` cells.

    document_eos: append the end token to each document.
    document_bos: open each document with the opening token (useful with `document_mask`, where the
    end token of the document before is not seen).
    window_special: each window is the opening token, length - 2 tokens of text and the end token.
    document_mask: number the documents of a window, so that they do not see each other; without it
    the whole window is one document.
    Raises `ConfigError` for a window that is too short."""

    length: int = 256
    document_eos: bool = True
    document_bos: bool = False
    window_special: bool = False
    document_mask: bool = False

    def __post_init__(self) -> None:
        least = 3 if self.window_special else 2
        if self.length < least:
            raise ConfigError(
                f"length is {self.length} but a window needs at least {least} cells; use a longer"
                " one, such as 256"
            )

    @property
    def text_cells(self) -> int:
        """Return the cells of a window that hold documents."""
        return self.length - 2 if self.window_special else self.length

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise `ConfigError` if a switch needs a special token that the tokenizer does not
        have."""
        needs = {
            "document_eos": tokenizer.eos_id,
            "document_bos": tokenizer.bos_id,
            "window_special": None if tokenizer.bos_id is None else tokenizer.eos_id,
        }
        for switch, token in needs.items():
            if getattr(self, switch) and token is None:
                raise ConfigError(
                    f"{switch} is on but the tokenizer has no such special token; turn it off or"
                    " use another tokenizer"
                )


class Windows:
    """Cut a sequence of ids into windows. `windows[i]` is (ids, doc), int64 [length] each; doc is
    NOWHERE (-1) on padding.

    length: cells of a window.
    tokens: real cells, special tokens included.
    bytes: UTF-8 bytes of the documents' text.
    documents: their number.
    padding: cells of padding, all at the end of the last window.
    key: equal for equal windows only.
    found: the sources, and what named folders also hold; None for documents in memory."""

    def __init__(
        self, stream: Stream, packing: Packing, tokenizer: Tokenizer, found: Found | None = None
    ) -> None:
        packing.check(tokenizer)
        self.found = found
        self.packing, self.length = packing, packing.length
        self.stream, self.tokenizer = stream, tokenizer
        self._bos, self._eos = tokenizer.bos_id, tokenizer.eos_id
        self._pad = 0 if tokenizer.eos_id is None else tokenizer.eos_id
        self._count = -(-stream.tokens // packing.text_cells)
        self.tokens = stream.tokens + (2 * self._count if packing.window_special else 0)
        self.bytes = stream.bytes
        self.documents = stream.documents
        self.padding = self._count * packing.length - self.tokens
        self.key = content_key(
            {
                "stream": stream.key,
                "length": packing.length,
                "special": packing.window_special,
                "mask": packing.document_mask,
            }
        )

    def __len__(self) -> int:
        return self._count

    def part(self, first: int, stop: int) -> Windows:
        """Return the windows [first, stop) as `Windows`; their bytes are counted token by token.

        Raises `ConfigError` for an empty part."""
        if not 0 <= first < stop <= len(self):
            raise ConfigError(
                f"windows [{first}, {stop}) of {len(self)}: the part is empty or beyond the end;"
                " use more text or shorter windows"
            )
        text_cells = self.packing.text_cells
        return Windows(
            self.stream.part(first * text_cells, stop * text_cells, self.tokenizer),
            self.packing,
            self.tokenizer,
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        ids, doc = self.rows(torch.tensor([index % len(self)]))
        return ids[0], doc[0]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return several windows: ids and doc, int64 [R, length], for the window numbers int64
        [R]."""
        ids = np.full((len(index), self.length), self._pad, dtype=np.int64)
        doc = np.full((len(index), self.length), NOWHERE, dtype=np.int64)
        for row, window in enumerate(index.tolist()):
            self._fill(ids[row], doc[row], window)
        return torch.from_numpy(ids), torch.from_numpy(doc)

    def _fill(self, ids: np.ndarray, doc: np.ndarray, window: int) -> None:
        first = window * self.packing.text_cells
        text = self.stream.read(first, first + self.packing.text_cells)
        at = 1 if self.packing.window_special else 0
        stop = at + len(text)
        ids[at:stop] = text
        doc[at:stop] = (
            self.stream.pieces(first, first + len(text)) if self.packing.document_mask else 0
        )
        if self.packing.window_special:  # the special tokens belong to their neighbours
            ids[0], doc[0] = self._bos, 0
            ids[stop], doc[stop] = self._eos, doc[stop - 1]


def pack(
    texts: Iterable[str], tokenizer: Tokenizer, packing: Packing, detokenizer: str = "none"
) -> Windows:
    """Pack documents in memory. Raises `DataError` if they make fewer than two tokens."""
    found = Found([ListSource(tuple(texts))], [], [])
    return _windows(found, tokenizer, packing, detokenizer, None, None, "the documents", Tally())


def prepare(
    data: str | os.PathLike[str] | list[str],
    tokenizer: Tokenizer,
    packing: Packing,
    *,
    field: str = "text",
    split: str = "file",
    detokenizer: str = "none",
    limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    bad_records: float = BAD_RECORDS,
) -> Windows:
    """Pack named data (see `sources.open_sources` for names), tokenised once and kept in the folder
    `cache`.

    field, split: where a file's documents are.
    detokenizer: one of `DETOKENIZERS`.
    limit: use the first documents only.
    cache: None keeps the ids in memory. A damaged cache is detected by its checksums and built
    again.
    bad_records: how many records may be null, broken or empty; below 1 a share of all, else their
    number. They are left out, with a warning; more is a `DataError`.
    Raises `DataError` for data that is missing, empty, not UTF-8 or of fewer than two tokens,
    `ConfigError` for options that do not fit."""
    tally = Tally(bad_records)
    found = find_sources(data, field, split)
    name = ", ".join(map(str, data)) if isinstance(data, list) else str(data)
    return _windows(found, tokenizer, packing, detokenizer, limit, cache, name, tally)


def _windows(
    found: Found,
    tokenizer: Tokenizer,
    packing: Packing,
    detokenizer: str,
    limit: int | None,
    cache: str | os.PathLike[str] | None,
    name: str,
    tally: Tally,
) -> Windows:
    packing.check(tokenizer)
    clean = pick("detokenizer", detokenizer, DETOKENIZERS)
    texts = (clean(text) for text in documents(found.sources, limit, tally))
    before = [tokenizer.bos_id] if packing.document_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if packing.document_eos and tokenizer.eos_id is not None else []
    tokenised = Tokenised(texts, tokenizer, before, after, tally)
    key = content_key(
        {
            "sources": [source.fingerprint() for source in found.sources],
            "tokenizer": tokenizer.fingerprint(),
            "detokenizer": detokenizer,
            "limit": limit,
            "before": before,
            "after": after,
        }
    )
    stream = in_memory(tokenised, key) if cache is None else cached(tokenised, key, cache)
    if stream.tokens - stream.documents * (len(before) + len(after)) < 2:
        raise DataError(f"{name} makes fewer than two tokens of text; give longer documents")
    return Windows(stream, packing, tokenizer, found)
