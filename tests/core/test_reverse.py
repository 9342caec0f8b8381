"""Reverse kernels: the posterior, first hitting as the limit of ancestral steps, and SEDD's
analytic step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.estimators import masked_nll
from bdlm.core.randomness import uniform
from bdlm.core.schedules import SCHEDULES
from bdlm.models.toy import Inconsistent, toy_spec
from tests.core.enumerated import exact_likelihood
from tests.core.reverse_kernel import (
    analytic_probs,
    analytic_times,
    ancestral_times,
    first_hitting_cell,
    first_hitting_time,
    posterior,
    reveal_prob,
    total_noise,
)

MASK = 4


def state(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted clean tokens [2, 3, 5] without mask probability, current ids, and what is
    masked."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    probs[..., MASK] = 0
    masked = torch.tensor([[True, False, True], [False, True, True]])
    ids = torch.where(masked, MASK, torch.tensor([[0, 1, 2], [3, 0, 1]]))
    return probs / probs.sum(-1, keepdim=True), ids, masked


def test_posterior_is_the_papers() -> None:
    """Spec 1.2: a masked cell stays with p_s / p_t, else takes a predicted token; a shown cell
    stays what it is."""
    probs, ids, masked = state()
    p_t, p_s = torch.tensor(0.8).double(), torch.tensor(0.3).double()
    distribution = posterior(probs, ids, masked, p_t, p_s, MASK)
    torch.testing.assert_close(distribution.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(
        distribution[masked][:, MASK], torch.full((4,), 3 / 8, dtype=torch.float64)
    )
    torch.testing.assert_close(distribution[masked][:, :MASK], probs[masked][:, :MASK] * 5 / 8)
    assert bool((distribution[~masked].argmax(-1) == ids[~masked]).all())
    assert bool((distribution[~masked].amax(-1) == 1).all())
    last = posterior(probs, ids, masked, p_t, torch.tensor(0.0).double(), MASK)
    assert bool((last[..., MASK] == 0).all())


def test_two_posterior_steps_compose() -> None:
    """With predictions held, going from t to u directly or by way of s is one distribution."""
    probs, ids, masked = state()
    t, s, u = (torch.tensor(x).double() for x in (0.9, 0.5, 0.2))
    direct, first = (
        posterior(probs, ids, masked, t, u, MASK),
        posterior(probs, ids, masked, t, s, MASK),
    )
    second = posterior(probs, torch.full_like(ids, MASK), torch.ones_like(masked), s, u, MASK)
    through = first[..., MASK : MASK + 1] * second
    through[..., :MASK] += first[..., :MASK]
    torch.testing.assert_close(through, direct)


def test_ancestral_times_end_at_zero() -> None:
    times = ancestral_times(7)
    assert float(times[0]) == 1
    assert float(times[-1]) == 0
    assert len(times) == 8
    torch.testing.assert_close(times.diff(), torch.full((7,), -1 / 7, dtype=torch.float64))
    assert float(reveal_prob(times[-2], times[-1])) == 1
    assert float(analytic_times(4)[0]) == 1
    assert float(analytic_times(4)[-1]) == pytest.approx(1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_first_hitting_time_has_its_distribution(name: str) -> None:
    """P(nothing of n cells is revealed between t and s) = (p_s / p_t)^n, and the time at u is its
    quantile."""
    schedule = SCHEDULES[name]
    t, s = torch.tensor([0.9, 0.6, 0.4]).double(), torch.tensor([0.7, 0.1, 0.39]).double()
    n = torch.tensor([1, 4, 9])
    u = (schedule.mask_prob(s) / schedule.mask_prob(t)) ** n
    torch.testing.assert_close(first_hitting_time(schedule, t, n, u), s, atol=1e-9, rtol=0)


def test_first_hitting_cell_is_uniform_over_masked_cells() -> None:
    """20,000 rows with three of five cells masked: shares within 5 standard errors of a third
    (false alarm 2e-6)."""
    masked = torch.tensor([True, False, True, True, False]).expand(20_000, -1)
    keys = uniform(0, torch.arange(20_000)[:, None], torch.arange(5))
    chosen = first_hitting_cell(masked, keys)
    assert bool((chosen.sum(1) == 1).all())
    assert not bool(chosen[~masked].any())
    assert float((chosen.double().mean(0)[masked[0]] - 1 / 3).abs().max()) < 5 * math.sqrt(
        2 / 9 / 20_000
    )
    assert not bool(first_hitting_cell(torch.zeros(2, 5, dtype=torch.bool), keys[:2]).any())


def ancestral_distribution(nll: dict[int, Tensor], steps: int, cells: int) -> Tensor:
    """Probability that `steps` ancestral steps write each text exactly, over the sets of shown
    cells. float64 [texts].

    nll[shown]: [texts, cells], -log p of each text's tokens given its shown cells.
    """
    distribution = {s: torch.zeros(len(nll[0]), dtype=torch.float64) for s in range(1 << cells)}
    distribution[0] += 1
    for t, s in itertools.pairwise(ancestral_times(steps)):
        reveal, after = (
            float(reveal_prob(t, s)),
            {k: torch.zeros_like(v) for k, v in distribution.items()},
        )
        for shown, mass in distribution.items():
            hidden = [i for i in range(cells) if not shown >> i & 1]
            for moved in itertools.chain.from_iterable(
                itertools.combinations(hidden, k) for k in range(len(hidden) + 1)
            ):
                chance = reveal ** len(moved) * (1 - reveal) ** (len(hidden) - len(moved))
                tokens = (
                    torch.stack([-nll[shown][:, i] for i in moved]).sum(0).exp() if moved else 1.0
                )
                after[shown | sum(1 << i for i in moved)] += mass * chance * tokens
        distribution = after
    return distribution[(1 << cells) - 1]


def test_first_hitting_is_the_limit_of_ancestral_sampling() -> None:
    """Spec 9.10, exactly: the ancestral distribution over all texts nears the first-hitting
    distribution (`exact_likelihood`) as T grows; at T = 1 it is the product of marginals.
    Conditionals of no joint distribution, so that orders matter."""
    cells, model = 3, Inconsistent(toy_spec(3, 3), spread=2.0)
    texts = torch.tensor(list(itertools.product(range(3), repeat=cells)))
    layout, everywhere = (
        make_layout(Contiguous(cells), cells),
        torch.ones(len(texts), cells, dtype=torch.bool),
    )
    nll = {
        s: masked_nll(
            model,
            texts,
            layout,
            everywhere & (torch.tensor([not s >> i & 1 for i in range(cells)])),
        )
        for s in range(1 << cells)
    }
    hitting = (-exact_likelihood(model, texts, layout, everywhere).sum(1)).exp()
    torch.testing.assert_close(ancestral_distribution(nll, 1, cells), (-nll[0].sum(1)).exp())
    gaps = [
        float((ancestral_distribution(nll, T, cells) - hitting).abs().sum())
        for T in (1, 4, 16, 64, 256)
    ]
    assert all(4.8 > a / b > 2 for a, b in itertools.pairwise(gaps[1:])), gaps  # first order in 1/T
    assert gaps[-1] < 0.01
    assert abs(float(ancestral_distribution(nll, 64, cells).sum()) - 1) < 1e-12


def test_analytic_step_is_the_posterior() -> None:
    """Scores s = r p: SEDD's analytic step from p_t to p_s has the distribution of the ancestral
    step; the last one leaves no mask."""
    probs, ids, masked = state()
    p_t, p_s = torch.tensor(0.7).double(), torch.tensor(0.25).double()
    dsigma = total_noise(p_t) - total_noise(p_s)
    score = (probs * (1 - p_t) / p_t).log()
    score[..., MASK] = 0
    distribution = analytic_probs(score, torch.full_like(ids, MASK), dsigma.expand(2, 3), MASK)
    torch.testing.assert_close(
        distribution,
        posterior(probs, torch.full_like(ids, MASK), torch.ones_like(masked), p_t, p_s, MASK),
    )
    last = analytic_probs(score, torch.full_like(ids, MASK), dsigma.expand(2, 3), MASK, last=True)
    assert bool((last[..., MASK] == 0).all())
    assert bool((last[..., :MASK] > 0).all())
