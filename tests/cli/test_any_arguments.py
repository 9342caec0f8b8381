"""Whatever the words on a command line, a command ends with exit code 0, or with 2 and one line
that says what to change."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdlm import cli
from bdlm.commands import train as train_command
from bdlm.training.config import TrainConfig

# A cheap, valid form of each command, to which options are added.
BASES: dict[str, tuple[str, ...]] = {
    "generate": ("--model", "{model}", "--max-new-tokens", "5"),
    "eval": ("--model", "{model}", "--data", "{short}", "--max-tokens", "20", "--replicates", "1"),
    "variance": ("--model", "{model}", "--data", "{short}", "--batches", "2", "--batch-size", "2"),
    "measure": (
        "--texts",
        "{short}",
    ),
    "data": ("inspect", "--data", "{short}", "--length", "16"),
    "info": (),
    "frontier": (
        "--model",
        "{model}",
        "--prompts",
        "{short}",
        "--texts",
        "2",
        "--seeds",
        "1",
        "--max-new-tokens",
        "5",
        "--list",
    ),
    "experiment": ("report", "{plan}", "--results", "{folder}"),
    "bench": (),
    "lm-eval": ("--model", "{model}", "--tasks", "x"),
    "demo": ("--tokens", "20", "--max-new-tokens", "5"),
    "train": ("tiny", "--data", "{short}"),
}
HUGE = ("9223372036854775808", "-9223372036854775809", "9" * 40)
LARGEST = "9223372036854775807"  # 64 bits hold it
NUMBERS = ("-1", "0", "1", "2", "3", "nan", "inf", "-inf", "1e400", "-0.5", "0.5", "1.5", *HUGE)
WORDS = (
    "",
    " ",
    "-",
    "--",
    "=",
    "\udcff",
    "\ud800",
    "a" * 5000,
    "[/b]",
    "[bold]x",
    ":smile:",
    "{missing}",
    "{folder}",
    "{short}",
    "{empty}",
    "{binary}",
    "{model}",
    "/dev/null",
    "~nosuchuser",
    "~nosuchuser/x",
    "hf:",
    "os:system",
    "x:y",
    "null",
    "[1, 2]",
    "{{a: 1}}",
    "true",
    "auto",
    "cuda:99",
    "exact",
    "k-orders",
    "sliding",
    "documents",
    "importance",
    "left-to-right",
    "float16",
    "bytes",
    "line",
)
# `--option` and the dotted fields take YAML, which can hold what a word of a shell cannot
OPTIONS = (
    "top_k",
    "stop",
    "known_tokens",
    "seed",
    "retries",
    "banned_token_ids",
    "negative_prompt_ids",
    "k",
    "steps",
    "options",
    "min_entropy",
    "guidance_scale",
    "infill_mode",
)
YAML = (
    *NUMBERS,
    LARGEST,
    '"\\ud800"',
    '"\\0"',
    "[1, {{}}]",
    "null",
    "{{a: 1}}",
    "{{1: 2}}",
    "[[1]]",
    "a",
    "2026-01-01",
    "!!binary YQ==",
)
# for these the largest number asks for a long run, which is not a mistake
COUNTS = {
    "max-new-tokens",
    "count",
    "samples",
    "replicates",
    "max-replicates",
    "batches",
    "gradient-batches",
    "texts",
    "seeds",
    "orders",
    "minutes",
    "tokens",
}
UNWANTED = {"compile", "semantics", "help"}  # slow with any other option


def names(command: str) -> dict[str, bool]:
    """List the options of a command, and whether each takes a value."""
    if command == "train":
        return (
            {name: True for name, _, _ in train_command._fields(TrainConfig)}
            | dict.fromkeys(train_command.SHORT, True)
            | {"json": False}
        )
    kind = importlib.import_module(f"bdlm.commands.{command.replace('-', '_')}").Options
    found = {
        f.name.replace("_", "-"): get_type_hints(kind)[f.name] is not bool
        for f in dataclasses.fields(kind)
    }
    return {name: takes for name, takes in found.items() if name not in UNWANTED}


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """Draw a command with up to three more options, each with any value."""
    command = draw(st.sampled_from(sorted(BASES)))
    words = [command, *BASES[command]]
    known = names(command)
    for name in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3)):
        if not known[name]:
            words.append(f"--{name}")
            continue
        text = st.text(max_size=12).map(
            lambda text: text.replace("{", "{{").replace("}", "}}").replace("\0", "")
        )
        values = st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | text
        if name not in COUNTS and command != "train":
            values |= st.just(LARGEST)
        if name == "option":
            values |= st.tuples(st.sampled_from(OPTIONS), st.sampled_from(YAML)).map("=".join)
        elif command == "train":
            values |= st.sampled_from(YAML)
        joined = draw(st.booleans())
        value = draw(values)
        words += [f"--{name}={value}"] if joined else [f"--{name}", value]
    return words


@pytest.fixture
def places(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """Make the files that the lines name, and an empty working folder.

    Training only reads its config, and the demo's corpus has two lines."""
    (tmp_path / "short.txt").write_text("the cat sat on the mat\nand the dog saw the cat\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "folder").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "plan.yaml").write_text("title: x\nclaim: y\nruns: [{name: a}]\n")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("BDLM_DEBUG", "0")
    result = {
        "reason": "done",
        "model": str(tiny_model),
        "folder": str(tiny_model.parent),
        "step": 1,
        "tokens": 1,
    }
    monkeypatch.setattr(
        "bdlm.api.train", lambda config: dataclasses.make_dataclass("Result", result)(**result)
    )
    monkeypatch.setattr("bdlm.models.model_folder.packaged", dict)

    def write_corpus(folder: Any, overwrite: bool = False) -> dict[str, int]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "heldout.jsonl").write_text(
            json.dumps({"text": "the cat sat on the mat and the dog saw it"}) + "\n"
        )
        return {"heldout": 1}

    monkeypatch.setattr("bdlm.data.shakespeare.write_corpus", write_corpus)
    named = {
        name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("short", "empty", "binary", "plan")
    }
    yield named | {
        "model": str(tiny_model),
        "folder": str(tmp_path / "folder"),
        "missing": str(tmp_path / "missing.txt"),
    }


