"""Windows in batches: one deterministic stream that can be left and taken up anywhere.

In: `Windows`. Out: `Tokens`. Row n of the stream is window perm_e[i] with e, i = divmod(n, number
of windows), and perm_e the permutation of epoch e: it depends on the seed and n alone, not on the
batch size, the processes, or what was read before. Knows nothing about noise or models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import CheckpointError, ConfigError
from bdlm.core.randomness import permutation, purpose
from bdlm.data.packing import Windows


@dataclass(frozen=True)
class Tokens:
    """A batch of windows. ids, doc: int64 [R, L], doc NOWHERE (-1) on padding. row, index: int64
    [R].

    row: number of the row in the whole run, the key of its randomness. index: which window it is.
    """

    ids: Tensor
    doc: Tensor
    row: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.doc[rows], self.row[rows], self.index[rows])

    def to(self, device: Any) -> Tokens:
        return Tokens(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def gather(windows: Windows, row: Tensor, index: Tensor) -> Tokens:
    """The batch of those windows under those row numbers."""
    return Tokens(*windows.rows(index), row=row, index=index)


class Loader:
    """An endless iterator over `Tokens`, epoch after epoch; nothing is dropped where an epoch ends
    inside a batch.

    batch_size: rows of one global batch. process p of `processes` gets rows [p, p + 1) * batch_size
    / processes of each.
    seed: of the order. shuffle: a new order for each epoch, else the windows' own. Raises
    `ConfigError` if the processes do not divide the batch."""

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        if batch_size < 1 or batch_size % processes:
            raise ConfigError(
                f"batch_size is {batch_size} but must be a positive multiple of the {processes}"
                " process(es)"
            )
        assert 0 <= process < processes
        self.windows, self.batch_size, self.seed, self.shuffle = windows, batch_size, seed, shuffle
        self.processes, self.process = processes, process
        self.consumed = 0  # rows of all processes together
        self._orders: dict[int, Tensor] = {}

    @property
    def epoch(self) -> float:
        """How many times the data has been gone through."""
        return self.consumed / len(self.windows)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Tokens:
        share = self.batch_size // self.processes
        row = self.consumed + self.process * share + torch.arange(share)
        self.consumed += self.batch_size
        return gather(self.windows, row, self._index(row))

    def _index(self, row: Tensor) -> Tensor:
        if not self.shuffle:
            return row % len(self.windows)
        epoch, place = row // len(self.windows), row % len(self.windows)
        wanted = epoch.unique().tolist()
        self._orders = {e: self._orders[e] if e in self._orders else self._order(e) for e in wanted}
        index = torch.empty_like(row)
        for e in wanted:
            index[epoch == e] = self._orders[e][place[epoch == e]]
        return index

    def _order(self, epoch: int) -> Tensor:
        return permutation(len(self.windows), purpose("order of windows"), self.seed, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands and what it is over, JSON-able."""
        return {
            "consumed": self.consumed,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "windows": self.windows.key,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the stream up where `state_dict` left it. Batch size and processes may differ.

        Raises `CheckpointError` if it was over other data, another seed or another order.
        """
        for name, mine in (
            ("windows", self.windows.key),
            ("seed", self.seed),
            ("shuffle", self.shuffle),
        ):
            if state.get(name) != mine:
                what = "data, tokenizer or window length" if name == "windows" else name
                raise CheckpointError(
                    f"the checkpoint's data stream has {name} {state.get(name)} but this run has"
                    f" {mine}; resume with the same {what}, or start a new run from the"
                    " checkpoint's weights"
                )
        self.consumed = int(state["consumed"])


def batches(windows: Windows, batch_size: int) -> Iterator[Tokens]:
    """Every window once and in order, for evaluation; the last batch may be short. `row` equals
    `index`."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size} but must be at least 1")
    for first in range(0, len(windows), batch_size):
        index = torch.arange(first, min(first + batch_size, len(windows)))
        yield gather(windows, index, index)
