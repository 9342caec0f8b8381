"""The commands end to end on a tiny model: the contract of `--json`, and errors in one line with
exit code 2."""

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
from bdlm.commands.generate import unescaped

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
        "--decoder",
        "first-hitting",
        "--seed",
        3,
        "--json",
    )
    code, out, _ = bdlm(*words)
    facts = json.loads(out)
    assert code == 0
    assert {"text", "tokens", "forward_passes", "tokens_per_forward", "seconds"} <= facts.keys()
    assert facts["tokens"] == len(facts["token_ids"]) <= 10
    assert facts["tokens_per_forward"] == pytest.approx(facts["tokens"] / facts["forward_passes"])
    again = json.loads(bdlm(*words)[1])
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}
    assert json.loads(bdlm(*words[:-2], 4, "--json")[1])["token_ids"] != facts["token_ids"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", r"\n"),
        (r"\x41\u20ac\\", "A€\\"),
        ("\n", "\n"),
        ("a.b", "a.b"),
    ],
)
def test_stop_strings_are_read_with_their_escapes(word: str, meant: str) -> None:
    assert unescaped(word) == meant


def test_a_stop_string_of_a_new_line_ends_the_text_before_it(bdlm: Run) -> None:
    words = (
        "generate",
        "--model",
        "shakespeare",
        "--prompt",
        "KING",
        "--max-new-tokens",
        40,
        "--seed",
        3,
        "--json",
    )
    whole, cut = (
        json.loads(bdlm(*words, *more)[1])["text"] for more in ((), ("--stop", r"\n", r"\u0021"))
    )
    assert "\n" in whole and cut == min(whole.split("\n")[0], whole.split("!")[0], key=len)
    code, out, _ = bdlm(*words[:3], "--prompt=--- x", "--max-new-tokens", 4)
    assert code == 0 and out.startswith("--- x")


def test_generate_many_equals_one_each(bdlm: Run, tiny_model: Path) -> None:
    base = ("generate", "--model", tiny_model, "--prompt", "a cat", "--max-new-tokens", 9, "--json")
    many = json.loads(bdlm(*base, "--count", 3, "--seed", 5)[1])
    alone = [json.loads(bdlm(*base, "--seed", 5 + i)[1]) for i in range(3)]
    assert [m["token_ids"] for m in many] == [a["token_ids"] for a in alone]


def test_live_prints_the_same_text(bdlm: Run, tiny_model: Path) -> None:
    base = ("generate", "--model", tiny_model, "--prompt", "the", "--max-new-tokens", 12)
    text = json.loads(bdlm(*base, "--json")[1])["text"]
    assert bdlm(*base, "--live")[1].strip("\n") == ("the" + text).strip("\n")


