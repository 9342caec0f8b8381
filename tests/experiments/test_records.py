"""The published records in `results/`: each is of a run of today's plan, and the pages say what the
records hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdlm.experiments.plan import load_plan, plan_names
from bdlm.experiments.report import write_report
from bdlm.experiments.runner import record_path, run_plan

RESULTS = Path(__file__).parents[2] / "results"
RECORDED = [name for name in plan_names() if (RESULTS / name).is_dir()]


def test_there_are_records() -> None:
    assert {"base", "likelihood", "zero-shot", "recipe", "generation"} <= set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_records_are_of_todays_plan_and_make_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the page is compared, not the pictures
    monkeypatch.setattr("bdlm.experiments.report.draw", lambda figure, rows, path: path)
    plan = load_plan(
        name,
        places={
            **{part: f"data/{part}.jsonl" for part in ("train", "valid", "test")},
            "sets": "data",
        },
    )
    done = tuple(run.name for run in plan.runs if record_path(RESULTS, name, run.name).is_file())
    assert {f.stem for f in (RESULTS / name).iterdir()} == set(done)
    run_plan(plan, tmp_path, RESULTS, done, say=pytest.fail)
    (tmp_path / name).symlink_to(RESULTS / name)
    page = RESULTS / f"{name}.md"
    if page.is_file():
        assert write_report(plan, tmp_path)[0].read_text() == page.read_text()
