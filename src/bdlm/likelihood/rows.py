"""What is scored: windows of tokens, which of their cells count, and to which sampling unit each
cell belongs.

In: packed windows, tensors, or documents. Out: `Rows`, the same for every model and method, so that
scores are comparable (same positions, same windows, one convention for tails: the last window is
padded, padding is outside attention and loss). Knows nothing about models or noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bdlm.core.blockmap import BlockMap, Contiguous, make_layout, maskable
from bdlm.core.errors import ConfigError, DataError, nearest
from bdlm.core.types import NOWHERE, Layout
from bdlm.core.validation import Count, validated
from bdlm.data.packing import Windows

ENOUGH = 30  # fewest documents for a meaningful standard error over documents
UNITS = ("auto", "document", "window")
VIEWS = ("packed", "sliding", "documents")
_TENSORS = ("ids", "doc", "scored", "unit", "start")


@dataclass(frozen=True)
class Rows:
    """N rows of L cells. ids, doc, unit int64 [N, L]; scored bool [N, L].

    doc: document of each cell within its row, NOWHERE (-1) for padding; attention does not cross
    documents. scored: cells that the likelihood counts. The first cell of each document's run in a
    row is given, not scored. unit: the independent sampling unit of a cell, 0.. (a document or a
    window), over which the standard error is taken. start: position in its text of each row's first
    cell, int64 [N]. kind: "document" or "window", what a unit is."""

    ids: Tensor
    doc: Tensor
    scored: Tensor
    unit: Tensor
    start: Tensor
    kind: str = "document"

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    def __getitem__(self, index: slice) -> Rows:
        return self._each(lambda tensor: tensor[index])

    def taken(self, index: Tensor) -> Rows:
        """Select the rows of these numbers, int64 [R]."""
        return self._each(lambda tensor: tensor[index.to(tensor.device)])

    def to(self, device: Any) -> Rows:
        """Copy to another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)

    def trimmed(self) -> Rows:
        """Remove the columns that are padding in every row."""
        real = (self.doc != NOWHERE).any(0).nonzero()
        width = int(real.max()) + 1 if len(real) else 1
        return self._each(lambda tensor: tensor[:, :width] if tensor.dim() == 2 else tensor)

    def layout(self, map: BlockMap, context: str = "block") -> Layout:
        """Make the layout of the rows under a block map, in one row where all rows agree."""
        doc = self.doc[:1] if bool((self.doc == self.doc[:1]).all()) else self.doc
        return make_layout(map, self.length, doc, context)

    def batches(self, size: int) -> Iterator[tuple[int, Rows]]:
        """Yield (index of the first row, rows) in order."""
        for first in range(0, len(self), size):
            yield first, self[slice(first, first + size)]

    def checked(self, vocab_size: int, mask_id: int) -> Rows:
        """Return the rows themselves. Raises DataError for a token that a model of this vocabulary
        cannot generate."""
        real = self.ids[self.doc != NOWHERE]
        top, low = int(real.max()), int(real.min())
        if low < 0 or top >= vocab_size:
            wrong = low if low < 0 else top
            raise DataError(
                f"token id {wrong} is outside the model's vocabulary of {vocab_size}; use the"
                " tokenizer that the model was trained with"
            )
        if 0 <= mask_id < vocab_size and bool((real == mask_id).any()):
            raise DataError(
                f"the text holds the mask token (id {mask_id}), which no model can write; use the"
                " tokenizer that the model was trained with"
            )
        return self


@validated()
def rows_of(source: Any, max_tokens: Count | None = None, unit: str = "auto") -> Rows:
    """Make rows from anything that holds windows.

    source: `Rows`; packed `Windows`; an int64 tensor [N, L]; a pair (ids, doc) of such; an object
    with `ids` and `doc`; a mapping with those keys; or an iterable of any of these, as batches [R,
    L] or single windows [L]. Shorter windows are padded on the right. max_tokens: stop after the
    row in which this many scored tokens are reached. unit: the sampling unit of the standard error:
    "window", "document", or "auto" (documents if there are at least `ENOUGH`, else windows). Only
    packed `Windows` tell which documents span several windows; elsewhere each window's documents
    count as its own. Raises DataError when nothing can be scored."""
    if unit not in UNITS:
        raise ConfigError(f"unit is '{unit}'{nearest(unit, UNITS)}")
    if isinstance(source, Rows):
        return _by_unit(_first_tokens(source, max_tokens), unit)
    pieces, tokens = [], 0
    for ids, doc, text in _pieces(source):
        pieces.append((ids, doc, text))
        tokens += int(_scorable(doc).sum())
        if max_tokens is not None and tokens >= max_tokens:
            break
    if not pieces:
        raise DataError("there is no text to score; give a file with at least two tokens")
    return _by_unit(_first_tokens(_joined(pieces), max_tokens), unit)


