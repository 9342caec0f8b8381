"""Packing: nothing dropped, padding marked, documents numbered, and a cache that is whole, rebuilt,
or not there."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdlm.core.errors import ConfigError, DataError
from bdlm.data import shards
from bdlm.data.packing import Packing, Windows, pack, prepare
from bdlm.data.shards import Tokenised, cached
from bdlm.data.tokenizers import ByteTokenizer, Tokenizer, train_bpe

BYTES = ByteTokenizer()
TEXTS = ["first document", "2nd", "the third one is longer than a window of cells", "ü"]


def cells(windows: Windows) -> list[list[tuple[int, int]]]:
    """(id, doc) of every cell of every window."""
    return [
        list(zip(*(part.tolist() for part in windows[i]), strict=True)) for i in range(len(windows))
    ]


def naive(texts: list[str], packing: Packing, tokenizer: Tokenizer) -> list[list[tuple[int, int]]]:
    """The same windows written as the definition says, cell by cell. Padding ids are given as
    None."""
    run: list[tuple[int, int]] = []
    for number, text in enumerate(texts):
        ids = (
            [tokenizer.bos_id] * packing.document_bos
            + tokenizer.encode(text)
            + [tokenizer.eos_id] * packing.document_eos
        )
        run += [(i, number) for i in ids]  # type: ignore[misc]
    room = packing.length - 2 * packing.window_special
    out = []
    for first in range(0, len(run), room):
        inside = run[first : first + room]
        order = {number: place for place, number in enumerate(dict.fromkeys(n for _, n in inside))}
        window = [(i, order[n] if packing.document_mask else 0) for i, n in inside]
        if packing.window_special:
            window = [(tokenizer.bos_id, 0), *window, (tokenizer.eos_id, window[-1][1])]
        out.append(window + [(None, -1)] * (packing.length - len(window)))
    return out


packings = st.builds(
    Packing,
    length=st.integers(3, 20),
    document_eos=st.booleans(),
    document_bos=st.booleans(),
    window_special=st.booleans(),
    document_mask=st.booleans(),
)
texts = st.lists(st.text(alphabet="abü日 \n", max_size=30), min_size=1, max_size=8).filter(
    lambda t: len("".join(t)) >= 2
)


@given(texts=texts, packing=packings)
def test_windows_are_the_definition_cell_by_cell(texts: list[str], packing: Packing) -> None:
    windows = pack(texts, BYTES, packing)
    got, reference = cells(windows), naive(texts, packing, BYTES)
    assert len(got) == len(reference)
    for window, want in zip(got, reference, strict=True):
        assert [d for _, d in window] == [d for _, d in want]
        assert all(
            i == w or (w is None and 0 <= i < BYTES.vocab_size)
            for (i, _), (w, _) in zip(window, want, strict=True)
        )


@given(texts=texts, packing=packings)
def test_nothing_is_dropped_and_the_counts_are_true(texts: list[str], packing: Packing) -> None:
    windows = pack(texts, BYTES, packing)
    real = [(i, d) for window in cells(windows) for i, d in window if d >= 0]
    assert Counter(i for i, _ in real if i < 256) == Counter("".join(texts).encode())
    assert windows.tokens == len(real)
    assert windows.padding == len(windows) * packing.length - len(real)
    assert windows.bytes == len("".join(texts).encode())
    assert windows.documents == len(texts)
    padded = [i for i, window in enumerate(cells(windows)) if any(d < 0 for _, d in window)]
    assert padded in ([], [len(windows) - 1])


def test_rows_come_in_the_order_asked_for() -> None:
    windows = pack(TEXTS, BYTES, Packing(8))
    ids, doc = windows.rows(torch.tensor([3, 0, 3]))
    assert ids.dtype == doc.dtype == torch.int64
    assert ids.shape == doc.shape == (3, 8)
    for row, number in enumerate([3, 0, 3]):
        assert torch.equal(ids[row], windows[number][0])
    assert torch.equal(windows[-1][0], windows[len(windows) - 1][0])
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_a_part_is_those_windows_and_counts_its_own_bytes() -> None:
    packing = Packing(8, document_mask=True)
    windows = pack(TEXTS, BYTES, packing)
    head, tail = windows.part(0, 3), windows.part(3, len(windows))
    assert cells(head) + cells(tail) == cells(windows)
    assert (head.tokens + tail.tokens, head.bytes + tail.bytes) == (windows.tokens, windows.bytes)
    assert (head.documents, tail.documents) == (3, 2)  # the third is cut by the border
    # 19 ids before the third, 24 before the tail
    assert tail.stream.starts.tolist() == [0, len(TEXTS[2]) + 1 - (24 - 19)]
    assert len({windows.key, head.key, tail.key}) == 3
    for bad in ((3, 3), (0, len(windows) + 1)):
        with pytest.raises(ConfigError, match="the part is empty or beyond the end"):
            windows.part(*bad)


@pytest.mark.parametrize("packing", [{"length": 1}, {"length": 2, "window_special": True}])
def test_windows_that_hold_nothing_are_refused(packing: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            rf"length is {packing['length']} but a window needs at least {packing['length'] + 1}"
            r" cells"
        ),
    ):
        Packing(**packing)


@pytest.mark.parametrize("switch", ["document_eos", "document_bos", "window_special"])
def test_a_switch_needs_its_token(switch: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{switch} is on but the tokenizer has no such special token"
    ):
        pack(
            ["some text"],
            ByteTokenizer(end=False),
            Packing(8, **{"document_eos": False, switch: True}),
        )
    assert len(pack(["some text"], ByteTokenizer(end=False), Packing(8, document_eos=False))) == 2


@pytest.mark.parametrize("texts", [[], ["x"], ["", ""]])
def test_fewer_than_two_tokens_of_text_are_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="fewer than two tokens of text"):
        pack(texts, BYTES, Packing(8))


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be written as UTF-8"):
        pack(["ok so far", "\ud800"], BYTES, Packing(8))


def test_detokenizers_are_named_and_applied() -> None:
    assert pack(["a well @-@ known"], BYTES, Packing(8), "wikitext").bytes == len("a well-known")
    with pytest.raises(
        ConfigError, match="detokenizer 'wikitex' is unknown; did you mean 'wikitext'"
    ):
        pack(TEXTS, BYTES, Packing(8), "wikitex")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 5))
    return path


def test_the_cache_gives_what_memory_gives_and_serves_every_length(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    fresh = prepare(file, BYTES, Packing(8, document_mask=True), cache=cache)
    assert cells(fresh) == cells(pack(TEXTS * 5, BYTES, Packing(8, document_mask=True)))
    monkeypatch.setattr(
        ByteTokenizer, "encode_batch", lambda *_: pytest.fail("the cache was not used")
    )
    again = prepare(file, BYTES, Packing(8, document_mask=True), cache=cache)
    assert (cells(again), again.bytes, again.key) == (cells(fresh), fresh.bytes, fresh.key)
    longer = prepare(file, BYTES, Packing(16, window_special=True), cache=cache)
    assert longer.key != fresh.key
    assert len(list(cache.iterdir())) == 1


def test_whatever_changes_the_content_changes_the_cache(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(file, BYTES, Packing(8), cache=cache)
    count = 1
    for packing, options in [
        (Packing(8, document_eos=False), {}),
        (Packing(8, document_bos=True), {}),
        (Packing(8), {"detokenizer": "lambada"}),
        (Packing(8), {"limit": 3}),
    ]:
        prepare(file, BYTES, packing, cache=cache, **options)  # type: ignore[arg-type]
        count += 1
        assert len(list(cache.iterdir())) == count
    prepare(file, train_bpe(TEXTS, 270), Packing(8), cache=cache)
    file.write_text(file.read_text() + '{"text": "one more"}\n')
    assert prepare(file, BYTES, Packing(8), cache=cache).documents == 21
    assert len(list(cache.iterdir())) == count + 2


def stream_of(cache: Path, per_shard: int = 50) -> shards.Stream:
    return cached(Tokenised(TEXTS * 5, BYTES, [], [256]), "key", cache, per_shard)


def test_shards_are_cut_and_read_across_their_borders(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    whole = [i for t in TEXTS * 5 for i in [*BYTES.encode(t), 256]]
    assert len(stream.shards) == -(-len(whole) // 50) > 3
    for first, stop in [
        (0, 10),
        (45, 55),
        (30, 170),
        (len(whole) - 3, len(whole) + 9),
        (50, 100),
        (len(whole), len(whole) + 1),
    ]:
        assert stream.read(first, stop).tolist() == whole[first:stop]
    assert all(isinstance(shard, np.memmap) for shard in stream.shards)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    "harm", [flip, cut, Path.unlink], ids=["flipped bit", "cut short", "removed"]
)
@pytest.mark.parametrize("name", ["ids-00000.npy", "ids-00002.npy", "starts.npy", "index.json"])
def test_a_damaged_cache_is_found_and_built_again(
    tmp_path: Path, name: str, harm: object, caplog: pytest.LogCaptureFixture
) -> None:
    before = stream_of(tmp_path)
    whole = before.read(0, before.tokens).tolist()
    (folder,) = tmp_path.iterdir()
    harm(folder / name)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        after = stream_of(tmp_path)
    if (name, harm) != ("index.json", flip):  # its last byte is a line end
        assert "is damaged" in caplog.text
    assert after.read(0, after.tokens).tolist() == whole
    assert list(tmp_path.iterdir()) == [folder]
    caplog.clear()
    stream_of(tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("per_shard", 49), ("bytes", 1), ("tokens", 7), ("format", 1), ("sha256", {}), ("tally", {})],
)
def test_a_changed_value_of_the_index_is_found(
    tmp_path: Path, name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    before = stream_of(tmp_path)
    whole, counted = before.read(0, before.tokens).tolist(), before.bytes
    (folder,) = tmp_path.iterdir()
    index = json.loads((folder / "index.json").read_text())
    assert name in index
    (folder / "index.json").write_text(json.dumps({**index, name: value}))
    with caplog.at_level(logging.WARNING):
        after = stream_of(tmp_path)
    assert "is damaged" in caplog.text
    assert (after.read(0, after.tokens).tolist(), after.bytes) == (whole, counted)
    assert json.loads((folder / "index.json").read_text()) == index


def test_a_failed_build_leaves_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"token cache .* cannot be written .*No space left"):
        stream_of(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_source_leaves_no_cache(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine so far")
    (tmp_path / "b.txt").write_bytes(b"not \xff fine")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(
            [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
            BYTES,
            Packing(8),
            cache=tmp_path / "cache",
        )
    assert list((tmp_path / "cache").iterdir()) == []


class SlowBytes(ByteTokenizer):
    """Says that it has begun, then takes its time: to be killed at work."""

    def __init__(self, sign: Path) -> None:
        super().__init__()
        self.sign = sign

    def encode_batch(self, texts: object) -> list[list[int]]:
        self.sign.touch()
        time.sleep(60)
        raise AssertionError


def _build_slowly(cache: Path, sign: Path) -> None:
    cached(Tokenised(TEXTS, SlowBytes(sign), [], []), "key", cache)


def _build(cache: Path) -> None:
    stream_of(cache)


def test_a_killed_build_is_no_cache(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_build_slowly, args=(tmp_path / "cache", tmp_path / "begun")
    )
    process.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "cache" / f"key-{shards.SHARD_TOKENS}").exists()
    assert cached(Tokenised(TEXTS, BYTES, [], []), "key", tmp_path / "cache").documents == 4


def test_processes_that_build_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["key-50"]
    assert stream_of(tmp_path).documents == 20
