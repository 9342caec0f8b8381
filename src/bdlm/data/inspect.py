"""What a model will see of a text: counts, and the first windows written out with their borders.

In: `Windows`. Out: `Inspection`, which prints itself with rich and turns into JSON. Knows nothing about the command line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from bdlm.core.types import NOWHERE
from bdlm.data.packing import Windows
from bdlm.data.tokenizers import END, MASK, Tokenizer


@dataclass(frozen=True)
class Piece:
    """A run of cells of one document within a window. doc: its number, NOWHERE (-1) for padding. text: special tokens are spelt out."""

    doc: int
    cells: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """What the windows hold. Lengths in tokens; special tokens count as tokens.

    bytes: UTF-8 bytes of text, bytes_per_token over all real cells. vocabulary_used: ids that occur. shown: the first windows.
    """

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

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
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
        return Group(table, *panels)

    def _rows(self) -> list[tuple[str, str]]:
        switches = ", ".join(name for name, on in self.packing.items() if on is True) or "none"
        lengths = f"{self.shortest_document:,} / {self.median_document:,.0f} / {self.longest_document:,}"
        return [
            ("documents", f"{self.documents:,}"),
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
    """Look through all tokens and write out the first `shown` windows."""
    stream, room = windows.stream, windows.packing.room
    lengths = np.diff(stream.starts, append=stream.tokens)
    used = np.zeros(tokenizer.vocab_size, dtype=bool)
    for shard in stream.shards:
        used[np.asarray(shard)] = True
    first, last = stream.starts // room, np.maximum(stream.starts + lengths - 1, stream.starts) // room
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
    )


def _pieces(windows: Windows, number: int, tokenizer: Tokenizer) -> list[Piece]:
    """A window as runs of one document each; without a document mask a border shows as the end token in the text."""
    ids, doc = (cells.tolist() for cells in windows[number])
    runs = [(key, [i for _, i in run]) for key, run in groupby(zip(doc, ids, strict=True), key=lambda cell: cell[0])]
    return [Piece(key, len(run), "" if key == NOWHERE else spelt(run, tokenizer)) for key, run in runs]


def spelt(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids with the special tokens spelt out."""
    names = {tokenizer.bos_id: "<|start|>", tokenizer.eos_id: END, tokenizer.mask_id: MASK}
    parts = []
    for special, cells in groupby(ids, key=names.get):
        run = list(cells)
        parts.append(tokenizer.decode(run) if special is None else special * len(run))
    return "".join(parts)
