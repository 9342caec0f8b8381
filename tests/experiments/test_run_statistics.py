"""The arithmetic of reports, and that the smallest detectable difference is found as often as it
says."""

from __future__ import annotations

import math
import re

import pytest
import torch

from bdlm.experiments.run_statistics import Row, entry, number, pick, smallest_detectable


def record(nats: float, run: str = "a-s1") -> dict[str, object]:
    test = {"nats": nats, "list": [{"x": 1.0}, {"x": 2.0}], "time:0.3,0.8": {"low.er": 4.0}}
    return {"run": run, "measures": {"test": test}, "training": {"seconds": 3.0}, "seconds": {}}


def row(label: str, values: list[float], seeds: tuple[int, ...] = (1, 2, 3)) -> Row:
    return Row(
        label, [record(v, f"{label}-s{seed}") for seed, v in zip(seeds, values, strict=False)]
    )


def test_places() -> None:
    assert pick(record(2.0), "test.nats") == 2.0
    assert pick(record(2.0), "test.list.1.x") == 2.0
    assert pick(record(2.0), "test.list.2.x") is None
    assert pick(record(2.0), "test.time:0.3,0.8.low.er") == 4.0, "names that hold dots themselves"
    assert pick(record(2.0), "training.seconds") == 3.0
    assert pick(record(2.0), "test.nats - training.seconds + test.list.1.x") == 1.0
    assert pick(record(2.0), "test.nats - test.other") is None
    assert pick(record(2.0), "test.other") is None
    assert pick(record(2.0), "else.nats") is None


def test_cells() -> None:
    assert entry([1.0, 2.0, 3.0], "value") == "2.000 ± 0.577"
    assert entry([math.log(20.0)], "perplexity") == "20.00"
    assert entry([math.log(20.0) - 0.1, math.log(20.0) + 0.1], "perplexity") == "20.00 ± 2.00"
    assert entry([], "value") == "-"
    assert number(123456.0) == "123,456"
    assert number(0.00123456) == "0.001235"
    assert number(6.4e-7) == "6.4e-07"


def test_differences_are_paired() -> None:
    """Seeds differ by whole nats, the two rows by a tenth: only pairing shows it."""
    one, other = row("a", [1.0, 2.0, 3.0]), row("b", [1.1, 2.1, 3.1])
    assert other.less(one, "test.nats") == "+0.1000 ± 0.0000"
    assert one.less(one, "test.nats") == ""
    assert row("c", [1.0], (4,)).less(one, "test.nats") == "-"


def test_only_seeds_that_both_have_are_paired() -> None:
    one, other = row("a", [1.0, 2.0, 3.0]), row("b", [1.1, 3.1], seeds=(1, 3))
    assert other.less(one, "test.nats") == "+0.1000 ± 0.0000"


def test_the_smallest_detectable_difference_is_detected_four_times_in_five() -> None:
    """Simulated: 9 rows of 3 seeds give the spread; a true difference of the stated size is then
    significant in 80 % of experiments.

    The tests use the same pooled spread. Of 4,000 simulations the share's standard error is 0.006,
    4 of them a false alarm in 16,000; t's quantiles are an expansion, off by less than 0.005 of the
    share."""
    draw = torch.Generator().manual_seed(0)
    found = []
    t975 = 2.101  # of 18 degrees of freedom
    for _ in range(4000):
        noise = torch.randn(9, 3, generator=draw, dtype=torch.float64)
        rows = [
            row("ref", [0.0, 0.0, 0.0]),
            *(row(str(i), values.tolist()) for i, values in enumerate(noise)),
        ]
        said = smallest_detectable(rows, rows[0], {"nats": "test.nats"})[0]
        stated = float(re.findall(r"([0-9.]+)\.$", said)[0])
        pooled = float(noise.var(1).mean().sqrt())
        found.append((stated / pooled, pooled))
    scale = found[0][0]
    assert all(s == pytest.approx(scale, rel=2e-3) for s, _ in found)
    effect = torch.tensor([scale * 1.0])  # in units of the true spread, 1
    trials = torch.randn(4000, 3, generator=draw, dtype=torch.float64).mean(1) + effect
    spreads = torch.tensor([p for _, p in found], dtype=torch.float64)
    share = float((trials > t975 * spreads / math.sqrt(3)).double().mean())
    assert share == pytest.approx(0.8, abs=0.03)
