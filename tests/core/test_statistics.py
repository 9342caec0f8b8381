"""Standard errors against simulation, the search's statistic and candidates, and streaming gradient
variance."""

from __future__ import annotations

import math

import pytest
import torch

from bdlm.core.errors import ConfigError
from bdlm.core.statistics import (
    GradientVariance,
    IntervalVariance,
    block_variance,
    candidate_intervals,
    gradient_vector,
    mean_estimate,
    ratio_estimate,
)
from tests.core.enumerated import likelihood_estimate


def test_mean() -> None:
    found = mean_estimate(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (found.mean, found.count) == (3.0, 4)
    assert found.stderr == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(mean_estimate(torch.tensor([2.0])).stderr)
    with pytest.raises(ConfigError):
        mean_estimate(torch.tensor([]))


def test_ratio_of_equal_documents_is_the_mean() -> None:
    totals = torch.tensor([10.0, 14.0, 9.0, 17.0])
    found, plain = ratio_estimate(totals, torch.full((4,), 5)), mean_estimate(totals / 5)
    assert found.mean == pytest.approx(plain.mean)
    assert found.stderr == pytest.approx(plain.stderr)


def test_ratio_error_is_the_spread_over_corpora() -> None:
    """Documents of very unequal length whose loss depends on their length: the stated error against
    2,000 simulated corpora."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 200, (2000, 60), generator=generator).double()
    nats = (
        tokens * (2 + torch.randn(2000, 60, generator=generator, dtype=torch.float64) * 0.5)
        + 0.002 * tokens**2
    )
    found = [ratio_estimate(n, t) for n, t in zip(nats, tokens, strict=True)]
    means = torch.tensor([f.mean for f in found])
    stated = float(torch.tensor([f.stderr for f in found]).square().mean().sqrt())
    # a standard deviation of 2,000 draws is known to 1.6 %, documents are 60
    assert abs(stated / float(means.std()) - 1) < 0.06
    per_document = float((nats / tokens).mean(1).mean())
    assert abs(float(means.mean()) - per_document) > 5 * float(means.std()) / math.sqrt(2000), (
        "the mean over documents is another number"
    )


def test_ratio_needs_tokens_and_two_documents() -> None:
    assert math.isnan(ratio_estimate(torch.tensor([3.0]), torch.tensor([2])).stderr)
    with pytest.raises(ConfigError, match="no scored token"):
        ratio_estimate(torch.tensor([0.0]), torch.tensor([0]))


def test_both_parts_of_the_error() -> None:
    totals = torch.tensor(
        [[10.0, 20.0, 31.0], [12.0, 21.0, 28.0], [11.0, 19.0, 30.0], [9.0, 22.0, 27.0]]
    )
    counts = torch.tensor([4, 8, 12])
    found = likelihood_estimate(totals, counts)
    assert found.mean == pytest.approx(float(totals.mean(0).sum()) / 24)
    assert (found.tokens, found.documents) == (24, 3)
    assert found.monte_carlo == pytest.approx(float((totals.sum(1) / 24).std()) / 2)
    assert found.stderr == pytest.approx(ratio_estimate(totals.mean(0), counts).stderr)
    assert likelihood_estimate(totals[0], counts).monte_carlo == 0.0


def test_block_variance_is_unbiased_over_all_entries() -> None:
    values = torch.tensor([[1.0, 4.0, math.nan], [2.0, 9.0, math.nan]])
    assert block_variance(values) == pytest.approx(float(torch.tensor([1.0, 4.0, 2.0, 9.0]).var()))
    assert math.isnan(block_variance(torch.tensor([[1.0, math.nan]])))


def test_candidate_intervals() -> None:
    """Spec 3.4: 11 + 9 + 7 + 5 + 3 + 1 = 36, left edges of 0 lifted to 1e-3; two at block size
    1."""
    found = candidate_intervals(4)
    assert len(found) == len(set(found)) == 36
    assert found[0] == (1e-3, 1.0)
    widths = [round(high - (0 if low == 1e-3 else low), 6) for low, high in found[1:]]
    assert [widths.count(w) for w in (0.5, 0.6, 0.7, 0.8, 0.9)] == [11, 9, 7, 5, 3]
    assert all(0 < low < high <= 1 for low, high in found)
    assert candidate_intervals(1) == [(1e-3, 1.0), (1.0, 1.0)]


def test_one_pass_serves_all_intervals() -> None:
    """Blocks drawn over [1e-3, 1] and sorted into intervals have the variance of blocks drawn
    inside; loss = noise / rate here."""
    generator = torch.Generator().manual_seed(1)
    intervals = [(1e-3, 1.0), (0.3, 0.8), (0.5, 1.0)]
    search = IntervalVariance(intervals)
    for _ in range(200):
        rates = 0.001 + 0.999 * torch.rand(16, 32, generator=generator, dtype=torch.float64)
        search.update((torch.rand(16, 32, generator=generator) < rates) / rates, rates)
    # given the rate the loss is 1 on average with variance 1/p - 1: Var = E[1/p] - 1
    for found, (low, high) in zip(search.result()[1:], intervals[1:], strict=True):
        assert found == pytest.approx(math.log(high / low) / (high - low) - 1, rel=0.05)
    assert search.best() == (0.5, 1.0)


def test_search_over_points_and_nothing() -> None:
    search = IntervalVariance(candidate_intervals(1))
    with pytest.raises(ConfigError, match="more batches"):
        search.best()
    search.update(torch.tensor([[1.0, 1.1, 5.0]]), torch.tensor([[1.0, 1.0, 0.2]]))
    assert search.best() == (1.0, 1.0)
    assert search.result()[1] == pytest.approx(0.005)


def test_gradient_variance_streams() -> None:
    """Eq. 10 in one go and vector by vector."""
    gradients = (
        torch.randn(9, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    )
    search = GradientVariance()
    assert math.isnan(search.value())
    for g in gradients:
        search.update(g)
    expected = float((gradients - gradients.mean(0)).square().sum()) / 8
    assert search.value() == pytest.approx(expected, rel=1e-9)
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    (one * 2).sum().backward()
    assert gradient_vector([one, two]).tolist() == [2, 2, 0, 0, 0]
