"""Data on the command line: what cannot be read is one line and exit code 2; what is left out is
reported with either exit code.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bdlm.data import compression
from tests.cli.conftest import Run

FILES = {
    "deep.jsonl": b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep.json": b"[" * 5000 + b"]" * 5000,
    "digits.jsonl": b'{"text": "a", "n": ' + b"7" * 6000 + b"}",
    "digits.json": b'[{"text": "a", "n": ' + b"7" * 6000 + b"}]",
    "surrogate.jsonl": b'{"text": "\\ud800"}',
    "null.json": b'[{"text": null}]',
    "table.parquet": b"not a table",
    "b].txt": b"\xff\xfe\x00",
    "bomb.txt.gz": gzip.compress(bytes(1 << 25)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_line(
    bdlm: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "SLACK", 1 << 20)
    # the path then reads as a closing tag: a[/b].txt
    folder = tmp_path / "a[" if name == "b].txt" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(FILES[name])
    code, out, err = bdlm("data", "inspect", "--data", folder / name)
    assert (code, out) == (2, "")
    assert str(folder / name) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["", "~nosuchuser", "x[/b]"])
@pytest.mark.parametrize(
    "words",
    [
        ("data", "inspect", "--data"),
        ("train", "--out=nowhere", "--limits.steps=1", "--data.train"),
        ("measure", "--texts"),
    ],
)
def test_a_name_that_is_not_data_is_one_line(
    bdlm: Run, tmp_path: Path, name: str, words: tuple[str, ...], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("never to be read")
    code, out, err = bdlm(*words, json.dumps(name) if words[0] == "train" else name)
    assert (code, out) == (2, "")
    assert err.startswith("bdlm: ")
    assert err.count("\n") == 1


def test_what_is_left_out_is_reported_with_either_exit_code(bdlm: Run, tmp_path: Path) -> None:
    good = "".join(json.dumps({"meta": {"body": f"document {i}"}}) + "\n" for i in range(9))
    (tmp_path / "a.jsonl").write_text(good + '{"meta": {"body": null}}\n')
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    words = ("data", "inspect", "--data", tmp_path, "--field", "meta.body")
    code, _, err = bdlm(*words)
    assert code == 2
    assert (
        "a.jsonl line 10 field 'meta.body' is null (1 of 10 records are bad; bad_records allows"
        " 0.01 of them" in err
    )
    code, out, err = bdlm(*words, "--bad-records", 1, "--json")
    facts = json.loads(out)
    assert (code, facts["documents"], facts["records"], facts["records_left_out"]) == (0, 9, 10, 1)
    assert facts["left_out"] == [
        {"path": str(tmp_path / "b.png"), "why": "its ending '.png' is not known"}
    ]
    assert "line 10" in facts["bad_records"][0]
    assert err.count("\n") == 2, "the warnings"
    code, out, _ = bdlm(*words, "--bad-records", 1)
    assert code == 0
    text = "".join(out.replace("\u2502", "").split())  # the panel breaks long lines
    assert all(part in text for part in ("leftout", "b.png:itsending", "a.jsonlline10field"))
    code, _, err = bdlm(*words, "--bad-records", -1)
    assert (code, err.count("\n")) == (2, 1)


def test_the_limit_of_bad_records_reaches_every_command(
    bdlm: Run, tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    text = text_file.read_text()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": null}\n')
    data, small = (
        tmp_path / "a.jsonl",
        ("--model.hidden_dim=16", "--model.n_heads=2", "--model.n_blocks=1", "--model.length=32"),
    )
    commands = {
        "eval": ("eval", "--model", tiny_model, "--data", data, "--max-tokens", 64),
        "variance": ("variance", "--model", tiny_model, "--data", data, "--batches", 2),
        "measure": ("measure", "--texts", data),
        "train": (
            "train",
            *small,
            "--limits.steps=1",
            f"--data.train={data}",
            f"--out={tmp_path / 'run'}",
            "--data.tokenizer=bpe",
        ),
    }
    for name, words in commands.items():
        code, _, err = bdlm(*words)
        assert (code, "line 2 field 'text' is null" in err) == (2, True), name
        code, _, err = bdlm(
            *words, "--data.bad_records=1" if name == "train" else "--bad-records=1"
        )
        assert (code, "1 of 2 records are left out" in err) == (0, True), (name, err)


@pytest.mark.parametrize("value", ["-1", "1.5", ".inf", ".nan", "many"])
def test_a_limit_of_bad_records_is_a_share_or_a_number(
    bdlm: Run, text_file: Path, value: str
) -> None:
    words = ("train", "--limits.steps=1", f"--data.train={text_file}", "--out=nowhere")
    code, out, err = bdlm(*words, f"--data.bad_records={value}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "data.bad_records is" in err


def test_a_tokenizer_without_an_end_trains_to_its_end(
    bdlm: Run, tmp_path: Path, text_file: Path
) -> None:
    words = (
        "--model.hidden_dim=16",
        "--model.n_heads=2",
        "--model.n_blocks=1",
        "--model.length=32",
        "--model.block_size=4",
    )
    words += (
        "--limits.steps=2",
        "--data.tokenizer=bytes-no-end",
        f"--data.train={text_file}",
        f"--out={tmp_path / 'run'}",
    )
    code, _, err = bdlm("train", *words)
    assert code == 2
    assert "document_eos is on but the tokenizer has no such special token; turn it off" in err
    assert not (tmp_path / "run" / "checkpoints").exists()
    code, out, err = bdlm("train", *words, "--data.document_eos=false", "--json")
    assert code == 0, err
    model = json.loads(out.splitlines()[-1])["model"]
    code, out, err = bdlm(
        "eval", "--model", model, "--data", text_file, "--max-tokens", 64, "--json"
    )
    assert code == 0, err
    code, out, err = bdlm(
        "generate", "--model", model, "--prompt", "the ", "--max-new-tokens", 8, "--json"
    )
    assert (code, json.loads(out)["tokens"]) == (0, 8), err
