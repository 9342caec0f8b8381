"""The likelihood sheet on a tiny model: its rows agree with `LM.evaluate`, its tables are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bdlm
from benchmarks.likelihood import main


def test_the_sheet(tiny_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", tiny_model, "--data", text_file, "--fit-on", text_file, "--sizes", 1, 4, "--tokens", 200]
    words += ["--orders", 1, 2, "--check", 2, "--passes", 4]
    main([str(w) for w in (*words, "--noise-tokens", 200, "--json")])
    found = json.loads(capsys.readouterr().out)
    one, four = found["gaps"]
    assert one["gap"] == pytest.approx(0, abs=1e-9) and four["gap"] > 0 and four["passes"] == 15
    for name, method in (("bound", "nelbo-exact"), ("exact", "exact")):
        again = bdlm.load(tiny_model).evaluate(text_file, max_tokens=200, method=method, block_size=4, unit="window")
        assert (four[name], four[f"{name}_stderr"]) == (pytest.approx(again.nats_per_token), pytest.approx(again.stderr))
    assert four["gap_stderr"] < four["bound_stderr"], "paired"
    assert [e["estimator"] for e in found["estimators"]] == ["time", "count", "complementary", "importance"]
    assert [e["replicates"] for e in found["estimators"]] == [4, 4, 2, 4]
    assert len(found["checks"]) == 2
    for row in found["checks"]:
        assert row["bound_by_orders"] == pytest.approx(row["bound"], abs=1e-4)
        assert row["exact_by_orders"] == pytest.approx(row["exact"], abs=1e-4)
    for row, count in zip(found["orders"], (1, 2), strict=True):
        again = bdlm.load(tiny_model).evaluate(text_file, max_tokens=200, method="k-orders", orders=count, block_size=4, replicates=1)
        assert (row["orders"], row["passes"], row["nats_per_token"]) == (count, 4 * count, pytest.approx(again.nats_per_token))
    main([str(w) for w in (*words, "--noise-tokens", 200)])
    assert sum(line.startswith("|") for line in capsys.readouterr().out.splitlines()) == 4 + 4 + 4 + 6
