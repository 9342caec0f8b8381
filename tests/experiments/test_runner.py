"""Runs are done once: through a kill in the middle, and again after all is done. The report is made
from the records alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bdlm.core.errors import ConfigError
from bdlm.experiments.plan import Plan, Run, load_plan
from bdlm.experiments.report import write_report
from bdlm.experiments.runner import recipes, record_path, run_plan
from bdlm.training.config import load_config

TINY = str(Path(__file__).with_name("tiny.yaml"))
NAMES = ["base", "bd1-s1", "bd1-s2", "bd4-s1", "bd4-s2", "looked-at"]
SCRIPT = """
import sys
from pathlib import Path
from bdlm.experiments.plan import load_plan
from bdlm.experiments.runner import run_plan
plan, work, results, text = sys.argv[1:]
run_plan(load_plan(plan, work, {"text": text}), Path(work), Path(results))
"""


def text_of(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(
        "".join(f"the {n} of {n * n % 97} was seen by {n % 7} and {n % 11}\n" for n in range(60))
    )
    return path


def plan_in(folder: Path) -> Plan:
    return load_plan(TINY, str(folder / "work"), {"text": str(folder / "text.txt")})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny plan was killed after its first record, and then done."""
    folder = tmp_path_factory.mktemp("experiment")
    text = text_of(folder)
    words = [
        sys.executable,
        "-c",
        SCRIPT,
        TINY,
        str(folder / "work"),
        str(folder / "results"),
        str(text),
    ]
    first = record_path(folder / "results", "tiny", "bd1-s1")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not first.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert first.is_file()
    assert not record_path(folder / "results", "tiny", "looked-at").is_file()
    stamp = first.stat().st_mtime_ns
    paths = run_plan(plan_in(folder), folder / "work", folder / "results", say=lambda line: None)
    assert [p.stem for p in paths] == NAMES
    assert first.stat().st_mtime_ns == stamp
    return folder


def test_a_killed_plan_is_completed_without_doing_finished_runs_again(done: Path) -> None:
    stamps = {
        name: record_path(done / "results", "tiny", name).stat().st_mtime_ns for name in NAMES
    }
    said: list[str] = []
    run_plan(plan_in(done), done / "work", done / "results", say=said.append)
    assert not said
    assert stamps == {
        name: record_path(done / "results", "tiny", name).stat().st_mtime_ns for name in NAMES
    }


def test_a_record_says_where_it_came_from(done: Path) -> None:
    record = json.loads(record_path(done / "results", "tiny", "bd4-s2").read_text())
    assert record["seed"] == 2
    assert record["training"]["steps"] == 6
    assert record["config"]["model"]["block_size"] == 4
    assert record["measures"]["test"]["nats_per_token"] > 0
    assert record["seconds"]["test"] > 0
    assert {"torch", "bdlm", "python"} <= set(record["versions"])


def test_a_deleted_record_is_made_again_from_what_is_there(done: Path) -> None:
    path = record_path(done / "results", "tiny", "bd4-s1")
    before = json.loads(path.read_text())
    path.unlink()
    run_plan(plan_in(done), done / "work", done / "results", say=lambda line: None)
    after = json.loads(path.read_text())
    assert after["measures"] == before["measures"]
    assert after["training"] == before["training"]


def test_every_measure_leaves_plain_numbers(done: Path) -> None:
    measures = json.loads(record_path(done / "results", "tiny", "looked-at").read_text())[
        "measures"
    ]
    assert measures["distributions"]["count"]["loss"]["value"] > 0
    assert set(measures["search"]) == {"8", "16"}
    assert measures["passes"]["two passes"]["gradient_difference"] < 1e-4
    assert (
        measures["passes"]["block by block"]["kept_bytes"]
        > measures["passes"]["one pass"]["kept_bytes"]
    )
    full, window = measures["places"], measures["window"]
    assert (
        [p["first"] for p in full["positions"]]
        == [0, 16]
        == [p["first"] for p in window["positions"]]
    )
    assert full["tokens"] == window["tokens"]
    assert full["nats_per_token"] != window["nats_per_token"]
    assert measures["texts"]["tokens"] == 24
    assert measures["texts"]["judged"]["nats_per_token"] > 0
    assert measures["set"]["tokens"] >= 40


def test_the_report_is_made_from_the_records(done: Path) -> None:
    made = write_report(plan_in(done), done / "results")
    assert [p.name for p in made] == ["tiny.md", "tiny-nats.png", "tiny-places.png"]
    page = made[0].read_text()
    assert "6 of 6 runs recorded" in page
    assert "| L'=4 | 2 |" in page
    assert "could have shown" in page
    assert "![By place]" in page
    record_path(done / "results", "tiny", "bd4-s2").rename(done / "held.json")
    assert "Not run yet: bd4-s2." in write_report(plan_in(done), done / "results")[0].read_text()
    (done / "held.json").rename(record_path(done / "results", "tiny", "bd4-s2"))


