"""The benchmark of training: its goals, and a figure with its numbers. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import train


def test_the_table_is_in_the_order_of_its_targets() -> None:
    first = [
        (c.vocab, c.length, c.block, c.batch, c.target_speed, c.target_memory) for c in train.TABLE
    ]
    assert first == [
        (50258, 256, 4, 2, 4.0, 0.3),
        (50258, 1024, 4, 2, 4.5, 0.2),
        (257, 256, 16, 4, 1.6, 0.5),
    ]


def test_figures_of_the_reference_name_their_machine() -> None:
    measured = any(case.reference is not None for case in train.TABLE)
    assert measured == (train.REFERENCE_MACHINE is not None)


def test_lengths_become_a_figure_with_its_numbers(tmp_path: Path) -> None:
    both = {
        "tokens_per_second": 9.0,
        "plain_tokens_per_second": 3.0,
        "peak_memory_mb": 2.0,
        "plain_peak_memory_mb": 8.0,
    }
    rows = [
        {"length": n, "ratio_tokens_per_second": 3.0, "ratio_peak_memory": 0.25, **both}
        for n in (256, 512)
    ]
    path = train.draw(rows, tmp_path / "figures", "2 layers")
    assert path.stat().st_size > 1000
    assert json.loads(path.with_suffix(".json").read_text())["rows"] == rows
