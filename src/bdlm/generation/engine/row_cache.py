"""The model's cache for all rows: made within a budget of bytes, and what may be done to it.

In: rows, numbers of cells. Out: cells dropped, copied from row to row, or slid out of the window.
Whole-sequence models have no cache; every method then does nothing. Knows nothing about requests or
decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdlm.core.devices import check_memory
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.types import Denoiser

CHECKED_FROM = 1 << 20  # cells from which the cache's size is compared with the machine's memory
PROBE = 256  # cells of a small cache, from which the size of a large one is computed


class RowCache:
    """A cache of R rows.

    model_cache: what the model's `new_cache` returned, or None. exists: whether there is one.
    capacity: cells that a row may hold before its window slides."""

    def __init__(self, model_cache: Any, capacity: int) -> None:
        self.model_cache, self.capacity = model_cache, capacity
        self.exists = model_cache is not None
        self._table = None if model_cache is None else model_cache.slots

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 0 if self.model_cache is None else int(self.model_cache.nbytes)

    @property
    def can_copy(self) -> bool:
        """Whether rows can copy cells from each other."""
        return hasattr(self.model_cache, "copy_prefix")

    def keep_first(self, rows: Tensor, cells: list[int]) -> None:
        """Drop all but the first cells of some rows, int64 [k]. cells: how many each row keeps."""
        if self._table is not None:
            self._table.drop(rows, torch.tensor(cells, device=rows.device))

    def copy(self, source: Tensor, rows: Tensor, rank: Tensor, position: Tensor) -> None:
        """Copy the first m cells of rows `source` to `rows`, int64 [k]. rank, position: int64 [k,
        m], of these cells."""
        self.model_cache.copy_prefix(source, rows, rank, position)

    def slide(self, num_new: Tensor, block_size: Tensor) -> Tensor | None:
        """Drop the first cells of rows that could not hold their new ones.

        num_new, block_size: int64 [R]. Cells are dropped in steps of the smallest block among the
        rows that are over. Returns the rows that slid, bool [R]; None if none did. Raises
        UnsupportedError for a cache that cannot slide."""
        if self._table is None:
            return None
        slid: Tensor | None = None
        while True:
            over = self._table.length + num_new > self.capacity
            if not bool(over.any()):
                return slid
            if not hasattr(self.model_cache, "drop_first"):
                raise UnsupportedError(
                    "this model's cache has no sliding window; ask for fewer tokens or give the"
                    " engine more capacity"
                )
            self.model_cache.drop_first(int(block_size[over].min()), over)
            slid = over if slid is None else slid | over


def allocate(
    model: Denoiser,
    num_rows: int,
    capacity: int,
    block_size: int,
    max_bytes: int | None,
    device: torch.device,
) -> tuple[RowCache, int]:
    """Make the cache of at most `num_rows` rows, as many as `max_bytes` bytes hold.

    capacity: committed cells of a row. block_size: cells of the widest block that is committed at
    once. Returns the cache and its number of rows. Raises ConfigError where not even one row fits,
    or where the machine lacks the memory; UnsupportedError for a budget on a cache without a fixed
    size."""
    spec = model.spec
    if spec.streams == 1 and spec.noise != "none":
        return RowCache(None, capacity), num_rows
    # a model's cache has room for two of its own blocks besides its capacity
    cells = capacity + max(0, block_size - 2 * spec.block_size)
    if max_bytes is not None:
        num_rows = _affordable(model, num_rows, cells, max_bytes)
    if num_rows * cells > CHECKED_FROM:
        each = model.new_cache(1, PROBE).nbytes / PROBE
        what = (
            f"a cache of {num_rows} x {cells} cells; ask for fewer new tokens, or set a"
            " context_window"
        )
        check_memory(device, int(each * num_rows * cells), what)
    cache: Any = model.new_cache(num_rows, cells)
    if hasattr(cache, "limit"):
        cache.limit = max_bytes  # draft canvases take room beyond the capacity, within the budget
    return RowCache(cache, capacity), num_rows


def _affordable(model: Denoiser, num_rows: int, cells: int, max_bytes: int) -> int:
    """At most `num_rows`, as many as `max_bytes` bytes hold."""
    each = model.new_cache(1, cells).nbytes
    if not each:
        raise UnsupportedError(
            "max_cache_bytes is given, but this model's cache grows with the text and cannot be"
            " held to a budget; leave it out"
        )
    if each > max_bytes:
        raise ConfigError(
            f"max_cache_bytes is {max_bytes}, but the cache of one row of {cells} cells takes"
            f" {each}; give more, or a smaller capacity"
        )
    return min(num_rows, max_bytes // each)