def test_a_record_of_another_plan_is_not_reported_as_this_ones(done: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny.yaml"
    for old, new, what in (
        ("max_tokens: 60", "max_tokens: 61", "options"),
        ("limits: {steps: 6}", "limits: {steps: 7}", "config"),
    ):
        other.write_text(Path(TINY).read_text().replace(old, new))
        plan = load_plan(str(other), str(done / "work"), {"text": str(done / "text.txt")})
        with pytest.raises(ConfigError, match=f"is the record of a run with another '{what}'"):
            run_plan(plan, done / "work", done / "results", say=lambda line: None)


def test_a_record_is_good_wherever_the_folders_are(done: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "work"
    moved.parent.mkdir()
    (done / "work").rename(moved)
    plan = load_plan(TINY, str(moved), {"text": str(done / "text.txt")})
    said: list[str] = []
    run_plan(plan, moved, done / "results", say=said.append)
    moved.rename(done / "work")
    assert not said


def test_a_line_of_metrics_cut_by_a_kill_is_left_out(done: Path) -> None:
    path = record_path(done / "results", "tiny", "bd1-s2")
    before, metrics = (
        json.loads(path.read_text()),
        done / "work" / "tiny" / "bd1-s2" / "metrics.jsonl",
    )
    metrics.write_text('{"kind": "train", "st\n' + metrics.read_text())
    path.unlink()
    run_plan(plan_in(done), done / "work", done / "results", say=lambda line: None)
    assert json.loads(path.read_text())["training"] == before["training"]


def test_what_cannot_be_done_is_said_before_the_first_run(done: Path, tmp_path: Path) -> None:
    plan = plan_in(done)
    with pytest.raises(
        ConfigError,
        match=r"starts from .* which is not there; first: bdlm experiment run tiny --only base",
    ):
        run_plan(
            load_plan(TINY, str(tmp_path)),
            tmp_path,
            tmp_path / "results",
            only=("bd1-s1",),
            say=lambda line: None,
        )
    for options, said in (
        ({"kind": "likelyhood", "data": "x"}, "did you mean 'likelihood'"),
        (
            {"kind": "zero_shot", "data": "x", "max_token": 3},
            "has no option 'max_token'; did you mean 'max_tokens'",
        ),
        ({"kind": "zero_shot"}, "needs the option 'data'"),
    ):
        runs = (
            *plan.runs,
            Run("later", None, str(done / "work" / "tiny" / "base" / "model"), {"test": options}),
        )
        with pytest.raises(ConfigError, match=said):
            run_plan(
                replace(plan, runs=runs), tmp_path, tmp_path / "results", say=lambda line: None
            )
    assert not (tmp_path / "results").exists()


def test_other_options_than_those_measured_are_refused(done: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny.yaml"
    other.write_text(Path(TINY).read_text().replace("max_tokens: 60", "max_tokens: 61"))
    plan = load_plan(str(other), str(done / "work"), {"text": str(done / "text.txt")})
    with pytest.raises(ConfigError, match="other options"):
        run_plan(plan, done / "work", tmp_path / "results", only=("bd1-s1",), say=lambda line: None)
    other.write_text(Path(TINY).read_text().replace("limits: {steps: 6}", "limits: {steps: 7}"))
    plan = load_plan(str(other), str(done / "work"), {"text": str(done / "text.txt")})
    with pytest.raises(ConfigError, match="another config"):
        run_plan(plan, done / "work", tmp_path / "results", only=("base",), say=lambda line: None)


def test_training_can_be_done_elsewhere_and_is_found(done: Path, tmp_path: Path) -> None:
    """`launch` writes recipes for several devices; what they train is the run's own training."""
    base, *others = recipes(plan_in(done), tmp_path, tmp_path / "results")
    assert [p.name for p in (base, *others)] == [f"{n}.yaml" for n in NAMES[:-1]]
    assert load_config(base) == plan_in(done).runs[0].train
    assert recipes(plan_in(done), tmp_path, done / "results") == []


def test_unknown_runs_kinds_and_options_are_named(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run 'bd9'"):
        run_plan(plan_in(done), done / "work", tmp_path, only=("bd9",))
    for old, new, said in (
        ("kind: passes", "kind: pases", "did you mean 'passes'"),
        ("repeats: 1", "repaets: 1", "repaets"),
    ):
        other = tmp_path / "other.yaml"
        other.write_text(Path(TINY).read_text().replace(old, new).replace("{plan}", "tiny"))
        plan = load_plan(str(other), str(done / "work"), {"text": str(done / "text.txt")})
        with pytest.raises(ConfigError, match=said):
            run_plan(plan, done / "work", tmp_path, only=("looked-at",), say=lambda line: None)
