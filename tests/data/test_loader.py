"""The stream of batches: one order for any batch size and any number of processes, resumed exactly,
nothing dropped."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdlm.core.errors import CheckpointError, ConfigError
from bdlm.data.loader import Loader, Tokens, batches
from bdlm.data.packing import Packing, Windows, pack
from bdlm.data.tokenizers import ByteTokenizer


def windows_of(count: int, length: int = 4) -> Windows:
    """That many windows, no two of them alike; the last is padded."""
    text = "".join(chr(97 + i // 26) + chr(97 + i % 26) for i in range(count * length // 2))[
        : count * length - 1
    ]
    windows = pack([text], ByteTokenizer(), Packing(length, document_eos=False))
    assert len(windows) == count
    return windows


def taken(loader: Loader, count: int) -> Tokens:
    """The next batches, put together."""
    found = list(islice(loader, count))
    return Tokens(
        *(torch.cat([getattr(b, name) for b in found]) for name in ("ids", "doc", "row", "index"))
    )


def equal(a: Tokens, b: Tokens) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "doc", "row", "index")
    )


SIZES = st.integers(2, 17)


@given(count=SIZES, rows=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_window_once(count: int, rows: int, seed: int) -> None:
    windows = windows_of(count)
    stream = taken(Loader(windows, rows, seed), -(-3 * count // rows))
    assert torch.equal(stream.row, torch.arange(len(stream)))
    for epoch in range(3):
        assert sorted(stream.index[epoch * count : (epoch + 1) * count].tolist()) == list(
            range(count)
        )
    for place, number in enumerate(stream.index.tolist()):
        assert torch.equal(stream.ids[place], windows[number][0])
        assert torch.equal(stream.doc[place], windows[number][1])


@given(count=SIZES, share=st.integers(1, 4), processes=st.integers(1, 4), seed=st.integers(0, 99))
def test_processes_and_batch_sizes_cut_one_stream(
    count: int, share: int, processes: int, seed: int
) -> None:
    windows, rows = windows_of(count), share * processes
    alone = taken(Loader(windows, 1, seed), 5 * rows)
    loaders = [
        Loader(windows, rows, seed, processes=processes, process=p) for p in range(processes)
    ]
    together = [next(loader) for _ in range(5) for loader in loaders]
    assert all(len(b) == share for b in together)
    assert equal(
        alone,
        Tokens(
            *(torch.cat([getattr(b, n) for b in together]) for n in ("ids", "doc", "row", "index"))
        ),
    )


@given(count=SIZES, rows=st.integers(1, 9), before=st.integers(0, 9), shuffle=st.booleans())
def test_a_resumed_stream_is_the_uninterrupted_one(
    count: int, rows: int, before: int, shuffle: bool
) -> None:
    windows = windows_of(count)
    straight = Loader(windows, rows, 7, shuffle)
    taken(straight, before) if before else None
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = Loader(windows, rows, 7, shuffle)
    resumed.load_state_dict(state)
    assert resumed.epoch == straight.epoch == before * rows / count
    assert equal(taken(straight, 6), taken(resumed, 6))


def test_another_number_of_processes_takes_the_stream_up() -> None:
    windows = windows_of(11)
    first = Loader(windows, 4, 3)
    taken(first, 3)
    two = [Loader(windows, 6, 3, processes=2, process=p) for p in range(2)]
    for loader in two:
        loader.load_state_dict(first.state_dict())
    assert torch.cat([next(loader).row for loader in two]).tolist() == list(range(12, 18))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    windows = windows_of(50)
    orders = {
        tuple(taken(Loader(windows, 50, seed), 2).index[half].tolist())
        for seed in range(3)
        for half in (slice(50), slice(50, 100))
    }
    assert len(orders) == 6
    assert taken(Loader(windows, 50, 0, shuffle=False), 2).index.tolist() == [
        *range(50),
        *range(50),
    ]


def test_orders_are_uniform() -> None:
    """Each of the 6 orders of 3 windows: chi-square of 5 degrees over 3,000 epochs, false-alarm
    rate 1e-6."""
    stream = taken(Loader(windows_of(3), 3, 5), 3000).index.view(-1, 3)
    counts = Counter(map(tuple, stream.tolist()))
    assert len(counts) == 6
    assert sum((c - 500) ** 2 / 500 for c in counts.values()) < 35.9


def test_other_data_or_seed_is_refused() -> None:
    state = Loader(windows_of(5), 2, 1).state_dict()
    with pytest.raises(
        CheckpointError,
        match=r"has windows .* resume with the same data, tokenizer or window length",
    ):
        Loader(windows_of(6), 2, 1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="has seed 1 but this run has 2"):
        Loader(windows_of(5), 2, 2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="has shuffle True but this run has False"):
        Loader(windows_of(5), 2, 1, shuffle=False).load_state_dict(state)


@pytest.mark.parametrize(("rows", "processes"), [(0, 1), (3, 2), (1, 2)])
def test_a_batch_must_fall_to_the_processes_evenly(rows: int, processes: int) -> None:
    with pytest.raises(
        ConfigError,
        match=f"batch_size is {rows} but must be a positive multiple of the {processes} process",
    ):
        Loader(windows_of(5), rows, processes=processes)


@pytest.mark.parametrize(("count", "rows"), [(5, 2), (6, 3), (3, 10)])
def test_evaluation_reads_every_window_once_in_order(count: int, rows: int) -> None:
    windows = windows_of(count)
    found = list(batches(windows, rows))
    assert [len(b) for b in found] == [min(rows, count - first) for first in range(0, count, rows)]
    assert torch.cat([b.index for b in found]).tolist() == list(range(count))
    assert all(torch.equal(b.row, b.index) for b in found)
    assert (torch.cat([b.doc for b in found]) == -1).sum() == windows.padding == 1
    with pytest.raises(ConfigError, match="batch_size is 0"):
        next(batches(windows, 0))


def test_tokens_are_cut_by_rows() -> None:
    batch = next(Loader(windows_of(5), 4, 0))
    assert equal(
        Tokens(
            *(
                torch.cat([getattr(batch[:1], n), getattr(batch[1:], n)])
                for n in ("ids", "doc", "row", "index")
            )
        ),
        batch,
    )
    assert equal(batch.to("cpu"), batch)
