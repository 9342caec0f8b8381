"""Adds to transformers' key/value cache the slot table that visibility needs.

In: the keys and values of a forward pass. Out: those at the slots that the step names. Knows
nothing about models."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from bdlm.core.cache_slots import CacheSlots
from bdlm.core.errors import ConfigError
from bdlm.core.types import NOWHERE, Step


class HFCache:
    """Hold transformers' `DynamicCache` and its slot table: slot i is its key i. Raises ConfigError
    for a capacity below 1."""

    def __init__(self, config: Any, rows: int, capacity: int, device: torch.device | str) -> None:
        from transformers import DynamicCache

        self.storage: Any = DynamicCache(config=config)
        self.slots = CacheSlots(rows, capacity, device)

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values held now (it grows with the text)."""
        tensors = [t for layer in self._layers() for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _layers(self) -> list[Any]:
        return [layer for layer in self.storage.layers if layer.is_initialized]

    def trim(self) -> None:
        """Drop the keys behind the used slots: cells of a pass that were not written, or slots
        freed since.

        Works layer by layer: if a pass raised half way, the first layers hold more than the others.
        """
        for layer in self._layers():
            beyond = layer.get_seq_length() - self.slots.used
            if beyond > 0:
                layer.crop(-beyond)  # negative: how many to remove

    def keep(self, step: Step, before: int, written: int) -> None:
        """Keep the first `written` cells of a pass, in their slots, and drop the rest.

        before: number of keys in the cache before the pass. Raises ConfigError beyond the capacity.
        """
        assert step.write is not None
        target = step.write[:, :written]
        highest = int(target.max()) if written else NOWHERE
        if highest >= self.slots.capacity:
            raise ConfigError(f"the cache holds {self.slots.capacity} cells a row; allocate more")
        if not torch.equal(
            target, before + torch.arange(written, device=target.device).expand_as(target)
        ):
            self._scatter(target, before, max(before, highest + 1))
        self.slots.record(step)
        self.trim()

    def _scatter(self, target: Tensor, before: int, size: int) -> None:
        """Move new keys and values, which are behind `before`, to slots that differ by row or were
        in use."""
        row, cell = (target >= 0).nonzero(as_tuple=True)
        slot = target[row, cell]
        for layer in self._layers():
            for name in ("keys", "values"):
                stored = getattr(layer, name)
                new = stored[row, :, before + cell]
                space = stored.new_zeros(*stored.shape[:2], max(0, size - before), stored.shape[3])
                moved = torch.cat((stored[:, :, :before], space), 2)
                moved[row, :, slot] = new
                setattr(layer, name, moved)

    def drop_first(self, count: int, rows: Tensor) -> None:
        """Drop the first `count` slots of the marked rows, bool [R] (sliding window; inexact from
        then on)."""
        self.trim()
        for layer in self._layers():
            for name in ("keys", "values"):
                moved = getattr(layer, name).clone()
                moved[rows, :, : moved.shape[2] - count] = getattr(layer, name)[rows, :, count:]
                setattr(layer, name, moved)
        self.slots.shift(count, rows)
        self.trim()


def cache_keyword(base: Any) -> str:
    """Return the name that this version of transformers gives the cache argument."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