def _pieces(source: Any) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield every (ids, doc) [R, L] of a source, and the document of each cell in the whole text
    where that is known."""
    fields = _fields(source)
    if isinstance(source, Windows):
        for index in torch.arange(len(source)).split(256):
            yield *source.rows(index), _text_numbers(source, index)
    elif fields is not None:
        ids = torch.as_tensor(fields[0]).long()
        doc = torch.zeros_like(ids) if fields[1] is None else torch.as_tensor(fields[1]).long()
        ids, doc = (ids[None], doc[None]) if ids.dim() == 1 else (ids, doc)
        if ids.shape != doc.shape or ids.dim() != 2:
            raise DataError(
                f"windows have ids of shape {tuple(ids.shape)} and documents of shape"
                f" {tuple(doc.shape)}; give [rows, length] for both"
            )
        yield ids, doc, None
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes):
        for item in source:
            yield from _pieces(item)
    else:
        raise DataError(
            f"cannot score a {type(source).__name__}; give packed windows or a tensor of token ids"
            " [rows, length]"
        )


def _text_numbers(windows: Windows, index: Tensor) -> Tensor:
    """Number the document of each cell in the whole text, int64 [R, L]."""
    packing, starts = windows.packing, torch.as_tensor(windows.stream.starts)
    cell = torch.arange(packing.length) - int(packing.window_special)
    cell = cell.clamp(0, packing.text_cells - 1)
    return torch.searchsorted(starts, index[:, None] * packing.text_cells + cell, right=True) - 1


def _fields(source: Any) -> tuple[Any, Any] | None:
    """Return (ids, doc) if the source itself is a window or a batch of windows."""
    if isinstance(source, Tensor):
        return source, None
    if (
        isinstance(source, tuple)
        and len(source) == 2
        and all(isinstance(x, Tensor) for x in source)
    ):
        return source
    if hasattr(source, "ids"):
        return source.ids, getattr(source, "doc", None)
    if isinstance(source, dict) and "ids" in source:
        return source["ids"], source.get("doc")
    return None


def _joined(pieces: list[tuple[Tensor, Tensor, Tensor | None]]) -> Rows:
    """Join all pieces; `unit` is the document."""
    length = max(ids.shape[1] for ids, _, _ in pieces)
    doc = torch.cat([_padded(d, length, NOWHERE) for _, d, _ in pieces]).cpu()
    ids = torch.cat([_padded(i, length, 0) for i, _, _ in pieces]).cpu()
    number = torch.arange(len(doc))[:, None] * (int(doc.max()) + 2) + doc
    if all(t is not None for _, _, t in pieces):
        number = torch.cat([_padded(t, length, 0) for _, _, t in pieces if t is not None]).cpu()
    return Rows(
        torch.where(doc == NOWHERE, 0, ids),
        doc,
        _scorable(doc),
        number,
        torch.zeros(len(doc), dtype=torch.long),
    )


def _scorable(doc: Tensor) -> Tensor:
    """Mark cells that are neither padding nor the given first cell of a document's run, bool [R,
    L]."""
    return maskable(make_layout(Contiguous(1), doc.shape[1], doc))


def _by_unit(rows: Rows, unit: str) -> Rows:
    """Number the requested units from 0."""
    documents = len(torch.unique(rows.unit[rows.scored]))
    if unit == "window" or (unit == "auto" and documents < ENOUGH):
        kind, number = "window", torch.arange(len(rows))[:, None].expand_as(rows.ids)
    else:
        kind, number = "document", rows.unit
    return replace(rows, unit=_numbered(number, rows.scored), kind=kind)


def _numbered(unit: Tensor, scored: Tensor) -> Tensor:
    """Renumber units 0, 1, ... in order; cells that are not scored join the first unit, where they
    count for nothing."""
    unit = torch.where(scored, unit, unit[scored].min())
    return torch.unique(unit, return_inverse=True)[1].view_as(unit)


def _padded(x: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[1]), value=value)


def _first_tokens(rows: Rows, max_tokens: int | None) -> Rows:
    """Keep the leading rows that hold `max_tokens` scored tokens; DataError if none is scored. The
    numbers of the units may then have gaps."""
    if rows.tokens == 0:
        raise DataError(
            "nothing to score: every document is shorter than two tokens (the first is given); give"
            " longer text"
        )
    if max_tokens is None:
        return rows
    total = rows.scored.sum(1).cumsum(0)
    keep = int((total < max_tokens).sum()) + 1
    return rows[slice(0, keep)]


def arranged(
    windows: Windows,
    view: str,
    stride: int | None = None,
    first_token: int | None = None,
    block_size: int = 1,
    most: int | None = None,
) -> Rows | Windows:
    """Arrange packed data as a view of `VIEWS` scores it: the windows themselves, or its documents
    cut differently.

    "packed": windows as in training. "sliding": each document through a window of the same length
    that moves by `stride` (default `stride_of`). "documents": each document whole, whatever its
    length. first_token: as in `sliding`. most: for the last two views, cells that are kept of each
    document, from its start, including an opening token. Raises ConfigError, DataError."""
    if view not in VIEWS:
        raise ConfigError(f"view is '{view}'{nearest(view, VIEWS)}")
    if most is not None and (view == "packed" or most < 2):
        raise ConfigError(
            f"document_tokens is {most} in view '{view}'; use 2 or more, with view 'sliding' or"
            " 'documents'"
        )
    if view == "packed":
        return windows
    kept = None if most is None else most - (first_token is not None)
    texts = [ids[:kept].tolist() for ids in _documents(windows)]
    if view == "documents":
        return whole_documents(texts, first_token)
    return sliding(
        texts,
        windows.length,
        stride_of(windows.length, block_size) if stride is None else stride,
        first_token,
    )


def _documents(windows: Windows) -> Iterator[Any]:
    """Yield the ids of each document of the whole text."""
    stream = windows.stream
    ends = [*(int(s) for s in stream.starts[1:]), stream.tokens]
    for first, end in zip(stream.starts, ends, strict=True):
        yield stream.read(int(first), end)


def whole_documents(
    documents: Iterable[Sequence[int]],
    first_token: int | None = None,
    max_length: int | None = None,
) -> Rows:
    """Make one row per document; each token is scored with all earlier ones visible.

    first_token: id put before every document (every token of it is then scored); None leaves the
    first token unscored. max_length: longer documents are cut there. Raises DataError for a
    document shorter than two tokens, or for no document."""
    texts = [text[:max_length] for text in _with_first(documents, first_token)]
    return _rows_of_lists(texts, [0] * len(texts), list(range(len(texts))), [1] * len(texts))


def continuations(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int | None = None
) -> Rows:
    """Make one row per pair (context, continuation) of ids: the context is given, the continuation
    scored. Units are pairs.

    With an empty context the continuation's first token is given. max_length: longer pairs lose the
    start of their context. Raises DataError for a pair of which nothing is scored or whose
    continuation does not fit."""
    texts, fresh = [], []
    for number, (context, continuation) in enumerate(pairs):
        cut = 0 if max_length is None else max(len(context) + len(continuation) - max_length, 0)
        if cut and cut >= len(context):
            raise DataError(
                f"the continuation of pair {number} has {len(continuation)} tokens, too many for"
                f" windows of {max_length}"
            )
        texts.append([*context[cut:], *continuation])
        fresh.append(max(len(context) - cut, 1))
        if len(texts[-1]) <= fresh[-1]:
            raise DataError(
                f"nothing of pair {number} is scored; give it a context, or a continuation of two"
                " tokens"
            )
    if not texts:
        raise DataError("there is no pair to score; give at least one")
    return _rows_of_lists(texts, [0] * len(texts), list(range(len(texts))), fresh)


def stride_of(window: int, block_size: int) -> int:
    """Choose a stride that keeps about half of the window as context and, where blocks are small
    enough, scores complete blocks."""
    kept = Contiguous(block_size).start(Contiguous(block_size).block(torch.tensor(window // 2)))
    return window - (int(kept) or max(window // 2, 1))


def sliding(
    documents: Iterable[Sequence[int]], window: int, stride: int, first_token: int | None = None
) -> Rows:
    """Cut long documents into windows that move by `stride`: each window scores what the earlier
    ones have not, with at least `window - stride` tokens of context after the first. Positions
    start at 0 in each window.

    Where `window - stride` is a multiple of the block size, complete blocks are scored; otherwise a
    part of the first one is given."""
    if not 1 <= stride < window:
        raise ConfigError(
            f"window is {window} and stride {stride}; use 1 <= stride < window, so that every token"
            " has context"
        )
    pieces = []
    start = []
    unit = []
    fresh = []
    for number, text in enumerate(_with_first(documents, first_token)):
        begin, done = 0, 1
        while done < len(text):
            end = min(begin + window, len(text))
            pieces.append(text[begin:end])
            start.append(begin)
            unit.append(number)
            fresh.append(max(done - begin, 1))
            done, begin = end, begin + stride
    return _rows_of_lists(pieces, start, unit, fresh)


def _with_first(documents: Iterable[Sequence[int]], first_token: int | None) -> list[list[int]]:
    head = [] if first_token is None else [first_token]
    texts = [head + [int(t) for t in d] for d in documents]
    if not texts:
        raise DataError("there is no text to score; give a file with at least two tokens")
    for number, text in enumerate(texts):
        if len(text) < 2:
            raise DataError(
                f"document {number} has fewer than two tokens (the first is given); drop it, or"
                " give a first_token"
            )
    return texts


def _rows_of_lists(
    pieces: list[list[int]], start: list[int], unit: list[int], fresh: list[int]
) -> Rows:
    """Make rows from lists of ids. fresh: index of the first scored cell of each row."""
    length = max(len(p) for p in pieces)
    ids = torch.zeros(len(pieces), length, dtype=torch.long)
    doc = torch.full_like(ids, NOWHERE)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
        doc[row, : len(piece)] = 0
        scored[row, fresh[row] : len(piece)] = True
    return Rows(
        ids,
        doc,
        scored,
        torch.tensor(unit)[:, None].expand_as(ids).contiguous(),
        torch.tensor(start),
    )
