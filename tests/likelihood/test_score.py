"""The error bar and its two parts against simulated corpora whose true spread is known; positions;
the JSON contract."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from bdlm.core.statistics import ratio_estimate
from bdlm.likelihood.score import Score, by_position, combine

CORPORA, UNITS, DRAWS = 1500, 50, 6


def simulated(coupling: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats [corpora, draws, units] and tokens [corpora, units] of documents of unequal length whose
    nats have a spread of their own, plus noise that is redrawn in each replicate. coupling: share
    of the noise's corpus mean that stratification takes out."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 100, (CORPORA, UNITS), generator=generator).double()
    own = tokens * (2 + 0.3 * torch.randn(CORPORA, UNITS, generator=generator, dtype=torch.float64))
    noise = (
        torch.randn(CORPORA, DRAWS, UNITS, generator=generator, dtype=torch.float64)
        * tokens[:, None]
        * 0.8
    )
    return own[:, None] + noise - coupling * noise.mean(-1, keepdim=True), tokens


@pytest.mark.parametrize("coupling", [0.0, 0.9])
def test_the_error_and_its_parts_are_the_spread_over_corpora(coupling: float) -> None:
    """The stated errors' root mean square against the true spread over 1,500 corpora: within 8 %
    (that spread is known to 1.8 %)."""
    nats, tokens = simulated(coupling)
    found = [combine(n, t) for n, t in zip(nats, tokens, strict=True)]
    rms = lambda values: float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())
    truth = float(torch.tensor([f.mean for f in found]).std())
    assert rms([f.stderr for f in found]) == pytest.approx(truth, rel=0.08)
    own = nats.mean(1)  # more draws leave the documents' own spread
    noise = float((nats.sum(-1) / tokens.sum(-1, keepdim=True)).var(1).mean()) / DRAWS
    assert rms([f.monte_carlo for f in found]) == pytest.approx(math.sqrt(noise), rel=1e-9)
    assert rms([f.units for f in found]) == pytest.approx(math.sqrt(truth**2 - noise), rel=0.08)
    if coupling:
        independent = rms([ratio_estimate(n, t).stderr for n, t in zip(own, tokens, strict=True)])
        assert independent > 1.1 * truth, (
            "noise that is coupled by strata must not be counted as independent"
        )


def test_without_noise_the_error_is_the_ratio_estimators() -> None:
    nats, tokens = torch.tensor([[10.0, 20.0, 31.0]]), torch.tensor([5, 9, 16])
    found, plain = combine(nats, tokens, random=False), ratio_estimate(nats[0], tokens)
    assert (found.mean, found.stderr, found.units, found.monte_carlo) == (
        plain.mean,
        plain.stderr,
        plain.stderr,
        0.0,
    )


def test_what_cannot_be_told_is_none() -> None:
    one_draw = combine(torch.tensor([[10.0, 20.0]]), torch.tensor([5, 9]))
    assert one_draw.monte_carlo is None
    assert one_draw.units is None
    assert one_draw.stderr is not None
    one_unit = combine(torch.tensor([[10.0], [12.0]]), torch.tensor([5]))
    assert one_unit.units is None
    assert one_unit.monte_carlo == pytest.approx(0.2)
    assert one_unit.stderr == pytest.approx(0.2)
    neither = combine(torch.tensor([[10.0]]), torch.tensor([5]))
    assert neither.stderr is None
    assert neither.mean == 2.0


def test_empty_units_count_for_nothing() -> None:
    full, empty = torch.tensor([[10.0, 20.0, 31.0]]), torch.tensor([[10.0, 0.0, 20.0, 31.0]])
    one, other = (
        combine(full, torch.tensor([5, 9, 16]), False),
        combine(empty, torch.tensor([5, 0, 9, 16]), False),
    )
    assert (one.mean, one.stderr, one.count) == (other.mean, other.stderr, other.count)


def test_positions_part_the_text() -> None:
    nats = torch.arange(24, dtype=torch.float64).view(2, 12)
    scored = torch.ones(2, 12, dtype=torch.bool)
    scored[0, 0] = scored[1, :3] = False
    place = torch.arange(12).expand(2, 12) + torch.tensor([[0], [6]])
    found = by_position(nats, scored, place, torch.tensor([[0], [1]]).expand(2, 12), 4)
    assert [(f.first, f.last, f.tokens) for f in found] == [
        (0, 3, 3),
        (4, 7, 4),
        (8, 11, 4 + 3),
        (12, 15, 4),
        (16, 19, 2),
    ]
    assert sum(f.nats_per_token * f.tokens for f in found) == pytest.approx(
        float(nats[scored].sum())
    )
    assert found[2].stderr is not None, "one unit has no spread"
    assert found[0].stderr is None, "one unit has no spread"


REPORT = Score(
    nats_per_token=2.0,
    stderr=0.1,
    perplexity=math.exp(2),
    bits_per_byte=None,
    tokens=7,
    method="nelbo",
    estimator="count",
    block_size=4,
    replicates=4,
    stderr_units=0.08,
    stderr_monte_carlo=0.06,
    unit="window",
    units=3,
    bytes=None,
    passes=4,
    seed=0,
)


def test_json_opens_with_the_contract() -> None:
    values = REPORT.to_json()
    assert list(values)[:6] == [
        "nats_per_token",
        "stderr",
        "perplexity",
        "bits_per_byte",
        "tokens",
        "method",
    ]
    assert json.loads(json.dumps(values)) == values
    assert "positions" not in values
    split = replace(
        REPORT,
        positions=by_position(
            torch.ones(1, 4),
            torch.ones(1, 4) > 0,
            torch.arange(4)[None],
            torch.zeros(1, 4).long(),
            2,
        ),
    )
    assert [p["tokens"] for p in json.loads(json.dumps(split.to_json()))["positions"]] == [2, 2]


def test_a_report_is_one_line() -> None:
    assert (
        str(REPORT)
        == "2.0000 ± 0.1000 nats per token, perplexity 7.389 (7 tokens, nelbo, count x 4)"
    )
    exact = replace(REPORT, method="exact", estimator=None, stderr=None, bits_per_byte=2.5)
    assert (
        str(exact)
        == "2.0000 nats per token, perplexity 7.389, 2.5000 bits per byte (7 tokens, exact)"
    )
