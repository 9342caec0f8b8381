"""The KV cache of the native backbone: rotated keys and values, preallocated, owned by the caller,
exact.

New cells are first laid into the free slots behind the used ones, so that attention reads one view
without a copy; only the cells that a step writes are counted in; `reserve` makes more such room,
for calls with many uncommitted cells. Knows nothing about blocks or sampling.

`window` drops whole leading slots once the text outgrows it. Exact until the first drop: kept cells
still carry what they saw of the dropped ones, so from then on the cache differs from re-encoding
the window (as in the reference implementation). Rotary positions are kept, not restarted: only
relative offsets matter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.cache_slots import CacheSlots
from bdlm.core.errors import ConfigError
from bdlm.core.types import Step


class KVCache:
    """Keys and values [layers, R, H, capacity + slack, D] with their slot table.

    memory: both, [2, layers, R, H, capacity + slack, D]; `reserve` may replace it. layout: a model,
    and how its last call on this cache was laid out, which is that model's own affair."""

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        head_dim: int,
        capacity: int,
        slack: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"cache capacity is {capacity}; use at least 1 cell")
        self.memory = torch.zeros(
            2, layers, rows, heads, capacity + slack, head_dim, dtype=dtype, device=device
        )
        self.keys, self.values = self.memory[0], self.memory[1]
        self.slots = CacheSlots(rows, capacity, device)
        self.limit: int | None = None  # most bytes that `reserve` may grow to
        self.layout: tuple[Any, Any] = (None, None)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.memory.nbytes

    def reserve(self, slack: int) -> None:
        """Make room for so many uncommitted cells of a row behind the committed ones, as far as
        `limit` allows."""
        cells = self.slots.capacity + slack
        more = cells - self.keys.shape[3]
        if more > 0 and (
            self.limit is None or self.nbytes // self.keys.shape[3] * cells <= self.limit
        ):
            self.memory = F.pad(self.memory, (0, 0, 0, more))
            self.keys, self.values = self.memory[0], self.memory[1]

    def lay(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the used slots followed by the new cells' [R, H, N, D]: a view when
        the slack holds them."""
        used, end = self.slots.used, self.slots.used + k.shape[2]
        if used == 0:
            return k, v
        keys, values = self.keys[layer], self.values[layer]
        if end > keys.shape[2]:
            return torch.cat((keys[:, :, :used], k), 2), torch.cat((values[:, :, :used], v), 2)
        keys[:, :, used:end] = k
        values[:, :, used:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def store(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Keep the cells that `step.write` places. After attention: the slots may lie where `lay`
        put other cells."""
        assert step.write is not None
        row, cell = (step.write >= 0).nonzero(as_tuple=True)
        slot = step.write[row, cell]
        if slot.numel() and int(slot.max()) >= self.slots.capacity:
            raise ConfigError(
                f"the cache holds {self.slots.capacity} cells a row; allocate more or use a sliding"
                " window"
            )
        self.keys[layer][row, :, slot] = k[row, :, cell]
        self.values[layer][row, :, slot] = v[row, :, cell]

    def copy_prefix(self, source: Tensor, rows: Tensor, rank: Tensor, position: Tensor) -> None:
        """Let some rows hold the first n cells that other rows hold, and nothing else.

        source, rows: int64 [k], all different rows. rank, position: int64 [k, n], of those cells.
        """
        count = rank.shape[1]
        self.keys[:, rows, :, :count] = self.keys[:, source, :, :count]
        self.values[:, rows, :, :count] = self.values[:, source, :, :count]
        self.slots.restore(rows, rank, position)

    def drop_first(self, count: int, rows: Tensor) -> None:
        """Forget the first `count` slots of the marked rows, bool [R] (sliding window)."""
        end = self.slots.used
        for tensor in (self.keys, self.values):
            tensor[:, rows, :, : end - count] = tensor[:, rows, :, count:end]
        self.slots.shift(count, rows)
