"""Shows what a model will see of a text: counts, and the first windows with their borders.

In: `Windows`. Out: `Inspection`, which prints itself with rich and turns into JSON. Knows nothing
about the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from bdlm.core.types import NOWHERE
from bdlm.data.finding import LeftOut
from bdlm.data.packing import Windows
from bdlm.data.tokenizers import END, MASK, Tokenizer

CHUNK = 1 << 16


@dataclass(frozen=True)
class Piece:
    """Hold a run of cells of one document within a window.

    doc: its number, NOWHERE (-1) for padding. text: with special tokens spelt out."""

    doc: int
    cells: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """Hold what the windows contain. Lengths in tokens; special tokens count as tokens.

    bytes: UTF-8 bytes of text; bytes_per_token over all real cells.
    vocabulary_used: ids that occur.
    shown: the first windows.
    records: those read, records_left_out of them null, broken or empty.
    bad_records: the first of these, and why.
    left_out: files of named folders that are not read, and why.
    hidden: those that start with a dot."""

    documents: int
    shortest_document: int
    median_document: float
    longest_document: int
    tokens: int
    bytes: int
    bytes_per_token: float
    vocab_size: int
    vocabulary_used: int
    windows: int
    length: int
    documents_per_window: float
    padding_cells: int
    padding_share: float
    packing: dict[str, Any]
    shown: list[list[Piece]]
    records: int = 0
    records_left_out: int = 0
    bad_records: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    hidden: list[LeftOut] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return asdict(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table("what", "value", title="what a model will see")
        table.columns[1].justify = "right"
        for name, value in self._rows():
            table.add_row(name, value)
        panels = []
        for number, pieces in enumerate(self.shown):
            body = Text()
            for piece in pieces:
                label = "padding" if piece.doc == NOWHERE else f"document {piece.doc}"
                body.append(f"-- {label}, {piece.cells} cells --\n", style="dim")
                body.append(piece.text + "\n")
            panels.append(Panel(body, title=f"window {number}"))
        if lines := self._left_out():
            panels.append(Panel(Text("\n".join(lines)), title="left out"))
        return Group(table, *panels)

    def _left_out(self) -> list[str]:
        """List what is not read, a line each; names of odd bytes are escaped so that any terminal
        can print them."""
        lines = [f"{out.path}: {out.why}" for out in (*self.left_out, *self.hidden)]
        lines += self.bad_records
        if (more := self.records_left_out - len(self.bad_records)) > 0:
            lines.append(f"and {more:,} more records")
        return [line.encode("utf-8", "backslashreplace").decode() for line in lines]

    def _rows(self) -> list[tuple[str, str]]:
        switches = ", ".join(name for name, on in self.packing.items() if on is True) or "none"
        lengths = (
            f"{self.shortest_document:,} / {self.median_document:,.0f} / {self.longest_document:,}"
        )
        return [
            ("documents", f"{self.documents:,}"),
            ("records: read / left out", f"{self.records:,} / {self.records_left_out:,}"),
            ("files left out / hidden", f"{len(self.left_out):,} / {len(self.hidden):,}"),
            ("tokens a document: shortest / median / longest", lengths),
            ("tokens", f"{self.tokens:,}"),
            ("bytes of text", f"{self.bytes:,}"),
            ("bytes per token", f"{self.bytes_per_token:.3f}"),
            ("vocabulary: used / all", f"{self.vocabulary_used:,} / {self.vocab_size:,}"),
            ("windows x cells", f"{self.windows:,} x {self.length:,}"),
            ("documents that touch a window, mean", f"{self.documents_per_window:.2f}"),
            ("padding", f"{self.padding_cells:,} cells ({self.padding_share:.4%})"),
            ("switches that are on", switches),
        ]


def inspect(windows: Windows, tokenizer: Tokenizer, shown: int = 2) -> Inspection:
    """Read all tokens, count them, and write out the first `shown` windows."""
    stream, text_cells = windows.stream, windows.packing.text_cells
    lengths = np.diff(stream.starts, append=stream.tokens)
    used = np.zeros(tokenizer.vocab_size, dtype=bool)
    for shard in stream.shards:
        for at in range(0, len(shard), CHUNK):  # an index takes 8 bytes an id
            used[np.asarray(shard[at : at + CHUNK])] = True
    first, last = (
        stream.starts // text_cells,
        np.maximum(stream.starts + lengths - 1, stream.starts) // text_cells,
    )
    cells = len(windows) * windows.length
    return Inspection(
        documents=windows.documents,
        shortest_document=int(lengths.min()),
        median_document=float(np.median(lengths)),
        longest_document=int(lengths.max()),
        tokens=windows.tokens,
        bytes=windows.bytes,
        bytes_per_token=windows.bytes / windows.tokens,
        vocab_size=tokenizer.vocab_size,
        vocabulary_used=int(used.sum()),
        windows=len(windows),
        length=windows.length,
        documents_per_window=float((last - first + 1).sum() / len(windows)),
        padding_cells=windows.padding,
        padding_share=windows.padding / cells,
        packing=asdict(windows.packing),
        shown=[_pieces(windows, number, tokenizer) for number in range(min(shown, len(windows)))],
        records=stream.tally.records,
        records_left_out=stream.tally.skipped,
        bad_records=list(stream.tally.reasons),
        left_out=list(windows.found.left_out) if windows.found else [],
        hidden=list(windows.found.hidden) if windows.found else [],
    )


def _pieces(windows: Windows, number: int, tokenizer: Tokenizer) -> list[Piece]:
    """Split a window into runs of one document each; without a document mask a border shows as the
    end token."""
    ids, doc = (cells.tolist() for cells in windows[number])
    runs = [
        (key, [i for _, i in run])
        for key, run in groupby(zip(doc, ids, strict=True), key=lambda cell: cell[0])
    ]
    return [
        Piece(key, len(run), "" if key == NOWHERE else spelt(run, tokenizer)) for key, run in runs
    ]


def spelt(ids: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of ids with the special tokens spelt out."""
    names = {tokenizer.bos_id: "<|start|>", tokenizer.eos_id: END, tokenizer.mask_id: MASK}
    parts = []
    for special, cells in groupby(ids, key=names.get):
        run = list(cells)
        parts.append(tokenizer.decode(run) if special is None else special * len(run))
    return "".join(parts)
