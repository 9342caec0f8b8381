"""Documents out of files: every kind, a fixed order, and one line that names the file for
everything that can be wrong."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdlm.core.errors import BdlmWarning, DataError
from bdlm.data.sources import documents, open_sources


def read(names: Any, limit: int | None = None, **options: str) -> list[str]:
    return list(documents(open_sources(names, **options), limit))


def test_a_text_file_is_one_document_or_several(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\ntwo\n\nthrée\n".encode())
    assert read(file) == ["one\r\ntwo\n\nthrée\n"]
    assert read(file, split="line") == ["one", "two", "thrée"]
    assert read(file, split="paragraph") == ["one\r\ntwo", "thrée\n"]
    assert read(file, split="two") == ["one\r\n", "\n\nthrée\n"]
    assert read(file, split="line", limit=2) == ["one", "two"]


@pytest.mark.parametrize("split", ["file", "line"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, split: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt", split=split) == ["hello"]


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    content = (
        "".join(json.dumps({"text": t, "body": t.upper()}) + "\n" for t in ("eins", "zwei ü"))
        + "\n"
    )
    (tmp_path / "a.jsonl").write_text(content)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(content)
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert read(tmp_path / name) == ["eins", "zwei ü"]
        assert read(tmp_path / name, field="body") == ["EINS", "ZWEI Ü"]


def test_tables_by_name_by_number_and_joined(tmp_path: Path) -> None:
    rows = 'class,title,body\r\n3,"Fears, again","He said ""no""\nand left"\r\n\r\n1,Rain,naïve\r\n'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(rows.encode()))
    for name in ("a.csv", "a.csv.gz"):
        assert read(tmp_path / name, field="body") == ['He said "no"\nand left', "naïve"]
        assert read(tmp_path / name, field="title+body") == [
            'Fears, again He said "no"\nand left',
            "Rain naïve",
        ]
    assert read(tmp_path / "a.csv", field="2") == [
        "title",
        "Fears, again",
        "Rain",
    ], "a number says that there is no header"
    (tmp_path / "b.tsv").write_text("text\tn\na, b\t1\n")
    assert read(tmp_path / "b.tsv") == ["a, b"]
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "long.csv")[0]) == 200_000


def test_wikitext_falls_into_its_articles(tmp_path: Path) -> None:
    first = (
        " \n = A = \n \n Text of A . \n \n = = Part = = \n \n where \n = 1 rad / s = \n more ."
        " \n \n"
    )
    second = " = B = \n \n Text of B . \n"
    (tmp_path / "w.txt").write_text(first + second)
    assert read(tmp_path / "w.txt", split="article") == [first, second]


def test_a_folder_is_read_in_the_order_of_its_paths_whatever_the_disk_says(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.txt.gz", "d.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = json.dumps({"text": name}).encode() if "jsonl" in name else name.encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.warns(BdlmWarning, match="picture.png: its ending '.png' is not known"):
        assert read(tmp_path) == ["a/c.txt.gz", "a/z.md", "b.txt", "d.jsonl"]
    assert read([tmp_path / "d.jsonl", tmp_path / "b.txt"]) == ["d.jsonl", "b.txt"]


@given(
    st.lists(
        st.text(alphabet=st.characters(codec="utf-8"), min_size=1).filter(str.strip),
        min_size=1,
        max_size=5,
    )
)
def test_jsonl_gives_any_text_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    file = tmp_path_factory.mktemp("any") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    assert read(file) == texts


def test_the_fingerprint_follows_content_and_reading_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")

    def print_of(name: str, **options: str) -> str:
        return open_sources(tmp_path / name, **options)[0].fingerprint()

    assert print_of("a.txt") == print_of("b.txt")
    assert print_of("a.txt") != print_of("a.txt", split="line")
    (tmp_path / "b.txt").write_text("other")
    assert print_of("a.txt") != print_of("b.txt")
    (tmp_path / "c.csv").write_text("1,2\n")
    assert print_of("c.csv", field="1") != print_of("c.csv", field="2")


WRONG = {
    "empty": ("e.txt", b"", "e.txt is empty"),
    "blank": ("e.txt", b" \n\n", "e.txt is empty"),
    "empty jsonl": ("e.jsonl", b"\n", "e.jsonl is empty"),
    "latin-1": ("l.txt", "naïve".encode("latin-1"), "l.txt is not UTF-8: byte 0xef at offset 2"),
    "latin-1 jsonl": (
        "l.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "l.jsonl is not UTF-8: byte 0xff at offset 24",
    ),
    "not json": ("j.jsonl", b'{"text": "a"}\n{"text": \n', "j.jsonl line 2 is not JSON"),
    "not an object": ("j.jsonl", b'["a"]\n', "j.jsonl line 1 is not a JSON object"),
    "no field": (
        "f.jsonl",
        b'{"texts": "a"}\n',
        "f.jsonl line 1 has no field 'text'; did you mean 'texts'?",
    ),
    "not text": ("f.jsonl", b'{"text": 3}\n', "f.jsonl line 1 field 'text' is not text but int"),
    "no column": (
        "t.csv",
        b"kind,body\na,b\n",
        "t.csv line 1 has no column 'text'; it has 1 (kind), 2 (body)",
    ),
    "short row": (
        "t.csv",
        b"kind,text\na,b\nc\n",
        "t.csv line 3 has 1 columns, too few for column 2",
    ),
    "open quote": ("t.csv", b'text\n"a\n', "t.csv line 2 is not CSV (unexpected end of data)"),
    "latin-1 csv": ("t.csv", b"text\n\xff\n", "t.csv is not UTF-8: byte 0xff at offset 5"),
    "header alone": ("t.tsv", b"text\n", "t.tsv is empty"),
    "cut gzip": ("g.txt.gz", gzip.compress(b"hello" * 100)[:-12], "g.txt.gz cannot be read"),
    "no gzip": ("g.txt.gz", b"plain", "g.txt.gz cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_offset_is_counted_from_the_start_of_the_file_when_reading_by_lines(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_bytes(b"12345\n67\xc3\x28\n")
    with pytest.raises(DataError, match="byte 0xc3 at offset 8"):
        read(tmp_path / "a.txt", split="line")


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_sources(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no file that can be read; known endings: \.txt"):
        open_sources(tmp_path)
    with pytest.raises(DataError, match="no data is named"):
        open_sources([])
    (tmp_path / "a.csv").write_text("1,2\n")
    for field in ("3", "0", "1+text"):
        with pytest.raises(
            DataError,
            match=r"a\.csv line 1 has no column '\w+'; it has 1 \(1\), 2 \(2\): give the field",
        ):
            read(tmp_path / "a.csv", field=field)
    with pytest.raises(DataError, match="split is an empty separator"):
        open_sources(tmp_path, split="")


class FakeData(list[Any]):
    _fingerprint = "f1"


def test_datasets_are_named_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> FakeData:
        calls.append((name, config, split, streaming))
        return FakeData([{"text": "a", "body": "b"}, {"text": "c", "body": "d"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("hf:user/corpus") == ["a", "c"]
    assert read("stream:user/corpus:small:test:body", limit=1) == ["b"]
    assert calls == [("user/corpus", None, "train", False), ("user/corpus", "small", "test", True)]
    assert "f1" in open_sources("hf:user/corpus")[0].fingerprint()
    with pytest.raises(DataError, match="not of the form hf:name"):
        open_sources("hf:")
    with pytest.raises(DataError, match="record 0 has no field 'bodi'; did you mean 'body'"):
        read("hf:user/corpus:::bodi")


def test_a_dataset_that_cannot_be_loaded_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ValueError("no such\ndataset")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError,
        match=r"dataset 'x' \(config None, split train\) cannot be loaded: no such dataset",
    ):
        read("hf:x")


def test_the_real_library_reads_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert read(f"stream:{tmp_path}") == ["first", "second"]
