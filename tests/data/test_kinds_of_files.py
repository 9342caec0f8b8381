"""Every kind of file is read, what is left out is said, and one bad record does not cost the
others.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import zstandard

from bdlm.core.errors import BdlmWarning, ConfigError, DataError
from bdlm.data.inspect import inspect
from bdlm.data.packing import Packing, prepare
from bdlm.data.sources import documents, find_sources, open_sources
from bdlm.data.tally import Tally
from bdlm.data.tokenizers import ByteTokenizer

COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda c: zstandard.ZstdCompressor().compress(c),
}


def read(names: Any, limit: int | None = None, bad_records: float = 0, **options: str) -> list[str]:
    return list(documents(open_sources(names, **options), limit, Tally(bad_records)))


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """A warning that a test does not ask for is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", BdlmWarning)
        yield


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_every_kind_in_every_compression(tmp_path: Path, kind: str, ending: str) -> None:
    content = {
        ".txt": "zwei ü",
        ".jsonl": lines({"text": "zwei ü"}),
        ".json": '[{"text": "zwei ü"}]',
        ".csv": "text\nzwei ü\n",
    }[kind]
    (tmp_path / f"a{kind}{ending}").write_bytes(COMPRESS[ending](content.encode()))
    assert read(tmp_path) == ["zwei ü"]


def test_a_mixed_folder_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"from text"))
    (tmp_path / "b.jsonl.zst").write_bytes(COMPRESS[".zst"](lines({"text": "from lines"}).encode()))
    (tmp_path / "c.json").write_text('[\n {"text": "from"},\n {"text": "an array"}\n]')
    parquet(tmp_path / "d.parquet", {"text": ["from", "a table"], "n": [1, 2]})
    assert read(tmp_path) == ["from text", "from lines", "from", "an array", "from", "a table"]


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n\n{"text": "b"}\n',
        '{"text": "a"} {"text": "b"}',
        '{\n"text": "a"\n}\n{"text":\n"b"}',
        '\ufeff [{"text": "a"},{"text": "b"}]',
    ],
    ids=["lines", "one line", "over lines", "array after a byte order mark"],
)
def test_a_json_file_holds_an_array_or_objects_in_a_row(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert read(tmp_path / "a.json") == ["a", "b"]


def test_nested_fields(tmp_path: Path) -> None:
    record = {"meta": {"body": "inner", "n": 1}, "meta.body": "by its very name"}
    (tmp_path / "a.jsonl").write_text(lines({"meta": {"body": "inner"}}))
    (tmp_path / "b.jsonl").write_text(lines(record))
    parquet(tmp_path / "c.parquet", {"meta": [{"body": "inner", "n": 1}]})
    parquet(tmp_path / "d.parquet", {"meta.body": ["dotted"], "meta": [{"body": "inner"}]})
    found = [
        read(tmp_path / name, field="meta.body")
        for name in ("a.jsonl", "b.jsonl", "c.parquet", "d.parquet")
    ]
    assert found == [["inner"], ["by its very name"], ["inner"], ["dotted"]]
    with pytest.raises(
        DataError, match=r"a\.jsonl line 1 has no field 'meta\.bodi'; did you mean 'body'"
    ):
        read(tmp_path / "a.jsonl", field="meta.bodi")
    with pytest.raises(DataError, match=r"c\.parquet has no field 'texts'; known: meta"):
        read(tmp_path / "c.parquet", field="texts")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_dict({"text": ["a", "", "b"]}), Dataset.from_dict({"text": ["c"]})
    train.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "two"))
    DatasetDict({"valid": train, "test": test}).save_to_disk(str(tmp_path / "three"))
    with pytest.warns(
        BdlmWarning, match=r"1 of 3 records are left out .*one record 1 field 'text' is empty"
    ):
        assert read(tmp_path / "one") == [
            "a",
            "b",
        ], "empty records of a dataset are not held against the limit"
    with pytest.warns(BdlmWarning) as said:
        assert read(tmp_path / "two") == ["a", "b"]
    assert f"{tmp_path / 'two' / 'test'}: another split" in str(said[0].message)
    assert read(tmp_path / "two" / "test") == ["c"]
    with pytest.raises(DataError, match="three has the splits test, valid; name the folder of one"):
        read(tmp_path / "three")
    prints = {open_sources(tmp_path / "one", field)[0].fingerprint() for field in ("text", "body")}
    assert len(prints) == 2


