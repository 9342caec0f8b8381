"""Counts that follow training: unbiased at every step given the past, on a toy world that can be
enumerated; state out and in."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bdlm.core.blockmap import Contiguous, make_layout, maskable
from bdlm.core.counts import CountDistribution, CountMoments
from bdlm.core.objectives import count_losses
from bdlm.models.toy import TOKENS, JointTable, toy_spec
from bdlm.training.adaptive import AdaptiveCounts
from bdlm.training.noising import LossModule, Noiser
from bdlm.training.sections import NoiseSection
from tests.core.enumerated import nelbo_exact

PLACES, SIZE, RUNS, STEPS = 6, 3, 80, 6
# what the counts ask of an accelerator
ALONE = SimpleNamespace(device=torch.device("cpu"), reduce=lambda x, _: x)


@pytest.fixture(scope="module")
def world():
    """Neighbours are mostly alike, so a cell is much harder with its block hidden: (model, ids,
    doc, exact bound per token).

    Blocks of 2 (the first cell is given), 3, and 1 (a window that ends early).
    """
    texts = torch.cartesian_prod(*[torch.arange(TOKENS)] * PLACES)
    log = 2.5 * (texts[:, 1:] == texts[:, :-1]).sum(1).double() + 0.3 * texts[:, 0]
    model = JointTable((log - log.logsumexp(0)).view((TOKENS,) * PLACES), toy_spec(SIZE, PLACES))
    ids = model.sample(8, seed=1)
    doc = torch.zeros_like(ids)
    doc[7, 4:] = -1
    layout = make_layout(Contiguous(SIZE), PLACES, doc)
    cells = maskable(layout)
    return model, ids, doc, float(nelbo_exact(model, ids, layout, cells).sum() / cells.sum())


def run(world, seed, right=True):
    """The loss per token of each step of a run under counts refitted after every second one, and
    the distributions, by step.

    right: weighted by the distribution that they are drawn by, else as if every count were alike.
    """
    model, ids, doc, _ = world
    noiser, row, scored = (
        Noiser(model.spec, seed, distribution="importance"),
        torch.arange(len(ids)),
        LossModule(model),
    )
    adaptive = AdaptiveCounts(
        NoiseSection(distribution="importance", refresh_steps=2, floor=0.05), ALONE
    )
    found, distributions = [], []
    for step in range(STEPS):
        distributions.append(adaptive.distribution(SIZE))
        noised = noiser(
            ids,
            doc,
            row,
            size=SIZE,
            step=step,
            rows_total=len(row),
            first_row=0,
            counts=distributions[-1],
        )
        nats, losses = scored(noised)
        n, r, mean = count_losses(losses, noised)
        found.append(float(nats if right else (n * mean).sum()) / int(noised.scored.sum()))
        adaptive.update(SIZE, CountMoments.of(n, r, mean), step + 1)
    return torch.tensor(found, dtype=torch.float64), distributions


def z_scores(world, right=True):
    """Of the mean loss of each step over independent runs."""
    losses = torch.stack([run(world, seed, right)[0] for seed in range(RUNS)])
    return (losses.mean(0) - world[-1]) / (losses.std(0) / math.sqrt(RUNS))


def test_every_step_is_unbiased_given_the_past(world):
    """Ragged blocks, each run's distributions fitted to its own past: |z| < 4.5 at each of six
    steps, false alarms below 2e-4 (t, 79 degrees)."""
    assert float(z_scores(world).abs().max()) < 4.5
    distributions = run(world, 0)[1]
    assert distributions[0] is distributions[1] is None, "every count alike until the first refresh"
    assert distributions[2] is distributions[3]
    assert distributions[4] is distributions[5]
    assert not torch.equal(distributions[2].probs, distributions[4].probs)
    assert float(distributions[4].probs[3, 3]) > 0.4, "hidden blocks are drawn more often"


@pytest.mark.slow
def test_wrong_weights_are_seen(world):
    """The test above can fail: the same draws with uniform weights are right until the first
    refresh and wrong after it."""
    z = z_scores(world, right=False)
    assert float(z[:2].abs().max()) < 4.5 < float(z[2:].abs().min())


@pytest.mark.slow
def test_a_fitted_law_lowers_the_variance_of_the_loss(world):
    """Over 250 draws each, the distribution that training settles on against uniform counts; strata
    make both vary less than single blocks."""
    model, ids, doc, _ = world
    noiser, row, scored = (
        Noiser(model.spec, 5, distribution="importance"),
        torch.arange(len(ids)),
        LossModule(model),
    )
    fitted = run(world, 1)[1][-1]
    spread = {}
    for name, distribution in (("uniform", CountDistribution.uniform(SIZE)), ("fitted", fitted)):
        noised = [
            noiser(
                ids,
                doc,
                row,
                size=SIZE,
                step=s,
                rows_total=len(row),
                first_row=0,
                counts=distribution,
            )
            for s in range(250)
        ]
        spread[name] = float(torch.stack([scored(n)[0] for n in noised]).var())
    assert spread["fitted"] < 0.9 * spread["uniform"]


def test_the_laws_go_out_and_in_to_the_last_bit():
    adaptive = AdaptiveCounts(NoiseSection(distribution="importance", refresh_steps=2), ALONE)
    losses = torch.rand(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in range(3):
        for size in (4, 2):
            count = torch.arange(1, size + 1)
            adaptive.update(
                size,
                CountMoments.of(torch.full_like(count, size), count, losses[step, :size]),
                step + 1,
            )
    again = AdaptiveCounts(adaptive.config, ALONE)
    again.restore(json.loads(json.dumps(adaptive.state())))
    for one in (adaptive, again):
        one.update(4, CountMoments.of(torch.tensor([4]), torch.tensor([3]), torch.tensor([0.3])), 4)
    assert again.state() == adaptive.state()
    for size in (2, 4):
        assert torch.equal(again.distribution(size).probs, adaptive.distribution(size).probs)
