"""The arithmetic of a frontier, by hand and on a toy world whose distribution is known."""

from __future__ import annotations

import math

import pytest
import torch

from bdlm.core.statistics import t_quantile
from bdlm.core.types import ModelSpec
from bdlm.harness.frontier_statistics import accuracy, at_equal_entropy, aup, front, mean_of, paired
from bdlm.models.toy import JointTable
from tests.generation.worlds import grid_distribution


def test_distance_to_the_judge_is_cross_entropy_less_entropy() -> None:
    """KL(q || p) = E_q[-log p] - H(q) for the distribution q of two cells at a time, and 0 for the
    exact sampler."""
    table = JointTable.random(ModelSpec(4, 3, block_size=2, max_length=4), places=4, seed=3)
    texts = {}
    for name, share in (("one at a time", None), ("both at once", [1.0])):
        q = _distribution(table, share)
        log_p = {t: float(table.log_joint[t]) for t in q}
        crossed = -sum(p * log_p[t] for t, p in q.items())
        entropy = -sum(p * math.log(p) for p in q.values())
        direct = sum(p * (math.log(p) - log_p[t]) for t, p in q.items())
        assert crossed - entropy == pytest.approx(direct, abs=1e-12)
        texts[name] = crossed - entropy
    assert texts["one at a time"] == pytest.approx(0, abs=1e-9)
    assert texts["both at once"] > 0.01


def test_colder_sampling_lowers_the_perplexity_and_not_the_distance() -> None:
    """Two samplers that change ranks by perplexity at another temperature keep them by perplexity
    less entropy."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    blurred = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)

    def measured(q: torch.Tensor, temperature: float) -> tuple[float, float]:
        q = (q.log() / temperature).softmax(0)
        crossed = float(-(q * p.log()).sum())
        return crossed, crossed - float(-(q * q.log()).sum())

    good, bad = measured(p, 1.0), measured(blurred, 1.0)
    cold = measured(blurred, 0.5)
    assert good[0] < bad[0]
    assert cold[0] < good[0]
    assert good[1] < bad[1]
    assert good[1] < cold[1]


def _distribution(table: JointTable, share: list[float] | None) -> dict[tuple[int, ...], float]:
    if share is None:
        return {t: float(table.log_joint[t].exp()) for t in _all(table)}
    return grid_distribution(table, (), [(0, 1), (2, 3)], share)


def _all(table: JointTable) -> list[tuple[int, ...]]:
    return [
        tuple(t)
        for t in torch.cartesian_prod(*[torch.arange(table.tokens)] * table.places).tolist()
    ]


def test_errors_by_hand() -> None:
    """Two seeds of two prompts: prompt means 2 and 5; spreads inside prompts 2 and 8 (variance over
    two seeds)."""
    found = mean_of(torch.tensor([[1.0, 3.0], [3.0, 7.0]]))
    assert found.mean == 3.5
    # variance of (2, 5) over two prompts
    assert found.stderr_texts == pytest.approx(math.sqrt(4.5 / 2))
    # each prompt's mean has variance s^2 / 2; mean of two
    assert found.stderr_seeds == pytest.approx(math.sqrt((2 / 2 + 8 / 2) / 4))


def test_errors_that_cannot_be_told() -> None:
    assert mean_of(torch.tensor([[1.0, 2.0]])).stderr_seeds is None
    assert mean_of(torch.tensor([[1.0], [2.0]])).stderr_texts is None


def test_empty_texts_are_left_out() -> None:
    nan = float("nan")
    found = mean_of(torch.tensor([[1.0, nan, 4.0], [3.0, nan, nan]]))
    assert found.mean == 3.0
    # of the one prompt with all its seeds
    assert found.stderr_seeds == pytest.approx(math.sqrt(2 / 2))


def test_paired_difference_and_its_bound_by_hand() -> None:
    """Differences by prompt 0, 1, 2, 1: mean 1, variance 2/3, error sqrt(1/6); t of 3 degrees of
    freedom at 0.95 is 2.3534."""
    reference = torch.tensor([[5.0, -2.0, 0.5, 3.0], [1.0, 1.0, 1.0, 1.0]])
    shift = torch.tensor([[-1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 2.0, 2.0]])
    found = paired(reference + shift, reference)
    assert found.mean == pytest.approx(1.0)
    assert found.stderr == pytest.approx(math.sqrt(1 / 6))
    assert found.upper == pytest.approx(1 + 2.3534 * math.sqrt(1 / 6), abs=2e-3)
    assert paired(reference[:, :3], reference[:, :3]).upper is None


def test_quantiles_of_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (3, 5, 15, 31, 255):
        assert t_quantile(0.95, freedom) == pytest.approx(
            float(stats.t.ppf(0.95, freedom)), rel=3e-3
        )


def test_bound_covers_as_often_as_it_says() -> None:
    """Over 4,000 experiments of 8 prompts the bound lies above the truth in 95 %, within 5 standard
    errors of that count."""
    torch.manual_seed(0)
    draws = torch.randn(4000, 2, 8, dtype=torch.float64) + torch.randn(
        4000, 1, 8, dtype=torch.float64
    )
    covered = sum((paired(d, torch.zeros(2, 8)).upper or 0) >= 0 for d in draws)
    assert abs(covered / 4000 - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 4000)


def test_front_by_hand() -> None:
    # speed, quality: dominated by the third; slow and best; fast; as fast and worse; fastest
    points = [(1.5, 3.0), (1.0, 1.0), (2.0, 2.0), (2.0, 2.5), (3.0, 4.0)]
    assert front(points) == [1, 2, 4]
    assert front([(1.0, 1.0)] * 3) == [0]


def test_equal_entropy_by_hand() -> None:
    curve = [(4.0, 5.0), (2.0, 2.0), (3.0, 3.0)]
    assert at_equal_entropy(3.5, 4.5, curve) == pytest.approx(0.5)
    assert at_equal_entropy(2.5, 2.0, curve) == pytest.approx(-0.5)
    assert at_equal_entropy(4.5, 5.0, curve) is None
    assert at_equal_entropy(3.0, 1.0, []) is None


def test_accuracy() -> None:
    assert accuracy(0.0) == 100
    assert accuracy(-0.3) == 100
    assert accuracy(0.05) == pytest.approx(95.12, abs=0.01)


def test_aup_by_hand() -> None:
    """y 100, 98 and 90 at 1, 2 and 4 tokens per forward: the last falls out (more than 5 below);
    W(98) = exp(-0.06)."""
    second = 98 * math.exp(-3 * (1 - 0.98))
    assert aup([(4.0, 90.0), (1.0, 100.0), (2.0, 98.0)], 100.0) == pytest.approx(
        100.0 + (100 + second) / 2
    )
    assert aup([(2.0, 100.0)], 100.0) == 200.0
    half = 50 * math.exp(-1.5)
    assert aup([(1.0, 50.0)], 100.0) == pytest.approx(half)
