"""Which rows hold which committed blocks of a prompt, so that new requests can copy them.

In: prompts by row. Out: for a new prompt, the row that holds the longest shared start. Sharing is
by whole blocks: the keys and values of a block depend on the blocks before it and on nothing else.
Knows nothing about requests, models or tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bdlm.core.blockmap import block_start

SHARE_FROM = 32  # fewer shared cells are not worth a copy


@dataclass(frozen=True)
class _Prefix:
    """The whole blocks of one row's prompt, and the hash of each block and all blocks before it."""

    tokens: list[int]
    block_size: int
    hashes: list[int]


class PrefixCache:
    """An index from chained block hashes to rows; tokens are compared too, so that a hash collision
    is harmless."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, None]] = {}  # hash -> rows, in the order of `add`
        self._prefixes: dict[int, _Prefix] = {}  # by row

    @staticmethod
    def _hashes(prompt: list[int], block_size: int) -> list[int]:
        hashes, last = [], block_size
        for end in range(block_size, len(prompt) + 1, block_size):
            last = hash((last, tuple(prompt[end - block_size : end])))
            hashes.append(last)
        return hashes

    def add(self, row: int, prompt: list[int], block_size: int) -> None:
        """Record that a row holds (or is about to hold) the whole blocks of a prompt."""
        whole = prompt[: block_start(len(prompt), block_size)]
        if len(whole) < SHARE_FROM:
            return
        hashes = self._hashes(whole, block_size)
        self._prefixes[row] = _Prefix(whole, block_size, hashes)
        for key in hashes:
            self._rows.setdefault(key, {})[row] = None

    def forget(self, row: int) -> None:
        """Remove a row before its cells are overwritten. Unknown rows are ignored."""
        prefix = self._prefixes.pop(row, None)
        for key in [] if prefix is None else prefix.hashes:
            self._rows[key].pop(row)
            if not self._rows[key]:
                del self._rows[key]

    def num_cells(self, row: int) -> int:
        """How many cells a row holds for sharing."""
        return len(self._prefixes[row].tokens) if row in self._prefixes else 0

    def find(
        self, prompt: list[int], block_size: int, eligible: Callable[[int], bool]
    ) -> tuple[int | None, int]:
        """Find the row that holds the most whole blocks of a prompt.

        eligible: which rows may be chosen. Returns the row and the number of shared cells; (None,
        0) if no row shares at least `SHARE_FROM` cells."""
        for number, key in reversed(list(enumerate(self._hashes(prompt, block_size), 1))):
            end = number * block_size
            if end < SHARE_FROM:
                break
            for row in self._rows.get(key, ()):
                prefix = self._prefixes[row]
                same = prefix.block_size == block_size and prefix.tokens[:end] == prompt[:end]
                if eligible(row) and same:
                    return row, end
        return None, 0
