"""Who sits where: the rows of the engine, free and taken, and the prompts whose committed blocks a newcomer can share.

In: requests. Out: seats, and for each which committed blocks another row (or the seat itself) already holds. Sharing is by whole
blocks: a block's keys and values depend on the blocks before it and on nothing else. Knows nothing about models or tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bdlm.core.blockmap import block_start
from bdlm.generation.requests import Request

SHARE_FROM = 32  # shared cells that are worth a copy


@dataclass
class Seat:
    """A request in its row. shadow: the row of its unconditional twin. cells: committed cells that are copied from row `source`."""

    row: int
    request: Request
    shadow: int | None = None
    source: int | None = None
    cells: int = 0
    fresh: bool = False  # the source is a newcomer too, whose prompt is not committed yet


class Prefixes:
    """Which rows hold which whole blocks of a prompt: chains of block hashes, checked against the tokens themselves."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, None]] = {}  # chain -> rows, in order
        self._held: dict[int, tuple[list[int], int, list[int]]] = {}  # row -> (cells, block size, chains)

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

    def find(self, prompt: list[int], size: int, fits: Callable[[int], bool]) -> tuple[int | None, int]:
        """The row that holds most of a prompt's whole blocks, and how many cells; (None, 0) if too few to be worth it.

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


class Seats:
    """Requests by row. share: whether the model's cache can copy the start of one row to another."""

    def __init__(self, rows: int, share: bool) -> None:
        self.at: list[Request | None] = [None] * rows
        self.shadow: dict[int, int] = {}  # row -> row of its unconditional twin
        self._free = deque(range(rows))
        self._prefixes, self.shares = Prefixes(), share
        self._fresh: set[int] = set()  # newcomers of this round whose prompt is not wholly committed
        self._behind: set[int] = set()  # newcomers of this round that copy from those: nobody copies from them yet

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def empty(self) -> bool:
        return len(self._free) == len(self.at)

    @property
    def taken(self) -> list[int]:
        """Rows with a request, in order."""
        return [i for i, request in enumerate(self.at) if request is not None]

    def enter(self, requests: list[Request]) -> list[Seat]:
        """Give requests a seat each, best one that already holds the start of their prompt."""
        self._fresh.clear()
        self._behind.clear()
        return [self._sit(request) for request in requests]

    def _sit(self, request: Request) -> Seat:
        prompt, size = request.prompt, request.size
        if not self.shares or request.params.guided or len(prompt) < max(SHARE_FROM, size):
            seat = Seat(self._take(request), request)
            if request.params.guided:
                seat.shadow = self.shadow[seat.row] = self._take(None)
            return seat
        own, kept = self._prefixes.find(prompt, size, lambda row: self.at[row] is None)
        other, cells = self._prefixes.find(prompt, size, lambda row: self.at[row] is not None and row not in self._behind)
        if own is not None and kept >= cells:
            seat = Seat(self._take(request, own), request, source=own, cells=kept)
        else:
            seat = Seat(self._take(request), request, source=other, cells=cells, fresh=other in self._fresh)
        self._prefixes.add(seat.row, prompt, size)
        if seat.fresh:
            self._behind.add(seat.row)
        elif seat.cells < block_start(len(prompt), size):
            self._fresh.add(seat.row)
        return seat

    def _take(self, request: Request | None, row: int | None = None) -> int:
        if row is None:
            row = self._free.popleft()
        else:
            self._free.remove(row)
        self._prefixes.forget(row)
        self.at[row] = request
        return row

    def leave(self, row: int, keep: bool) -> tuple[list[int], list[int]]:
        """Free a row and its twin. keep: its committed prompt may be shared later. Returns the rows, and the cells that each keeps."""
        if not keep:
            self._prefixes.forget(row)
        rows = [row, *([self.shadow.pop(row)] if row in self.shadow else [])]
        for i in rows:
            self.at[i] = None
        self._free.extend(rows)
        return rows, [self._prefixes.cells(i) for i in rows]