def test_train_then_eval_then_generate(bdlm: Run, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = (
        "--model.hidden_dim",
        32,
        "--model.length",
        32,
        "--valid.rows",
        4,
        "--log.progress",
        "false",
        "--optim.batch_size=8",
    )
    code, said, _ = bdlm(
        "train", "tiny", "--data", text_file, "--max-steps", 4, "--out", out, *sizes, "--json"
    )
    assert code == 0
    model = json.loads(said)["model"]
    code, said, _ = bdlm(
        "eval", "--model", model, "--data", text_file, "--max-tokens", 200, "--json"
    )
    assert code == 0
    assert json.loads(said)["tokens"] >= 200
    code, said, _ = bdlm("generate", "--model", model, "--max-new-tokens", 5, "--json")
    assert code == 0
    assert json.loads(said)["tokens"] <= 5
    assert (
        bdlm(
            "train",
            "tiny",
            "--data",
            text_file,
            "--max-steps",
            4,
            "--out",
            out,
            *sizes,
            "--resume",
            "never",
        )[0]
        == 2
    )


def test_eval_json_contract(bdlm: Run, tiny_model: Path, text_file: Path) -> None:
    code, out, _ = bdlm(
        "eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 300, "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert {
        "nats_per_token",
        "stderr",
        "perplexity",
        "bits_per_byte",
        "tokens",
        "method",
    } <= facts.keys()
    assert facts["perplexity"] == pytest.approx(2.718281828 ** facts["nats_per_token"], rel=1e-6)
    # bytes: a token is a byte
    assert facts["bits_per_byte"] == pytest.approx(facts["nats_per_token"] / 0.6931471806, rel=0.02)
    assert (
        json.loads(
            bdlm("eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 300, "--json")[
                1
            ]
        )
        == facts
    )


def test_info_and_mask(bdlm: Run, tiny_model: Path, tmp_path: Path) -> None:
    facts = json.loads(bdlm("info", "--model", tiny_model, "--json")[1])
    assert facts["block_size"] == 4
    assert facts["vocab_size"] == 258
    drawn = json.loads(bdlm("info", "--mask", "--length", 8, "--block-size", 2, "--json")[1])
    length, size = 8, 2
    # the paper's count of allowed pairs
    assert sum(map(sum, drawn["visible"])) == length * (length + size)
    picture = tmp_path / "mask.png"
    assert bdlm("info", "--mask", "--model", tiny_model, "--out", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_data_inspect(bdlm: Run, text_file: Path) -> None:
    facts = json.loads(bdlm("data", "inspect", "--data", text_file, "--length", 32, "--json")[1])
    assert facts["documents"] == 1
    assert facts["bytes"] == text_file.stat().st_size


MISTAKES = {
    "unknown command": (("evl",), "did you mean 'eval'"),
    "unknown option": (("generate", "--modle", "x"), "did you mean '--model'"),
    "missing option": (("generate",), "needs --model"),
    "value of another type": (
        ("generate", "--model", "x", "--max-new-tokens", "many"),
        "--max-new-tokens",
    ),
    "no such model": (("generate", "--model", "no-such-model"), "no-such-model"),
    "unknown decoder": (
        ("generate", "--model", "{model}", "--decoder", "first-hiting"),
        "did you mean 'first-hitting'",
    ),
    "unknown option of a decoder": (
        ("generate", "--model", "{model}", "--decoder", "ancestral", "--option", "stpes=3"),
        "did you mean 'steps'",
    ),
    "option without a value": (
        ("generate", "--model", "{model}", "--option", "steps"),
        "name=value",
    ),
    "temperature out of range": (
        ("generate", "--model", "{model}", "--temperature", "-1"),
        "temperature",
    ),
    "temperature that is no number": (
        ("generate", "--model", "{model}", "--temperature", "inf"),
        "temperature",
    ),
    "seed of too many bits": (("generate", "--model", "{model}", "--seed", "9" * 23), "seed"),
    "option that is no YAML": (
        ("generate", "--model", "{model}", "--option", "steps=[1"),
        "--option",
    ),
    "error that is no number": (
        ("eval", "--model", "{model}", "--data", "{text}", "--target-stderr", "nan"),
        "target_stderr is nan",
    ),
    "seed of noise of too many bits": (
        ("eval", "--model", "{model}", "--data", "{text}", "--seed", "9" * 23),
        "64 bits",
    ),
    "window that does not move": (
        ("eval", "--model", "{model}", "--data", "{text}", "--view", "sliding", "--stride", "0"),
        "stride 0",
    ),
    "variance of no distribution": (
        ("variance", "--model", "{model}", "--data", "{text}", "--distributions"),
        "distributions is empty",
    ),
    "live and json": (("generate", "--model", "{model}", "--live", "--json"), "--json"),
    "unknown training field": (("train", "tiny", "--optim.lrr", "1"), "did you mean '--optim.lr'"),
    "short name misspelt": (("train", "tiny", "--max-minuts", "1"), "did you mean '--max-minutes'"),
    "unknown recipe": (("train", "tny"), "did you mean 'tiny'"),
    "training value out of range": (
        ("train", "tiny", "--data", "{text}", "--optim.lr", "-1"),
        "optim.lr",
    ),
    "block that does not fit": (
        ("train", "tiny", "--data", "{text}", "--block-size", "999"),
        "model.block_size",
    ),
    "schedule that is none": (
        ("train", "tiny", "--data", "{text}", "--noise.schedule", "cosin"),
        "did you mean 'cosine'",
    ),
    "distribution that is none": (
        ("train", "tiny", "--data", "{text}", "--noise.distribution", "conut"),
        "count",
    ),
    "tracker that is none": (
        ("train", "tiny", "--data", "{text}", "--log.trackers", "[tensorbord]"),
        "did you mean 'tensorboard'",
    ),
    "seed out of range": (("train", "tiny", "--data", "{text}", "--seed", "-1"), "seed is -1"),
    "a width that heads do not divide": (
        ("train", "tiny", "--data", "{text}", "--model.n_heads", "5"),
        "5 heads",
    ),
    "training on an empty file": (("train", "tiny", "--data", "{empty}"), "empty"),
    "training on bytes": (("train", "tiny", "--data", "{binary}"), "UTF-8"),
    "training on one token": (("train", "tiny", "--data", "{short}"), "two tokens"),
    "run folder that is a file": (
        ("train", "tiny", "--data", "{text}", "--out", "{empty}"),
        "empty.txt",
    ),
    "warm start from NaN": (("train", "tiny", "--data", "{text}", "--init-from", "{nan}"), "NaN"),
    "warm start of another vocabulary": (
        ("train", "tiny", "--data", "{text}", "--init-from", "{model}", "--data.tokenizer", "bpe"),
        "ids",
    ),
    "warm start of another size": (
        ("train", "tiny", "--data", "{text}", "--init-from", "{model}"),
        "model.hidden_dim",
    ),
    "no training text": (("train", "tiny"), "data.train"),
    "empty file": (("eval", "--model", "{model}", "--data", "{empty}"), "empty"),
    "not UTF-8": (("eval", "--model", "{model}", "--data", "{binary}"), "UTF-8"),
    "fewer than two tokens": (("eval", "--model", "{model}", "--data", "{short}"), "two tokens"),
    "no such data": (("eval", "--model", "{model}", "--data", "{text}.no"), "does not exist"),
    "unknown likelihood method": (
        ("eval", "--model", "{model}", "--data", "{text}", "--method", "nelboo"),
        "did you mean 'nelbo'",
    ),
    "pickle instead of a model": (("info", "--model", "{pickle}"), "pickle"),
    "pickle in a model folder": (("generate", "--model", "{pickled}"), "pickle"),
    "config that names code": (("generate", "--model", "{code}"), "trust_code"),
    "NaN weights": (("generate", "--model", "{nan}"), "has NaN or infinite values"),
    "weights cut short": (("eval", "--model", "{cut}", "--data", "{text}"), "model.safetensors"),
    "tensor that is missing": (
        ("eval", "--model", "{partial}", "--data", "{text}"),
        "norm1.weight is missing",
    ),
    "tokenizer of another model": (("eval", "--model", "{foreign}", "--data", "{text}"), "257 ids"),
    "model without a tokenizer": (("generate", "--model", "{mute}"), "holds no tokenizer"),
    "blocks of no cells": (("info", "--model", "{blockless}"), "block_size is 0"),
    "drawing of no block": (("info", "--mask", "--block-size", "0"), "--block-size"),
    "drawing of a block too large": (("info", "--mask", "--block-size", "13"), "--block-size"),
    "drawing that cannot be written": (
        ("info", "--mask", "--json", "--out", "{empty}/mask.png"),
        "empty.txt",
    ),
    "fewer than no windows": (("data", "inspect", "--data", "{text}", "--shown", "-1"), "--shown"),
    "tokenizer that is none": (
        ("data", "inspect", "--data", "{text}", "--tokenizer", "bites"),
        "tokenizer 'bites'",
    ),
    "demo of no time": (("demo", "--minutes", "nan"), "--minutes"),
    "demo of no tokens": (("demo", "--tokens", "0"), "--tokens"),
    "demo with an unknown field": (("demo", "--option", "optim.lrr=1"), "did you mean 'lr'"),
    "demo without an end": (("demo", "--minutes", "inf"), "--minutes is inf"),
    # said before the training, not after it
    "demo with an unknown decoder": (("demo", "--decoder", "ebb"), "did you mean 'eb'"),
    "benchmark that is none": (("bench", "foo"), "bdlm bench has no 'foo'; known: generate, train"),
    "benchmark misspelt": (("bench", "trian"), "did you mean 'train'"),
    "benchmark of nothing": (("bench",), "needs a word after it: train, generate"),
    "look at data misspelt": (("data", "inspct", "--data", "{text}"), "did you mean 'inspect'"),
    "number that is none": (
        ("data", "inspect", "--data", "{text}", "--length", "nan"),
        "--length is 'nan'; use a whole number",
    ),
    "share that is no number": (
        ("generate", "--model", "x", "--top-p", "much"),
        "--top-p is 'much'; use a number",
    ),
    "split misspelt": (
        ("data", "inspect", "--data", "{text}", "--split", "paragraphs"),
        "did you mean 'paragraph'",
    ),
    "option of no command": (("--verson",), "did you mean '--version'"),
    "option that is the prompt": (
        ("generate", "--model", "no-such-model", "--option", "prompt=2"),
        "option 'prompt' is unknown",
    ),
    "tokens of more than 64 bits": (
        ("generate", "--model", "{model}", "--option", "top_k=9223372036854775808"),
        "top_k is 9223372036854775808; use a whole number of 64 bits",
    ),
    "block of no memory": (
        ("generate", "--model", "{model}", "--block-size", "9223372036854775807"),
        "block_size is 9223372036854775807, but the model's window",
    ),
    "steps of more than 64 bits": (
        (
            "generate",
            "--model",
            "{model}",
            "--decoder",
            "ancestral",
            "--option",
            "steps=9223372036854775808",
        ),
        "ancestral.steps is 9223372036854775808; use a whole number of 64 bits",
    ),
    "count of more than 64 bits": (
        ("generate", "--model", "{model}", "--count", "9223372036854775808"),
        "--count is 9223372036854775808; use a whole number of 64 bits",
    ),
    "batch of no memory": (
        (
            "variance",
            "--model",
            "{model}",
            "--data",
            "{text}",
            "--batch-size",
            "9223372036854775807",
        ),
        "batch_size is 9223372036854775807; use 1 to 2^24",
    ),
    "stop at a lone surrogate": (
        ("generate", "--model", "{model}", "--option", 'stop="\\ud800"'),
        "not UTF-8",
    ),
    "home of nobody": (("generate", "--model", "~nosuchuser"), "~nosuchuser"),
    "folder at home with nobody": (
        (
            "frontier",
            "--model",
            "{model}",
            "--prompts",
            "{text}",
            "--texts",
            "2",
            "--seeds",
            "1",
            "--out",
            "~nosuchuser/x",
        ),
        "--out is '~nosuchuser/x'",
    ),
    "prompts at home with nobody": (
        ("frontier", "--model", "{model}", "--prompts", "~nosuchuser", "--list"),
        "~nosuchuser",
    ),
    "markup for a number": (("info", "--length", "[/b]"), "--length is '[/b]'; use a whole number"),
    "name of thousands of signs": (("info", "--model", "m" * 5000), "m..."),
    "markup for a name": (("info", "--model", "[/b]"), "model '[/b]'"),
    "option of another kind": (
        ("generate", "--model", "{model}", "--option", "min_entropy=x"),
        "min_entropy is 'x'; use a number or None",
    ),
    "given tokens that are none": (
        ("generate", "--model", "{model}", "--option", "known_tokens=[1]"),
        "known_tokens is [1]; use a dictionary",
    ),
    "stop at nothing": (("generate", "--model", "{model}", "--stop", ""), "empty text"),
    "device of no kind": (
        ("info", "--model", "{model}", "--device", "tpu"),
        "device is 'tpu'; use cpu, cuda or auto",
    ),
    "picture of no drawing": (("info", "--out", "mask.png"), "--mask"),
    "length of nothing": (
        ("eval", "--model", "{model}", "--data", "{text}", "--length", "0"),
        "length is 0",
    ),
    "frontier without a folder": (
        ("frontier", "--model", "{model}", "--prompts", "{text}"),
        "needs --out",
    ),
    "frontier of no temperature": (
        (
            "frontier",
            "--model",
            "{model}",
            "--prompts",
            "{text}",
            "--list",
            "--temperatures",
            "nan",
        ),
        "temperature is nan",
    ),
    "prompts that are no text": (
        ("frontier", "--model", "{model}", "--list", "--prompts", "{binary}"),
        "UTF-8",
    ),
    "word too many": (("info", "extra"), "extra"),
    "option cut short": (("generate", "--model"), "--model"),
    "prompt that looks like an option": (
        ("generate", "--model", "x", "--prompt", "--- x"),
        "is written --prompt='--- x'",
    ),
    "prompt that looks like options": (
        ("generate", "--model", "x", "--prompt", "-x y"),
        "--prompt needs a value; one that begins with a",
    ),
    "stop string that looks like an option": (
        ("generate", "--model", "x", "--stop", "-a"),
        "is written --name=-a",
    ),
    "option misspelt behind another": (
        ("generate", "--prompt", "--modle", "x"),
        "did you mean '--model'",
    ),
    "escape that is none": (
        ("generate", "--model", "x", "--stop", r"a\d"),
        r"--stop a\d has an unknown escape \d; use \n, \t",
    ),
    "escape cut short": (("generate", "--model", "x", "--stop", r"\x1"), r"unknown escape \x"),
    "escape of half a character": (
        ("generate", "--model", "x", "--stop", r"\ud800"),
        r"unknown escape \ud800",
    ),
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
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-9]
        )
    ),
    "pickled": pickled,
    "code": lambda folder: facts(folder, "config.json", backbone="os:system"),
    "blockless": lambda folder: facts(folder, "config.json", block_size=0),
    "foreign": lambda folder: facts(
        folder, "bdlm_tokenizer.json", vocab_size=257, mask_id=256, eos_id=None, bos_id=None
    ),
    "mute": lambda folder: (folder / "bdlm_tokenizer.json").unlink(),
}


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path
) -> dict[str, Path]:
    """Files that the mistakes name."""
    folder = tmp_path_factory.mktemp("bad")
    contents = {
        "empty.txt": b"",
        "binary.txt": b"\xff\xfe\x00abc",
        "short.txt": b"a",
        "pickle.bin": b"\x80\x04}.",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name, damage in DAMAGES.items():
        shutil.copytree(tiny_model, folder / name)
        damage(folder / name)
    named = {name.split(".")[0]: folder / name for name in [*contents, *DAMAGES]}
    return {"model": tiny_model, "text": text_file} | named


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(
    bdlm: Run,
    places: dict[str, Path],
    mistake: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    code, out, err = bdlm(*(w.format(**places) for w in words))
    assert code == 2, err
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("bdlm: "), err
    assert expected in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], (
        "nothing is written before the options are checked"
    )


def test_a_refused_command_changes_no_file(bdlm: Run, tiny_model: Path) -> None:
    """Another seed, width, tokenizer or folder of the run that is there: every file of it stays
    what it was."""
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
        assert code == 2, err
        assert expected in err, err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_limit_below_what_a_run_has_behind_it_is_refused(bdlm: Run, tiny_model: Path) -> None:
    recipe = tiny_model.parent / "config.json"
    for words, said in (
        (("--max-steps", 10), "limits.steps is 10, but the run in"),
        (("--max-tokens", 10), "limits.tokens is 10, but the run in"),
    ):
        code, _, err = bdlm("train", recipe, *words)
        assert code == 2
        assert said in err
        assert "raise it" in err
        assert len(err.splitlines()) == 1
    assert json.loads(recipe.read_text())["limits"]["steps"] == 12


def test_frontier_lists_its_points_without_a_folder(
    bdlm: Run, tiny_model: Path, text_file: Path
) -> None:
    words = (
        "frontier",
        "--model",
        tiny_model,
        "--prompts",
        text_file,
        "--list",
        "--decoders",
        "fixed-k",
    )
    code, out, err = bdlm(*words)
    assert code == 0
    assert "5 points" in out
    assert "left out: fixed-k k 6" in err, "blocks of the model have 4 cells"


def test_frontier_lists_its_points_as_json(bdlm: Run, tiny_model: Path, text_file: Path) -> None:
    words = (
        "frontier",
        "--model",
        tiny_model,
        "--prompts",
        text_file,
        "--texts",
        8,
        "--list",
        "--json",
        "--decoders",
        "fixed-k",
    )
    code, out, err = bdlm(*words)
    facts = json.loads(out)
    assert code == 0 and (facts["texts"], facts["max_new_tokens"]) == (8, 256)
    assert [point["options"].get("k") for point in facts["points"]] == [None, 1, 2, 3, 4]
    assert [f"left out: {line}" for line in facts["left_out"]] == err.splitlines()


def test_measure_says_what_it_did_not_measure(bdlm: Run, text_file: Path) -> None:
    code, out, _ = bdlm("measure", "--texts", text_file)
    assert code == 0
    assert "None" not in out
    assert "not measured; needs --held-out" in out
    assert "not measured; needs --training" in out
    assert json.loads(bdlm("measure", "--texts", text_file, "--json")[1])["kl"] is None


def test_eval_says_what_the_error_of_one_window_holds(
    bdlm: Run, tiny_model: Path, text_file: Path
) -> None:
    words = ("eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 20)
    assert "one window: the error is of the noise alone" in bdlm(*words)[1]
    assert "one window: no standard error" in bdlm(*words, "--block-size", 1)[1]
    facts = json.loads(bdlm(*words, "--block-size", 1, "--json")[1])
    assert (facts["stderr"], facts["remark"]) == (None, "one window: no standard error")
    assert json.loads(bdlm(*words[:-1], 200, "--json")[1])["remark"] is None


def test_a_long_prompt_is_warned_of_in_one_line(bdlm: Run, tiny_model: Path) -> None:
    words = (
        "generate",
        "--model",
        tiny_model,
        "--prompt",
        "the cat sat on the mat and the dog",
        "--max-new-tokens",
        4,
        "--json",
    )
    code, out, err = bdlm(*words)
    assert code == 0
    assert json.loads(out)["context_window"] == 35
    assert len(err.splitlines()) == 1
    assert err.startswith("bdlm: the prompt has 35 tokens, more than the 32")


def test_a_fault_of_ours_is_one_line_unless_asked(
    monkeypatch: pytest.MonkeyPatch, bdlm: Run
) -> None:
    from bdlm.commands import info

    def broken(options: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(info, "run", broken)
    code, _, err = bdlm("info")
    assert code == 1
    assert "planted" in err
    assert len(err.strip().splitlines()) == 1
    monkeypatch.setenv("BDLM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["info"])


def test_every_command_explains_itself(bdlm: Run) -> None:
    listing = bdlm("--help")[1]
    for name in cli.COMMANDS:
        assert name in listing
        code, out, _ = bdlm(name, "--help")
        assert code == 0
        assert f"bdlm {name}" in out


def test_the_installed_command_runs() -> None:
    program = Path(sys.executable).with_name("bdlm")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("bdlm ")
