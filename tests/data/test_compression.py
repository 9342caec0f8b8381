"""Compressed files: a stream of bounded expansion, frames joined, bombs refused before they fill
the memory.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bdlm.core.errors import DataError
from bdlm.data import compression
from bdlm.data.compression import COMPRESSIONS, open_plain
from bdlm.data.sources import documents, open_sources


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}


def test_every_compression_has_a_test() -> None:
    assert set(COMPRESS) == set(COMPRESSIONS)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("size", [0, 1, 5, 300_000])
def test_content_comes_back_by_pieces_and_at_once(tmp_path: Path, ending: str, size: int) -> None:
    content, compress = os.urandom(size // 2) + b"line\n" * (size // 10), COMPRESS[ending]
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress(content) + compress(b"a second stream"))
    whole = content + b"a second stream"
    with open_plain(path) as file:
        assert file.read() == whole
    with open_plain(path) as file:
        assert b"".join(iter(lambda: file.read(777), b"")) == whole
    with open_plain(path) as file:
        assert b"".join(file) == whole


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_a_bomb_is_refused_in_little_memory(
    tmp_path: Path, ending: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "SLACK", 1 << 20)
    bomb = tmp_path / f"a{kind}{ending}"
    bomb.write_bytes(COMPRESS[ending](bytes(1 << 26)))
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=rf"a\{kind}\{ending} expands more than 200 times .*expand it first"
        ) as error:
            list(documents(open_sources(bomb)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 1 << 26, "less than the bomb holds"


def test_a_parquet_bomb_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    from bdlm.data import records

    monkeypatch.setattr(records, "SLACK", 1 << 20)
    table = pyarrow.table({"text": ["\0" * (1 << 22)]})
    parquet.write_table(
        table,
        tmp_path / "a.parquet",
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    with pytest.raises(DataError, match=r"a\.parquet expands more than 200 times"):
        list(documents(open_sources(tmp_path / "a.parquet")))


def test_text_of_much_repetition_is_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "SLACK", 0)
    content = b"".join(
        b'{"text": "record %d of a log that says the same"}\n' % i for i in range(20_000)
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, 9))
    assert len(list(documents(open_sources(tmp_path / "a.jsonl.gz")))) == 20_000
