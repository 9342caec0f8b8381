"""Who sits where: the rows of the engine, free and taken, and the prompts whose committed blocks a
newcomer can share.

In: requests. Out: slots, and for each which committed blocks another row (or the slot itself)
already holds. Sharing is by whole blocks: a block's keys and values depend on the blocks before it
and on nothing else. Knows nothing about models or tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bdlm.core.blockmap import block_start
from bdlm.generation.engine.request import Request

SHARE_FROM = 32  # shared cells that are worth a copy


@dataclass
class Slot:
    """A request in its row. unconditional_row: the row of its unconditional row. cells: committed
    cells that are copied from row `source`."""

    row: int
    request: Request
    unconditional_row: int | None = None
    source: int | None = None
    cells: int = 0
    fresh: bool = False  # the source is a newcomer too, whose prompt is not committed yet


class PrefixCache:
    """Which rows hold which whole blocks of a prompt: chains of block hashes, checked against the
    tokens themselves."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, None]] = {}  # chain -> rows, in order
        # row -> (cells, block size, chains)
        self._held: dict[int, tuple[list[int], int, list[int]]] = {}

    @staticmethod
    def _chains(prompt: list[int], size: int) -> list[int]:
        chains, last = [], size
        for end in range(size, len(prompt) + 1, size):
            last = hash((last, tuple(prompt[end - size : end])))
            chains.append(last)
        return chains

    def add(self, row: int, prompt: list[int], size: int) -> None:
        whole = prompt[: block_start(len(prompt), size)]
        if len(whole) < SHARE_FROM:
            return
        chains = self._chains(whole, size)
        self._held[row] = (whole, size, chains)
        for chain in chains:
            self._rows.setdefault(chain, {})[row] = None

    def forget(self, row: int) -> None:
        _, _, chains = self._held.pop(row, ([], 0, []))
        for chain in chains:
            self._rows[chain].pop(row)
            if not self._rows[chain]:
                del self._rows[chain]

    def cells(self, row: int) -> int:
        """Cells that a row holds for sharing."""
        return len(self._held[row][0]) if row in self._held else 0

    def find(
        self, prompt: list[int], size: int, fits: Callable[[int], bool]
    ) -> tuple[int | None, int]:
        """The row that holds most of a prompt's whole blocks, and how many cells; (None, 0) if too
        few to be worth it.

        fits: which rows may be chosen.
        """
        for at, chain in reversed(list(enumerate(self._chains(prompt, size), 1))):
            end = at * size
            if end < SHARE_FROM:
                break
            for row in self._rows.get(chain, ()):
                held, own, _ = self._held[row]
                if fits(row) and own == size and held[:end] == prompt[:end]:
                    return row, end
        return None, 0


class SlotPool:
    """Requests by row. share: whether the model's cache can copy the start of one row to
    another."""

    def __init__(self, rows: int, share: bool) -> None:
        self.requests: list[Request | None] = [None] * rows
        self.unconditional_rows: dict[int, int] = {}  # row -> row of its unconditional row
        self._free = deque(range(rows))
        self._prefixes, self.shares = PrefixCache(), share
        # newcomers of this round whose prompt is not wholly committed
        self._fresh: set[int] = set()
        # newcomers of this round that copy from those: nobody copies from them yet
        self._behind: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def empty(self) -> bool:
        return len(self._free) == len(self.requests)

    @property
    def taken(self) -> list[int]:
        """Rows with a request, in order."""
        return [i for i, request in enumerate(self.requests) if request is not None]

    def enter(self, requests: list[Request]) -> list[Slot]:
        """Give requests a slot each, best one that already holds the start of their prompt."""
        self._fresh.clear()
        self._behind.clear()
        return [self._assign(request) for request in requests]

    def _assign(self, request: Request) -> Slot:
        prompt, size = request.prompt, request.size
        if not self.shares or request.params.guided or len(prompt) < max(SHARE_FROM, size):
            slot = Slot(self._take(request), request)
            if request.params.guided:
                slot.unconditional_row = self.unconditional_rows[slot.row] = self._take(None)
            return slot
        own, kept = self._prefixes.find(prompt, size, lambda row: self.requests[row] is None)
        other, cells = self._prefixes.find(
            prompt, size, lambda row: self.requests[row] is not None and row not in self._behind
        )
        if own is not None and kept >= cells:
            slot = Slot(self._take(request, own), request, source=own, cells=kept)
        else:
            slot = Slot(
                self._take(request), request, source=other, cells=cells, fresh=other in self._fresh
            )
        self._prefixes.add(slot.row, prompt, size)
        if slot.fresh:
            self._behind.add(slot.row)
        elif slot.cells < block_start(len(prompt), size):
            self._fresh.add(slot.row)
        return slot

    def _take(self, request: Request | None, row: int | None = None) -> int:
        if row is None:
            row = self._free.popleft()
        else:
            self._free.remove(row)
        self._prefixes.forget(row)
        self.requests[row] = request
        return row

    def leave(self, row: int, keep: bool) -> tuple[list[int], list[int]]:
        """Free a row and its unconditional row. keep: its committed prompt may be shared later.
        Returns the rows, and the cells that each keeps."""
        if not keep:
            self._prefixes.forget(row)
        rows = [
            row,
            *([self.unconditional_rows.pop(row)] if row in self.unconditional_rows else []),
        ]
        for i in rows:
            self.requests[i] = None
        self._free.extend(rows)
        return rows, [self._prefixes.cells(i) for i in rows]
