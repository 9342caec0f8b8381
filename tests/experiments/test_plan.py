"""Plans: every one that comes with the package expands, and its tables and figures ask for runs
that it has."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from bdlm.core.errors import ConfigError
from bdlm.experiments.figures import KINDS
from bdlm.experiments.measurements import MEASUREMENTS
from bdlm.experiments.plan import filled, load_plan, merged, plan_names

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.mark.parametrize("name", plan_names())
def test_a_packaged_plan_holds_together(name: str) -> None:
    plan = load_plan(name)
    names = [run.name for run in plan.runs]
    assert plan.title
    assert plan.claim
    assert names
    for run in plan.runs:
        assert run.train or run.model or {m["kind"] for m in run.measures.values()} == {"language"}
        for options in run.measures.values():
            assert options["kind"] in MEASUREMENTS
    for part in (*plan.tables, *plan.figures):
        for label, pattern in part.rows.items():
            assert fnmatch.filter(names, pattern), f"{label}: no run fits {pattern}"
    for table in plan.tables:
        assert table.against is None or table.against in table.rows
        assert set(table.compare) <= set(table.columns)
        assert set(table.published) <= set(table.rows)
        assert all(set(v) <= set(table.columns) for v in table.published.values())
        asked = {where.split(".")[0] for where in table.columns.values()} - {"training", "seconds"}
        assert asked <= {m for run in plan.runs for m in run.measures}
    assert {figure.kind for figure in plan.figures} <= set(KINDS)


def test_a_grid_becomes_runs() -> None:
    plan = load_plan(str(TINY), work="w", places={"text": "t.txt"})
    assert [run.name for run in plan.runs] == [
        "base",
        "bd1-s1",
        "bd1-s2",
        "bd4-s1",
        "bd4-s2",
        "looked-at",
    ]
    config = plan.runs[4].train
    assert config is not None
    assert (config.seed, config.model.block_size, config.out) == (2, 4, "w/tiny/bd4-s2")
    assert config.model.init_from == "w/tiny/base/model"
    assert config.data.train == ("t.txt",)
    assert config.optim.batch_size == 4


def test_placeholders_and_layers() -> None:
    assert filled({"a": ["{x}", "n{x}", "{y}"]}, {"x": 3}) == {"a": [3, "n3", "{y}"]}
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": None}) == {
        "a": {"b": 5, "c": 2},
        "d": None,
    }


TABLE = "title: x\nclaim: y\nruns: [{name: a}]\ntables: [{title: T, rows: {A: a}, columns: {n: t.n}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: x\nrunz: []\n", "no field 'runz'; did you mean 'runs'"),
        ("title: x\nclaim: y\nruns: [{name: a}, {name: a}]\n", "two runs named 'a'"),
        ("title: x\nclaim: y\nruns: [{name: a, trian: {}}]\n", "did you mean 'train'"),
        ("title: x\nclaim: y\nruns: [{name: a, each: 3}]\n", "each is 3; use a mapping"),
        ("title: x\nclaim: y\nruns: [{name: a, each: {seed: 3}}]\n", "each.seed is 3; use a list"),
        (
            "title: x\nclaim: y\nruns: [{name: a, measures: {test: likelihood}}]\n",
            "use a mapping with a kind",
        ),
        ("title: x\nclaim: y\nruns: {name: a}\n", "use a list"),
        ("title: x\nclaim: y\nruns: [{each: {}}]\n", "has no field 'name'; it needs one"),
        ("title: x\nruns: []\n", "has no field 'claim'; it needs one"),
        ("title: x\nclaim: y\ncommon: [1]\nruns: [{name: a}]\n", "common is .1.; use a mapping"),
        ("title: x\nclaim: y\nruns: [{name: ../../a}]\n", "use letters, digits"),
        (f"{TABLE}, against: B}}]\n", "against is 'B', not a row of 'T'"),
        (f"{TABLE}, show: perpexity}}]\n", "did you mean 'perplexity'"),
        (
            "title: x\nclaim: y\nruns: [{name: a, train: {optim: {lr: -1}, limits: {steps: 1}}}]\n",
            "optim.lr",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_plan(str(path))


def test_an_unknown_plan_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'likelihood'"):
        load_plan("likelyhood")