def test_globs_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/3.jsonl", "a/x.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines({"text": name}) if "jsonl" in name else name)
    assert read(f"{tmp_path}/*/*.txt") == ["a/1.txt", "b/2.txt"]
    assert read(f"{tmp_path}/**/*.log") == ["a/x.log"], (
        "an ending that the pattern spells is read as text"
    )
    with pytest.warns(BdlmWarning, match=r"x\.log: its ending '\.log' is not known"):
        assert read(f"{tmp_path}/a/*") == ["a/1.txt", "a/3.jsonl"]
    (tmp_path / "odd[1].txt").write_text("literal")
    assert read(f"{tmp_path}/odd[1].txt") == ["literal"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/b") == ["b/2.txt"]
    with pytest.raises(DataError, match="matches no file"):
        read(f"{tmp_path}/*.parquet")


def test_what_a_folder_holds_besides_is_listed_with_the_reason(tmp_path: Path) -> None:
    for name in ("a.txt", "b.png", "Makefile", ".hidden.txt", ".git/c.txt", "d.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent, target_is_directory=True)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.warns(
        BdlmWarning,
        match=(
            "left out of the data: .*Makefile: it has no ending; .*b.png: its ending '.png' is not"
            " known"
        ),
    ):
        windows = prepare(str(tmp_path), ByteTokenizer(), Packing(8))
    found = inspect(windows, ByteTokenizer())
    assert json.loads(json.dumps(found.to_dict()))["left_out"] == [
        {"path": str(tmp_path / "Makefile"), "why": "it has no ending"},
        {"path": str(tmp_path / "b.png"), "why": "its ending '.png' is not known"},
        {
            "path": str(tmp_path / "d.parquet.gz"),
            "why": "Parquet in another compression; expand it",
        },
        {"path": str(tmp_path / "elsewhere"), "why": "a link to a folder; name that folder itself"},
        {"path": str(tmp_path / "gone.txt"), "why": "not a plain file, or a link to nothing"},
    ]
    assert [Path(out.path).name for out in found.hidden] == [".git", ".hidden.txt"]


BAD = {
    "null": ('{"text": null}', "field 'text' is null"),
    "empty": ('{"text": " "}', "field 'text' is empty"),
    "missing": ('{"body": "a"}', "has no field 'text'"),
    "broken": ('{"text": "a', "is not JSON"),
    "a number": ('{"text": 3}', "field 'text' is not text but int"),
    "lone surrogate": ('{"text": "a\\ud800b"}', r"field 'text' holds a lone surrogate ('\ud800')"),
    "deep": ('{"text": ' + "[" * 5000 + "]" * 5000 + "}", "is not JSON (nested too deep)"),
    "long number": ('{"text": ' + "9" * 6000 + "}", "is not JSON (Exceeds the limit"),
    "latin-1": ('{"text": "\udcff"}', "is not UTF-8: byte 0xff at offset"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_a_bad_record_is_named_counted_and_skipped_within_the_limit(
    tmp_path: Path, record: str, message: str
) -> None:
    good = [lines({"text": f"document {i}"}) for i in range(120)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        "".join([*good[:70], record + "\n", *good[70:]]).encode("utf-8", "surrogateescape")
    )
    with pytest.raises(DataError) as error:
        read(file, bad_records=0)
    assert message in str(error.value)
    assert "line 71" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.warns(BdlmWarning) as said:
        windows = prepare(str(file), ByteTokenizer(), Packing(64))
    assert windows.documents == 120
    assert "1 of 121 records are left out" in str(said[0].message)
    assert "line 71" in str(said[0].message)
    found = inspect(windows, ByteTokenizer())
    assert (found.records, found.records_left_out) == (121, 1)
    assert message in found.bad_records[0]
    with pytest.raises(
        DataError, match=r"1 of 101 records are bad; bad_records allows 0\.005 of them"
    ):
        file.write_bytes(
            "".join([*good[:70], record + "\n", *good[70:100]]).encode("utf-8", "surrogateescape")
        )
        read(file, bad_records=0.005)


def test_bad_records_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\na,1\n,2\nonly\nb\n")
    (tmp_path / "b.json").write_text('[{"text": "a"},\n{"text": null}, 3,\n{"text": "b"}]')
    parquet(tmp_path / "c.parquet", {"text": ["a", None, "", "b"]})
    layout = {"a.csv": "line 3", "b.json": "line 2", "c.parquet": "row 2"}
    for name, place in layout.items():
        with pytest.raises(DataError, match=f"{name} {place} "):
            read(tmp_path / name, bad_records=0)
        with pytest.warns(BdlmWarning, match=f"{name} {place} "):
            assert read(tmp_path / name, bad_records=2)[::2] in (["a", "b"], ["a"])


def test_the_limit_is_a_share_of_all_or_a_number_and_stops_early(tmp_path: Path) -> None:
    good, null = lines({"text": "good"}), lines({"text": None})
    file = tmp_path / "a.jsonl"
    file.write_text(null * 3 + good * 297)
    with pytest.warns(BdlmWarning, match="3 of 300"):
        assert len(read(file, bad_records=0.01)) == 297
    with pytest.warns(BdlmWarning):
        assert len(read(file, bad_records=3)) == 297
    with pytest.raises(DataError, match=r"line 1 .*3 of 3 records are bad; bad_records allows 2"):
        read(file, bad_records=2)
    with pytest.warns(BdlmWarning, match="3 of 5"):
        assert len(read(file, bad_records=0.01, limit=2)) == 2, (
            "where reading stops at a limit, the share is of at least 1,000"
        )
    file.write_text(null * 11 + "never read")
    with pytest.raises(DataError, match="11 of 11 records are bad"):
        read(file, bad_records=0.01)
    for wrong in (-0.1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="use a share of the records"):
            Tally(wrong)


def test_a_cache_knows_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "good"}, {"text": None}))
    for _ in range(2):  # built, then opened
        with pytest.warns(BdlmWarning, match="1 of 2 records are left out"):
            windows = prepare(
                str(tmp_path / "a.jsonl"),
                ByteTokenizer(),
                Packing(8),
                cache=tmp_path / "cache",
                bad_records=1,
            )
        assert inspect(windows, ByteTokenizer()).records_left_out == 1
    with pytest.raises(DataError, match=r"line 2 field 'text' is null \(1 of 2 records are bad"):
        prepare(
            str(tmp_path / "a.jsonl"),
            ByteTokenizer(),
            Packing(8),
            cache=tmp_path / "cache",
            bad_records=0,
        )


