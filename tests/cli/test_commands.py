"""The commands end to end on a tiny model: the contract of `--json`, and errors in one line with exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdlm import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bdlm(capsys: pytest.CaptureFixture[str]) -> Run:
    """`bdlm("eval", "--json", ...)` -> (exit code, stdout, stderr), in this process."""

    def call(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_generate_json_contract(bdlm: Run, tiny_model: Path) -> None:
    words = (
        "generate",
        "--model",
        tiny_model,
        "--prompt",
        "the ",
        "--max-new-tokens",
        10,
        "--policy",
        "first-hitting",
        "--seed",
        3,
        "--json",
    )
    code, out, _ = bdlm(*words)
    facts = json.loads(out)
    assert code == 0
    assert {"text", "tokens", "model_calls", "tokens_per_call", "seconds"} <= facts.keys()
    assert facts["tokens"] == len(facts["ids"]) <= 10
    assert facts["tokens_per_call"] == pytest.approx(facts["tokens"] / facts["model_calls"])
    again = json.loads(bdlm(*words)[1])
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}
    assert json.loads(bdlm(*words[:-2], 4, "--json")[1])["ids"] != facts["ids"]


def test_generate_many_equals_one_each(bdlm: Run, tiny_model: Path) -> None:
    base = ("generate", "--model", tiny_model, "--prompt", "a cat", "--max-new-tokens", 9, "--json")
    many = json.loads(bdlm(*base, "--count", 3, "--seed", 5)[1])
    alone = [json.loads(bdlm(*base, "--seed", 5 + i)[1]) for i in range(3)]
    assert [m["ids"] for m in many] == [a["ids"] for a in alone]


def test_live_prints_the_same_text(bdlm: Run, tiny_model: Path) -> None:
    base = ("generate", "--model", tiny_model, "--prompt", "the", "--max-new-tokens", 12)
    text = json.loads(bdlm(*base, "--json")[1])["text"]
    assert bdlm(*base, "--live")[1].strip("\n") == ("the" + text).strip("\n")


def test_train_then_eval_then_generate(bdlm: Run, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = ("--model.hidden_dim", 32, "--model.length", 32, "--valid.rows", 4, "--log.progress", "false", "--optim.batch_rows=8")
    code, said, _ = bdlm("train", "tiny", "--data", text_file, "--max-steps", 4, "--out", out, *sizes, "--json")
    assert code == 0
    model = json.loads(said)["model"]
    code, said, _ = bdlm("eval", "--model", model, "--data", text_file, "--max-tokens", 200, "--json")
    assert code == 0 and json.loads(said)["tokens"] >= 200
    code, said, _ = bdlm("generate", "--model", model, "--max-new-tokens", 5, "--json")
    assert code == 0 and json.loads(said)["tokens"] <= 5
    assert bdlm("train", "tiny", "--data", text_file, "--max-steps", 4, "--out", out, *sizes, "--resume", "never")[0] == 2


def test_eval_json_contract(bdlm: Run, tiny_model: Path, text_file: Path) -> None:
    code, out, _ = bdlm("eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 300, "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"nats_per_token", "stderr", "perplexity", "bits_per_byte", "tokens", "method"} <= facts.keys()
    assert facts["perplexity"] == pytest.approx(2.718281828 ** facts["nats_per_token"], rel=1e-6)
    assert facts["bits_per_byte"] == pytest.approx(facts["nats_per_token"] / 0.6931471806, rel=0.02)  # bytes: a token is a byte
    assert json.loads(bdlm("eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 300, "--json")[1]) == facts


def test_info_and_mask(bdlm: Run, tiny_model: Path, tmp_path: Path) -> None:
    facts = json.loads(bdlm("info", "--model", tiny_model, "--json")[1])
    assert facts["block_size"] == 4 and facts["vocab_size"] == 258
    drawn = json.loads(bdlm("info", "--mask", "--length", 8, "--block-size", 2, "--json")[1])
    length, size = 8, 2
    assert sum(map(sum, drawn["visible"])) == length * (length + size)  # the paper's count of allowed pairs
    picture = tmp_path / "mask.png"
    assert bdlm("info", "--mask", "--model", tiny_model, "--out", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_data_inspect(bdlm: Run, text_file: Path) -> None:
    facts = json.loads(bdlm("data", "inspect", "--data", text_file, "--length", 32, "--json")[1])
    assert facts["documents"] == 1 and facts["bytes"] == text_file.stat().st_size


MISTAKES = {
    "unknown command": (("evl",), "did you mean 'eval'"),
    "unknown option": (("generate", "--modle", "x"), "did you mean '--model'"),
    "missing option": (("generate",), "needs --model"),
    "value of another type": (("generate", "--model", "x", "--max-new-tokens", "many"), "--max-new-tokens"),
    "no such model": (("generate", "--model", "no-such-model"), "no-such-model"),
    "unknown policy": (("generate", "--model", "{model}", "--policy", "first-hiting"), "did you mean 'first-hitting'"),
    "unknown option of a policy": (
        ("generate", "--model", "{model}", "--policy", "ancestral", "--option", "stpes=3"),
        "did you mean 'steps'",
    ),
    "option without a value": (("generate", "--model", "{model}", "--option", "steps"), "name=value"),
    "temperature out of range": (("generate", "--model", "{model}", "--temperature", "-1"), "temperature"),
    "temperature that is no number": (("generate", "--model", "{model}", "--temperature", "inf"), "temperature"),
    "seed of too many bits": (("generate", "--model", "{model}", "--seed", "9" * 23), "seed"),
    "option that is no YAML": (("generate", "--model", "{model}", "--option", "steps=[1"), "--option"),
    "error of nothing": (("eval", "--model", "{model}", "--data", "{text}", "--target-stderr", "0"), "--target-stderr"),
    "live and json": (("generate", "--model", "{model}", "--live", "--json"), "--json"),
    "unknown training field": (("train", "tiny", "--optim.lrr", "1"), "did you mean '--optim.lr'"),
    "short name misspelt": (("train", "tiny", "--max-minuts", "1"), "did you mean '--max-minutes'"),
    "unknown recipe": (("train", "tny"), "did you mean 'tiny'"),
    "training value out of range": (("train", "tiny", "--data", "{text}", "--optim.lr", "-1"), "optim.lr"),
    "block that does not fit": (("train", "tiny", "--data", "{text}", "--block-size", "999"), "model.block_size"),
    "schedule that is none": (("train", "tiny", "--data", "{text}", "--noise.schedule", "cosin"), "did you mean 'cosine'"),
    "law that is none": (("train", "tiny", "--data", "{text}", "--noise.law", "conut"), "count"),
    "tracker that is none": (("train", "tiny", "--data", "{text}", "--log.trackers", "[tensorbord]"), "did you mean 'tensorboard'"),
    "seed out of range": (("train", "tiny", "--data", "{text}", "--seed", "-1"), "seed is -1"),
    "a width that heads do not divide": (("train", "tiny", "--data", "{text}", "--model.n_heads", "5"), "5 heads"),
    "training on an empty file": (("train", "tiny", "--data", "{empty}"), "empty"),
    "training on bytes": (("train", "tiny", "--data", "{binary}"), "UTF-8"),
    "training on one token": (("train", "tiny", "--data", "{short}"), "two tokens"),
    "run folder that is a file": (("train", "tiny", "--data", "{text}", "--out", "{empty}"), "empty.txt"),
    "warm start from NaN": (("train", "tiny", "--data", "{text}", "--init-from", "{nan}"), "NaN"),
    "warm start of another vocabulary": (("train", "tiny", "--data", "{text}", "--init-from", "{model}", "--data.tokenizer", "bpe"), "ids"),
    "warm start of another size": (("train", "tiny", "--data", "{text}", "--init-from", "{model}"), "model.hidden_dim"),
    "no training text": (("train", "tiny"), "data.train"),
    "empty file": (("eval", "--model", "{model}", "--data", "{empty}"), "empty"),
    "not UTF-8": (("eval", "--model", "{model}", "--data", "{binary}"), "UTF-8"),
    "fewer than two tokens": (("eval", "--model", "{model}", "--data", "{short}"), "two tokens"),
    "no such data": (("eval", "--model", "{model}", "--data", "{text}.no"), "does not exist"),
    "unknown likelihood method": (("eval", "--model", "{model}", "--data", "{text}", "--method", "nelboo"), "did you mean 'nelbo'"),
    "pickle instead of a model": (("info", "--model", "{pickle}"), "pickle"),
    "pickle in a model folder": (("generate", "--model", "{pickled}"), "pickle"),
    "config that names code": (("generate", "--model", "{code}"), "trust_code"),
    "NaN weights": (("generate", "--model", "{nan}"), "has NaN or infinite values"),
    "weights cut short": (("eval", "--model", "{cut}", "--data", "{text}"), "model.safetensors"),
    "tensor that is missing": (("eval", "--model", "{partial}", "--data", "{text}"), "norm1.weight is missing"),
    "tokenizer of another model": (("eval", "--model", "{foreign}", "--data", "{text}"), "257 ids"),
    "model without a tokenizer": (("generate", "--model", "{mute}"), "holds no tokenizer"),
    "blocks of no cells": (("info", "--model", "{blockless}"), "block_size is 0"),
    "drawing of no block": (("info", "--mask", "--block-size", "0"), "--block-size"),
    "drawing of a block too large": (("info", "--mask", "--block-size", "13"), "--block-size"),
    "drawing that cannot be written": (("info", "--mask", "--json", "--out", "{empty}/mask.png"), "empty.txt"),
    "fewer than no windows": (("data", "inspect", "--data", "{text}", "--shown", "-1"), "--shown"),
    "tokenizer that is none": (("data", "inspect", "--data", "{text}", "--tokenizer", "bites"), "tokenizer 'bites'"),
    "demo of no time": (("demo", "--minutes", "nan"), "--minutes"),
    "demo of no tokens": (("demo", "--tokens", "0"), "--tokens"),
    "demo with an unknown field": (("demo", "--option", "optim.lrr=1"), "did you mean 'lr'"),
    "word too many": (("info", "extra"), "extra"),
    "option cut short": (("generate", "--model"), "--model"),
    "drawing too large": (("info", "--mask", "--length", "5000"), "--length"),
    "device that is not there": (("info", "--model", "{model}", "--device", "cuda:99"), "device"),
    "dtype that is none": (("generate", "--model", "{model}", "--dtype", "float33"), "float32"),
}


def weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def facts(folder: Path, name: str, **changed: Any) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04}.")


NORM = "backbone.blocks.0.norm1.weight"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "nan": lambda folder: weights(folder, lambda tensors: tensors[NORM].fill_(float("nan"))),
    "partial": lambda folder: weights(folder, lambda tensors: tensors.pop(NORM)),
    "cut": lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
    "pickled": pickled,
    "code": lambda folder: facts(folder, "config.json", backbone="os:system"),
    "blockless": lambda folder: facts(folder, "config.json", block_size=0),
    "foreign": lambda folder: facts(folder, "bdlm_tokenizer.json", vocab_size=257, mask_id=256, eos_id=None, bos_id=None),
    "mute": lambda folder: (folder / "bdlm_tokenizer.json").unlink(),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> dict[str, Path]:
    """Files that the mistakes name."""
    folder = tmp_path_factory.mktemp("bad")
    contents = {"empty.txt": b"", "binary.txt": b"\xff\xfe\x00abc", "short.txt": b"a", "pickle.bin": b"\x80\x04}."}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name, damage in DAMAGES.items():
        shutil.copytree(tiny_model, folder / name)
        damage(folder / name)
    named = {name.split(".")[0]: folder / name for name in [*contents, *DAMAGES]}
    return {"model": tiny_model, "text": text_file} | named


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(
    bdlm: Run, places: dict[str, Path], mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    code, out, err = bdlm(*(w.format(**places) for w in words))
    assert code == 2, err
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bdlm: "), err
    assert expected in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "nothing is written before the options are checked"


def test_a_refused_command_changes_no_file(bdlm: Run, tiny_model: Path) -> None:
    """Another seed, width, tokenizer or folder of the run that is there: every file of it stays what it was."""
    run = tiny_model.parent
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = (
        (("--seed", 7), "seed"),
        (("--model.hidden_dim", 64), "model.hidden_dim"),
        (("--data.tokenizer", "bytes-no-end"), "data.tokenizer"),
        (("--resume", "never"), "resume"),
        (("--resume", run / "nowhere"), "nowhere"),
    )
    for words, expected in refused:
        code, _, err = bdlm("train", run / "config.json", *words)
        assert code == 2 and expected in err, err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_fault_of_ours_is_one_line_unless_asked(monkeypatch: pytest.MonkeyPatch, bdlm: Run) -> None:
    from bdlm.commands import info

    def broken(options: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(info, "run", broken)
    code, _, err = bdlm("info")
    assert code == 1 and "planted" in err and len(err.strip().splitlines()) == 1
    monkeypatch.setenv("BDLM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["info"])


def test_every_command_explains_itself(bdlm: Run) -> None:
    listing = bdlm("--help")[1]
    for name in cli.COMMANDS:
        assert name in listing
        code, out, _ = bdlm(name, "--help")
        assert code == 0 and f"bdlm {name}" in out


def test_the_installed_command_runs() -> None:
    program = Path(sys.executable).with_name("bdlm")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("bdlm ")
