"""Objectives: SUBS, the equality of score entropy and masked cross-entropy, next-token loss,
denominators, block losses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import BlockMap, Contiguous, make_layout, maskable
from bdlm.core.corruption import corrupt
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.objectives import (
    HELD,
    block_losses,
    log_probs,
    loss,
    objective,
    score_entropy,
    total_nats,
)
from bdlm.core.schedules import SCHEDULES, Schedule, schedule_of
from bdlm.core.statistics import block_variance
from bdlm.core.types import Denoiser, NoisedBatch
from bdlm.models import dit
from bdlm.models.toy import TOYS, Inconsistent, toy_spec
from tests.contracts.builders import tiny_dit
from tests.core.enumerated import discrete_weights


def noised_for(
    model: Denoiser,
    map: BlockMap,
    length: int,
    rows: int = 6,
    distribution: str = "time",
    schedule: Schedule = SCHEDULES["linear"],
    step: int = 0,
) -> NoisedBatch:
    spec = model.spec
    ids = torch.randint(0, spec.mask_id, (rows, length), generator=torch.Generator().manual_seed(2))
    layout = make_layout(map, length, context=spec.context)
    cells = maskable(layout, first_given=spec.shift).expand(rows, -1)
    return corrupt(
        ids,
        layout,
        cells,
        schedule,
        seed=0,
        step=step,
        row=torch.arange(rows),
        distribution=distribution,
        mask_id=spec.mask_id,
    )


# -- SUBS ------------------------------------------------------------------------------------------


def test_the_mask_has_no_probability() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log = log_probs(logits, mask_id=3)
    assert bool(torch.isneginf(log[:, 3]).all())
    assert log.dtype == torch.float64
    torch.testing.assert_close(log.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    real = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(log[:, real], logits[:, real].log_softmax(-1))
    assert log_probs(logits.bfloat16(), 3).dtype == torch.float32
    torch.testing.assert_close(log_probs(logits, mask_id=99), logits.log_softmax(-1))


def test_only_masked_cells_count() -> None:
    model = tiny_dit("bd3lm", 4)
    noised = noised_for(model, Contiguous(4), 16)
    terms = objective(model, noised)
    assert bool((terms[~noised.masked] == 0).all())
    assert bool((terms[noised.masked] > 0).all())


# -- score entropy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ("time", "count", "complementary", "all"))
def test_score_entropy_of_exact_scores_is_mdlm(distribution: str) -> None:
    """Spec 6: with s = r p the loss is weight * -log p, term by term; the two toys hold one
    distribution in two conventions."""
    score, tokens = TOYS["score"].make(), TOYS["one_block"].make()
    noised = noised_for(score, Contiguous(4), 4, rows=64, distribution=distribution)
    torch.testing.assert_close(
        objective(score, noised), objective(tokens, noised), atol=2e-5, rtol=2e-5
    )


def test_score_entropy_is_least_at_the_truth() -> None:
    """Zero where all score lies on the true token at ratio r, positive elsewhere."""
    p, target = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([1, 0])
    r = (1 - p) / p
    sure = torch.full((2, 4), -1e9, dtype=torch.float64)
    sure[torch.arange(2), target] = r.log()
    sure[:, 3] = 0.0
    torch.testing.assert_close(
        score_entropy(sure, target, p, mask_id=3), torch.zeros(2, dtype=torch.float64)
    )
    assert bool((score_entropy(sure + 0.3, target, p, mask_id=3) > 0).all())
    assert bool((score_entropy(torch.zeros(2, 4).double(), target, p, mask_id=3) > 0).all())


def test_held_noise_is_the_backbones() -> None:
    assert HELD == dit.SIGMA_MAX


# -- autoregression --------------------------------------------------------------------------------


def test_autoregressive_terms_are_next_token_losses() -> None:
    model = tiny_dit("ar")
    noised = noised_for(model, Contiguous(1), 16, distribution="all")
    terms = objective(model, noised)
    from bdlm.core.types import CLEAN, Step

    place = torch.arange(16).expand(6, -1)
    logits = model.step(
        Step(
            noised.clean,
            place,
            place,
            torch.full_like(place, CLEAN),
            place,
            torch.zeros_like(place),
        )
    ).logits
    assert logits is not None
    expected = -log_probs(logits[:, :-1], model.spec.mask_id).gather(-1, noised.clean[:, 1:, None])[
        ..., 0
    ]
    torch.testing.assert_close(terms[:, 1:], expected, atol=1e-5, rtol=1e-5)
    assert bool((terms[:, 0] == 0).all())


def test_what_has_no_objective_is_refused() -> None:
    uniform, shifted = (TOYS[n].make() for n in ("uniform", "shifted"))
    with pytest.raises(UnsupportedError, match="uniform"):
        objective(uniform, noised_for(uniform, Contiguous(2), 4))
    noised = noised_for(shifted, Contiguous(2), 4, distribution="all")
    with pytest.raises(ConfigError, match="first cell"):
        objective(shifted, replace(noised, masked=torch.ones_like(noised.masked)))


def test_an_autoregressive_loss_on_a_random_part_of_the_tokens_is_unbiased() -> None:
    """AR with a random batch size (the paper's Table 1). |z| > 4 happens in 1 of 16,000 runs."""
    model = tiny_dit("ar")
    whole = float(objective(model, noised_for(model, Contiguous(1), 16, distribution="all")).sum())
    some = torch.tensor(
        [
            float(objective(model, noised_for(model, Contiguous(1), 16, step=s)).sum())
            for s in range(400)
        ]
    )
    parts = torch.stack(
        [(noised_for(model, Contiguous(1), 16, step=s).masked).float().mean() for s in range(20)]
    )
    assert 0.3 < float(parts.mean()) < 0.7
    assert abs(float(some.mean()) - whole) < 4 * float(some.std()) / 20


# -- denominators and blocks -----------------------------------------------------------------------


def test_parts_add_up_under_the_global_denominator() -> None:
    """Processes of unequal size: losses divided by the global count of scored cells sum to the loss
    of one process."""
    model = tiny_dit("bd3lm", 4)
    noised = noised_for(model, Contiguous(4), 16)
    whole = loss(objective(model, noised), noised)
    parts = [noised.rows(slice(0, 2)), noised.rows(slice(2, 6))]
    pieces = [loss(objective(model, p), p, denominator=whole.scored).per_token for p in parts]
    torch.testing.assert_close(sum(pieces, torch.zeros(())), whole.per_token, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole.per_token * whole.scored, whole.total)
    torch.testing.assert_close(
        total_nats(model, noised, whole.scored), whole.per_token, atol=1e-6, rtol=1e-5
    )


def test_block_losses_are_means_over_scored_cells() -> None:
    layout = make_layout(Contiguous(2), 5)
    scored = torch.tensor([[False, True, True, True, False], [True, True, False, False, True]])
    terms = torch.tensor([[0.0, 3.0, 1.0, 5.0, 9.0], [2.0, 4.0, 0.0, 0.0, 7.0]])
    blank = torch.zeros(2, 5)
    noised = NoisedBatch(blank.long(), blank.long(), scored, blank, blank, scored, layout)
    expected = torch.tensor([[3.0, 3.0, math.nan], [3.0, math.nan, 7.0]])
    torch.testing.assert_close(block_losses(terms, noised), expected, equal_nan=True)


def spread(schedule: str, size: int) -> float:
    """Var. NELBO of a model that predicts every token alike: all variance is that of the masks."""
    model, schedules = Inconsistent(toy_spec(size, 64), spread=0.0), schedule_of(schedule)
    noised = [
        noised_for(model, Contiguous(size), 64, rows=16, schedule=schedules, step=s)
        for s in range(60)
    ]
    return sum(block_variance(block_losses(objective(model, n), n)) for n in noised) / 60


def test_variance_ordering() -> None:
    """Spec 3.8: clipped below linear below heavy masking at L' = 4, clipped below linear below
    light masking at L' = 16."""
    small = [spread(name, 4) for name in ("clipped:0.45,0.95", "linear", "square_root")]
    large = [spread(name, 16) for name in ("clipped:0.3,0.8", "linear", "square")]
    assert small == sorted(small)
    assert large == sorted(large)
    # U[.5, 1], weight 1/p: Var = ln(3)^2 / n * (E[1/p] - 1), E[1/p] = 2 ln 2
    assert (
        abs(spread("clipped:0.5,1", 4) / (math.log(3) ** 2 / 4 * (2 * math.log(2) - 1)) - 1) < 0.05
    )


def test_masking_all_has_less_variance_at_block_size_one() -> None:
    """Spec 3.1: at L' = 1 the mask-all distribution scores each token by its own loss; with equal
    losses it has no variance at all."""
    model = Inconsistent(toy_spec(1, 64), spread=0.0)
    noised = noised_for(model, Contiguous(1), 64, distribution="all")
    assert (
        block_variance(block_losses(objective(model, noised), noised)) < 1e-12 < spread("linear", 1)
    )


def test_discrete_weights() -> None:
    torch.testing.assert_close(
        discrete_weights(SCHEDULES["linear"], 5), 1 / torch.arange(1, 6, dtype=torch.float64)
    )
    for schedule in SCHEDULES.values():
        weights: Tensor = discrete_weights(schedule, 7)
        assert float(weights[0]) == 1.0
        assert bool((weights > 0).all())
    with pytest.raises(ConfigError, match="steps is 0"):
        discrete_weights(SCHEDULES["linear"], 0)