WRONG: dict[str, tuple[str, bytes, str]] = {
    "array without end": (
        "a.json",
        b'[{"text": "a"}\n',
        "a.json line 2 is not JSON: ',' or ']' is missing",
    ),
    "array cut short": (
        "a.json",
        b'[{"text": "a"},\n',
        "a.json line 2 is not JSON: the array has no end",
    ),
    "text after an array": (
        "a.json",
        b'[{"text": "a"}]\nx',
        "a.json line 2 is not JSON: the array goes on after its end",
    ),
    "broken element": (
        "a.json",
        b'[{"text": "a"},\n{"text": oops}]',
        "a.json line 2 is not JSON (Expecting value",
    ),
    "deep array": (
        "a.json",
        b"[" * 5000 + b"]" * 5000,
        "a.json line 1 is not JSON (nested too deep)",
    ),
    "deep object": (
        "a.json",
        b'{"text": ' + b"[" * 5000,
        "a.json line 1 is not JSON (nested too deep)",
    ),
    "long number": (
        "a.json",
        b'[{"n": ' + b"1" * 6000 + b"}]",
        "a.json line 1 is not JSON (Exceeds the limit",
    ),
    "no Parquet": ("a.parquet", b"plain text", "a.parquet cannot be read as Parquet"),
    "Parquet under another name": (
        "a.txt",
        b"PAR1\x00\xff\x15",
        "a.txt is not UTF-8 text but looks like a Parquet file",
    ),
    "gzip under another name": (
        "a.txt",
        gzip.compress(b"text"),
        "a.txt is not UTF-8 text but looks like gzip data: let its name end in .gz",
    ),
    "a picture": (
        "a",
        b"\x89PNG\r\n\x1a\n\x00\x00",
        "a is not UTF-8 text but looks like binary data",
    ),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "a.txt is not UTF-8 text but looks like UTF-16"),
    "cut zstd": (
        "a.txt.zst",
        COMPRESS[".zst"](os.urandom(999))[:-9],
        "a.txt.zst cannot be read (the Zstandard data ends before",
    ),
    "cut xz": ("a.txt.xz", COMPRESS[".xz"](os.urandom(999))[:-9], "a.txt.xz cannot be read"),
    "no zstd": ("a.txt.zst", b"plain", "a.txt.zst cannot be read (not Zstandard data"),
    "no xz": ("a.txt.xz", b"plain", "a.txt.xz cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_whole_file_is_said_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name, bad_records=0.01)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "~nosuchuser",
        "~nosuchuser/a.txt",
        "odd[/b]name.txt",
        "a\0b",
        "x" * 5000,
        "\udcff.txt",
    ],
)
def test_odd_names_are_a_line(name: str) -> None:
    with pytest.raises(
        DataError, match=r"is empty|does not exist|matches no file|cannot be read"
    ) as error:
        open_sources(name)
    assert "\n" not in str(error.value)


def test_windows_line_ends_part_paragraphs_and_articles_alike(tmp_path: Path) -> None:
    unix = "one\ntwo\n\nthree\n\n\nfour\n"
    article = " \n = A = \n \n Text . \n \n = B = \n \n More . \n"
    for split, text in (("paragraph", unix), ("article", article)):
        (tmp_path / "unix.txt").write_bytes(text.encode())
        (tmp_path / "windows.txt").write_bytes(text.replace("\n", "\r\n").encode())
        there, here = (
            read(tmp_path / "unix.txt", split=split),
            read(tmp_path / "windows.txt", split=split),
        )
        assert len(here) == len(there) > 1
        assert [part.replace("\r\n", "\n") for part in here] == there


def test_sources_say_what_they_left_out_without_prepare(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    found = find_sources([str(tmp_path / "a.txt"), "hf:name"])
    assert len(found.sources) == 2
    assert found.left_out == found.hidden == []
