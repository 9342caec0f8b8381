"""The metrics file survives a cut line and a repeated step; the curve is a PNG that says what it
shows."""

import pytest

from bdlm.core.errors import DataError
from bdlm.training.run_log import RunLog, duration, learning_curve, read_metrics


def run(folder, steps, loss=3.0):
    run_log = RunLog(folder)
    for step in steps:
        run_log.write(
            "train", step, loss=loss - step / 10, tokens=step * 100, block_size=1 if step < 4 else 4
        )
    return run_log


def test_a_cut_line_is_left_out_and_the_next_one_is_whole(tmp_path):
    run(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    run(tmp_path, [3, 4])
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [
        (s, 3.0 - s / 10) for s in (1, 2, 3, 4)
    ]


def test_of_a_repeated_step_the_last_one_counts(tmp_path):
    run(tmp_path, [1, 2, 3])
    run(tmp_path, [2, 3, 4], loss=9.0)
    assert [r["loss"] for r in read_metrics(tmp_path)] == pytest.approx([2.9, 8.8, 8.7, 8.6])


def test_both_block_sizes_of_a_validation_are_kept(tmp_path):
    run_log = RunLog(tmp_path)
    for size in (1, 4):
        run_log.write("valid", 5, block_size=size, nats_per_token=2.0, stderr=0.1, tokens=10)
    assert [r["block_size"] for r in read_metrics(tmp_path)] == [1, 4]


def test_only_the_main_process_writes(tmp_path):
    RunLog(tmp_path / "none", main=False).write("train", 1, loss=1.0)
    assert not (tmp_path / "none").exists()


def test_curve(tmp_path):
    run_log = run(tmp_path, range(1, 9))
    run_log.write("valid", 8, block_size=4, nats_per_token=2.2, stderr=0.05, tokens=800)
    path = learning_curve(read_metrics(tmp_path), tmp_path / "curve.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob(".*"))


def test_curve_of_nothing(tmp_path):
    with pytest.raises(DataError, match="no metrics"):
        read_metrics(tmp_path)
    RunLog(tmp_path).write("event", 0, event="started")
    with pytest.raises(DataError, match="no training"):
        learning_curve(read_metrics(tmp_path), tmp_path / "curve.png")


def test_durations():
    assert [duration(s) for s in (3.9, 61, 3661, float("inf"))] == [
        "3 s",
        "1 min 01 s",
        "1 h 01 min",
        "?",
    ]