def outcome(words: list[str]) -> tuple[int, str, str]:
    """Run the real `main` in this process: exit code, standard output and standard error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(b"a prompt"), encoding="utf-8")
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["bdlm", *words], given
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
    finally:
        sys.argv, sys.stdin = before
    said = [
        stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
        for stream in (out, err)
    ]
    return int(end.value.code or 0), *said


def check(words: list[str], places: dict[str, str]) -> None:
    words = [word.format(**places) for word in words]
    code, out, err = outcome(words)
    assert code in (0, 2), f"{words}: exit code {code}: {err}"
    assert "Traceback" not in out + err, words
    if code == 2:
        last = err.splitlines()[-1]
        assert last.startswith("bdlm: ") and len(last) < 1500, f"{words}: {err}"
        assert "internal error" not in err
    elif "--json" in words and "--help" not in words and "-h" not in words:
        json.loads(out)


EVERY = dict(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@settings(max_examples=60, **EVERY)  # type: ignore[arg-type]
@given(words=lines())
def test_any_arguments_end_well(places: dict[str, str], words: list[str]) -> None:
    check(words, places)


@pytest.mark.fuzz
@settings(max_examples=1000, **EVERY)  # type: ignore[arg-type]
@given(words=lines())
def test_many_arguments_end_well(places: dict[str, str], words: list[str]) -> None:
    check(words, places)


@pytest.mark.parametrize("command", BASES)
def test_the_cheap_form_of_a_command_is_valid(command: str, places: dict[str, str]) -> None:
    """Otherwise the tests above would see only the first error message."""
    words = [word.format(**places) for word in (command, *BASES[command])]
    code, _, err = outcome(words)
    expected = {
        "bench": "needs a word after it",
        "lm-eval": "lm-eval",
        "experiment": "has no record",
    }.get(command)
    assert code == 0 or (expected is not None and expected in err), err
