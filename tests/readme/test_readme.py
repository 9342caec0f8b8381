"""Every fenced `bash` and `python` example of the README runs, on a tiny model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from bdlm import cli
from tests.docs.fences import NOT_RUN, fences, run

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
COMMANDS = [
    command for fence in fences(README) if fence.kind == "bash" for command in fence.commands()
]


def test_commands_run_in_order(
    tmp_path: Path,
    tiny_model: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a folder with a text; what the README calls `shakespeare` is the tiny model there."""
    shutil.copytree(tiny_model, tmp_path / "shakespeare")
    shutil.copy(text_file, tmp_path / "my.txt")
    assert run(README, tmp_path, capsys, monkeypatch) >= 9


def test_what_is_not_run_exists() -> None:
    rules = (ROOT / "Makefile").read_text()
    for command in NOT_RUN:
        program, word = command.split()[:2]
        if program == "make":
            assert re.search(rf"^{word}:", rules, re.MULTILINE), command
        elif program == "bdlm":
            assert word in cli.COMMANDS
    assert {"pip install .", "bdlm demo"} <= set(COMMANDS) & NOT_RUN


def test_it_shows_a_run_and_says_how_to_cite() -> None:
    text = README.read_text(encoding="utf-8")
    assert "docs/animation/live.svg" in text
    assert "@inproceedings{arriola2025block" in text
    assert "CITATION.cff" in text


def test_it_counts_the_decoders() -> None:
    from bdlm.generation.decoders import DECODERS

    assert f"{len(DECODERS)} decoders" in README.read_text(encoding="utf-8")


def test_every_named_proof_is_a_test() -> None:
    named = re.findall(r"`(tests/\S+?)::(\w+)`", (ROOT / "docs" / "proofs.md").read_text())
    assert len(named) > 20
    wrong = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert not wrong


def test_published_records_are_written_only_when_asked_for() -> None:
    """Defaults write to `runs/`, which git ignores; published records change only by --results."""
    from bdlm.commands.experiment import Options
    from benchmarks.common import FIGURES

    assert Options(what="list").results == "runs/results"
    assert FIGURES.relative_to(ROOT).parts[0] == "runs"
