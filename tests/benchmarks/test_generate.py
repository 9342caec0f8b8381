"""The benchmark of sampling runs and prints its rows in the order of the targets; no figure is
asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import generate


@pytest.mark.slow
def test_a_quick_run_prints_one_row_a_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        generate, "TABLE", (generate.TABLE[0], generate.TABLE[3], generate.TABLE[-1])
    )
    monkeypatch.setattr("benchmarks.common.matmul_peak", lambda: 1.0)
    monkeypatch.setattr("benchmarks.common.copy_peak", lambda: 1.0)
    monkeypatch.setattr(
        "benchmarks.common.worker",
        lambda module, job: generate.work(job["side"], generate.Case(**job["case"])),
    )
    rows = generate.main(json=True, quick=True)
    assert json.loads(capsys.readouterr().out) == rows
    assert [row["baseline"] for row in rows] == ["plain", "plain", "llama"]
    assert all(row["ratio_tokens_per_second"] > 0 for row in rows)


def test_the_table_is_in_the_order_of_its_targets() -> None:
    first = [(c.vocab, c.block, c.batch, c.target) for c in generate.TABLE[:5]]
    assert first == [
        (50258, 16, 1, 3.5),
        (50258, 4, 1, 3.2),
        (257, 16, 1, 1.7),
        (50258, 4, 16, 12),
        (50258, 16, 16, 8),
    ]
    assert generate.TABLE[5].top_p == 0.9
    assert generate.TABLE[5].block == 16


def test_a_curve_becomes_a_figure_with_its_numbers(tmp_path: Path) -> None:
    shares = {"share_of_matmul_peak": 0.2, "share_of_bandwidth": 0.5}
    rows = [
        {"block": b, "batch": n, "ms_per_call": 1.0 * n, "tokens_per_second": 5.0, **shares}
        for b in (4, 16)
        for n in (1, 2)
    ]
    path = generate.draw(rows, "batch", tmp_path / "figures", "2 layers")
    assert path.stat().st_size > 1000
    assert json.loads(path.with_suffix(".json").read_text())["rows"] == rows
