"""`bdlm experiment`: the list, a user's plan from run to page, launch lines, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdlm import cli

PLAN = """
title: A plan of one's own
claim: Is there a number?
runs:
  - name: "whole-s{seed}"
    each: {seed: [1, 2]}
    measures: {language: {kind: language, block_size: 3, seed: "{seed}", steps: 4, every: 2,
               letters: 4, length: 3, states: 2, choices: 2, hidden_dim: 16, layers: 1, rows: 4}}
  - name: tuned
    train: {data: {train: [story.txt]}, limits: {steps: 1}}
tables:
  - {title: Strings, rows: {whole: "whole-s*"}, columns: {strings: language.strings}}
"""


def call(*words: str | Path) -> int:
    return cli.run(["experiment", *map(str, words)])


def test_the_list_names_every_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", "--json") == 0
    names = {plan["name"] for plan in json.loads(capsys.readouterr().out)}
    assert {
        "likelihood",
        "zero-shot",
        "schedules",
        "recipe",
        "length",
        "generation",
        "support",
        "likelihood-paper",
    } <= names


def test_a_plan_of_ones_own_becomes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(PLAN)
    where = ("--out", tmp_path / "runs", "--results", tmp_path / "results")
    assert call("run", tmp_path / "mine.yaml", *where, "--only", "whole-s1", "whole-s2") == 0
    assert "whole-s2 is done" in capsys.readouterr().out
    assert call("report", tmp_path / "mine.yaml", *where) == 0
    page = (tmp_path / "results" / "mine.md").read_text()
    assert "2 of 3 runs recorded" in page
    assert "| whole | 2 | 8.000 ± 0.000 |" in page
    assert call("launch", tmp_path / "mine.yaml", *where, "--processes", "2") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (
        line == "accelerate launch --num_processes 2 -m bdlm.training.loop"
        f" {tmp_path / 'runs' / 'mine' / 'tuned.yaml'}"
    )
    assert (tmp_path / "runs" / "mine" / "tuned.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run",), "needs the name of a plan"),
        (("run", "likelyhood"), "did you mean 'likelihood'"),
        (("run", "likelihood"), "--data"),
        (("run", "likelihood", "--data", "nowhere"), "nowhere"),
        (("launch", "support", "--processes", "0"), "--processes is 0"),
        (("report", "support", "--reslts", "x"), "--results"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (
        ()
        if "--reslts" in words
        else ("--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"))
    )
    assert call(*words, *own) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
