"""The rows of the engine: which are free, which request has which, and what a new one can copy.

In: requests. Out: slots, and for each the row that already holds the start of its prompt. A guided
request takes two rows: its own and an unconditional one. Knows nothing about models or tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from bdlm.core.blockmap import block_start
from bdlm.generation.engine.prefix_cache import SHARE_FROM, PrefixCache
from bdlm.generation.engine.request import Request


@dataclass
class Slot:
    """A request that was just given a row.

    unconditional_row: its second row under guidance. source, num_copied: the first `num_copied`
    cells are copied from row `source` (which may be the slot's own row, if its previous request had
    the same prompt). source_is_new: the source was admitted in the same round, so its prompt is not
    committed yet."""

    row: int
    request: Request
    unconditional_row: int | None = None
    source: int | None = None
    num_copied: int = 0
    source_is_new: bool = False

    @property
    def rows(self) -> list[int]:
        """The request's row, and its unconditional row if there is one."""
        return [self.row] if self.unconditional_row is None else [self.row, self.unconditional_row]

    def known_tokens(self) -> list[dict[int, int]]:
        """Return the known tokens of each row by position: the prompt (for the unconditional row
        the negative prompt, which ends where the prompt ends), and known new tokens."""
        prompt, params = self.request.prompt, self.request.params
        end = len(prompt)
        new = {end + place: token for place, token in params.known_tokens.items()}
        known = [{**dict(enumerate(prompt)), **new}]
        if self.unconditional_row is not None:
            negative = params.negative_prompt_ids
            negative = negative[max(0, len(negative) - end) :]
            known.append({**dict(enumerate(negative, end - len(negative))), **new})
        return known


class SlotPool:
    """Requests by row. shares: whether rows may copy each other's prompts, which the model's cache
    must support."""

    def __init__(self, num_rows: int, shares: bool) -> None:
        self.requests: list[Request | None] = [None] * num_rows
        self.unconditional_rows: dict[int, int] = {}  # row -> its unconditional row
        self.shares = shares
        self._free = deque(range(num_rows))
        self._prefixes = PrefixCache()
        # rows of this round with a prompt that is not wholly committed
        self._uncommitted: set[int] = set()
        # rows of this round that copy from those: no other row can copy from them yet
        self._dependent: set[int] = set()

    @property
    def num_free(self) -> int:
        """How many rows are free."""
        return len(self._free)

    @property
    def empty(self) -> bool:
        """Whether no row is taken."""
        return len(self._free) == len(self.requests)

    @property
    def taken(self) -> list[int]:
        """Rows with a request, in order; unconditional rows are not among them."""
        return [row for row, request in enumerate(self.requests) if request is not None]

    def request(self, row: int) -> Request:
        """The request of a taken row."""
        request = self.requests[row]
        assert request is not None, f"row {row} has no request"
        return request

    def rows_of(self, row: int) -> list[int]:
        """A request's rows, from its own: that one, and its unconditional row if there is one."""
        other = self.unconditional_rows.get(row)
        return [row] if other is None else [row, other]

    def assign(self, requests: list[Request]) -> list[Slot]:
        """Give each request a row, if possible one that already holds the start of its prompt.
        There must be enough free rows."""
        self._uncommitted.clear()
        self._dependent.clear()
        return [self._assign(request) for request in requests]

    def _assign(self, request: Request) -> Slot:
        prompt, size = request.prompt, request.block_size
        if not self.shares or request.params.guided or len(prompt) < max(SHARE_FROM, size):
            slot = Slot(self._take(request), request)
            if request.params.guided:
                slot.unconditional_row = self.unconditional_rows[slot.row] = self._take(None)
            return slot
        free, held = self._prefixes.find(prompt, size, lambda row: self.requests[row] is None)
        other, shared = self._prefixes.find(
            prompt, size, lambda row: self.requests[row] is not None and row not in self._dependent
        )
        if free is not None and held >= shared:
            slot = Slot(self._take(request, free), request, source=free, num_copied=held)
        else:
            slot = Slot(
                self._take(request),
                request,
                source=other,
                num_copied=shared,
                source_is_new=other in self._uncommitted,
            )
        self._prefixes.add(slot.row, prompt, size)
        if slot.source_is_new:
            self._dependent.add(slot.row)
        elif slot.num_copied < block_start(len(prompt), size):
            self._uncommitted.add(slot.row)
        return slot

    def _take(self, request: Request | None, row: int | None = None) -> int:
        """Take a row, any free one by default, for a request (None: as an unconditional row)."""
        if row is None:
            row = self._free.popleft()
        else:
            self._free.remove(row)
        self._prefixes.forget(row)
        self.requests[row] = request
        return row

    def release(self, row: int, keep: bool) -> tuple[list[int], list[int]]:
        """Free a request's rows.

        keep: its committed prompt may be shared later. Returns the freed rows, and how many cells
        each keeps for that."""
        if not keep:
            self._prefixes.forget(row)
        rows = self.rows_of(row)
        self.unconditional_rows.pop(row, None)
        for each in rows:
            self.requests[each] = None
        self._free.extend(rows)
        return rows, [self._prefixes.num_cells(each) for each in rows]
