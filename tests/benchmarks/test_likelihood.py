"""The likelihood sheet on a tiny model: its rows, and the draws that it looks up, are those of
`evaluate`; its tables are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bdlm
from bdlm.core.counts import CountDistribution
from bdlm.core.schedules import SCHEDULES
from bdlm.core.statistics import mean_estimate
from bdlm.core.types import NOWHERE
from bdlm.likelihood.bound import evaluate
from bdlm.likelihood.methods import ESTIMATORS, Draw, noise
from bdlm.likelihood.rows import Rows, rows_of
from bdlm.models.toy import Inconsistent, toy_spec
from benchmarks.likelihood import Remembered, main


def test_the_sheet(tiny_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        tiny_model,
        "--data",
        text_file,
        "--fit-on",
        text_file,
        "--sizes",
        1,
        4,
        "--tokens",
        200,
    ]
    words += ["--orders", 1, 64, "--check", 2, "--passes", 4, "--replicates", 30]
    main([str(w) for w in (*words, "--json")])
    found = json.loads(capsys.readouterr().out)
    one, four = found["gaps"]
    assert one["gap"] == pytest.approx(0, abs=1e-9)
    assert four["gap"] > 0
    assert four["passes"] == 15
    for name, method in (("bound", "nelbo-exact"), ("exact", "exact")):
        again = bdlm.load(tiny_model).evaluate(
            text_file, max_tokens=200, method=method, block_size=4, unit="window"
        )
        assert (four[name], four[f"{name}_stderr"]) == (
            pytest.approx(again.nats_per_token),
            pytest.approx(again.stderr, rel=1e-5),
        )
    assert four["gap_stderr"] < four["bound_stderr"], "paired"
    for row in found["checks"]:
        assert row["bound_by_orders"] == pytest.approx(row["bound"], abs=1e-4)
        assert row["exact_by_orders"] == pytest.approx(row["exact"], abs=1e-4)
    single, many = found["orders"]
    assert abs(single["nats_per_token"] - four["bound"]) < 5 * single["stderr"]
    assert abs(many["nats_per_token"] - four["exact"]) < 5 * many["stderr"] + 1e-3
    assert [e["estimator"] for e in found["estimators"]] == [
        "time",
        "count",
        "complementary",
        "importance",
    ]
    for row in found["estimators"][1:]:
        assert abs(row["nats_per_token"] - four["bound"]) < 5 * row["noise"], (
            "30 draws are more passes than the error is stated for"
        )
    main([str(w) for w in words])
    assert (
        sum(line.startswith("|") for line in capsys.readouterr().out.splitlines()) == 4 + 4 + 4 + 6
    )


def world() -> tuple[Inconsistent, Rows]:
    """Conditionals of no joint distribution; given first cells, a second document, and padding make
    blocks of 1 to 4 cells."""
    doc = torch.zeros(3, 16, dtype=torch.long)
    doc[1, 9:], doc[2, 10:] = 1, NOWHERE
    return Inconsistent(toy_spec(4, 16)), rows_of(
        (torch.randint(0, 3, doc.shape, generator=torch.Generator().manual_seed(0)), doc)
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_draws_are_looked_up_as_the_model_would_score_them(estimator: str) -> None:
    model, windows = world()
    seen, counts = Remembered.of(model, windows, 4), CountDistribution.uniform(4)
    scored = evaluate(
        model, windows, estimator=estimator, counts=counts, replicates=3, seed=7
    ).nats_per_token
    draws = [
        seen.drawn(
            noise(
                model.spec,
                windows,
                seen.where,
                Draw(7, number, len(windows), 0),
                estimator,
                SCHEDULES["linear"],
                counts,
            )
        )
        for number in range(3)
    ]
    assert sum(draws) / 3 == pytest.approx(scored, abs=1e-5)


def test_orders_go_from_the_bound_to_the_likelihood() -> None:
    model, windows = world()
    seen = Remembered.of(model, windows, 4)
    bound, exact, tokens = (float(values.sum()) for values in seen.estimates())
    assert bound / tokens == pytest.approx(
        evaluate(model, windows, method="nelbo-exact").nats_per_token, abs=1e-6
    )
    assert exact / tokens == pytest.approx(
        evaluate(model, windows, method="exact").nats_per_token, abs=1e-6
    )
    single = mean_estimate(torch.tensor([seen.by_orders(1, seed) for seed in range(400)]))
    assert abs(single.mean - bound / tokens) < 5 * single.stderr < 0.2 * (bound - exact) / tokens
    assert seen.by_orders(20_000, 0) == pytest.approx(
        exact / tokens, abs=0.02 * (bound - exact) / tokens
    )
