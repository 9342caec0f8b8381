"""Validation and search against what they estimate: exact likelihoods, enumerated bounds, direct
draws, gradients one by one."""

import math

import pytest
import torch

from bdlm.core import blockmap
from bdlm.core.blockmap import Contiguous, maskable
from bdlm.core.objectives import block_losses, objective
from bdlm.core.statistics import block_variance
from bdlm.core.types import ModelSpec
from bdlm.models.dit import DiT, DiTConfig
from bdlm.training.noising import LossModule, Noiser
from bdlm.training.search import FULL, IntervalSearch, search_noiser
from bdlm.training.sections import NoiseSection
from bdlm.training.validate import HeldOutWindows, validate
from tests.core.enumerated import nelbo_exact

LENGTH, WORDS = 8, 6


class OneProcess:
    """What validation and search ask of an accelerator, on one CPU."""

    device, num_processes, process_index = torch.device("cpu"), 1, 0

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def reduce(self, x, _):
        return x

    def gather(self, x):
        return x

    def pad_across_processes(self, x, **_):
        return x

    def backward(self, loss):
        loss.backward()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {
        "hidden_dim": 16,
        "n_blocks": 2,
        "n_heads": 2,
        "cond_dim": 8,
        "model_length": LENGTH,
        "block_size": 2,
    }
    made = DiT(DiTConfig(vocab_size=WORDS + 1, mask_id=WORDS, **sizes))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def held_out():
    ids = torch.randint(WORDS, (10, LENGTH), generator=torch.Generator().manual_seed(1))
    doc = torch.zeros_like(ids)
    doc[9, 5:] = -1
    return HeldOutWindows(ids, doc, bytes_per_token=2.0)


def rows(held_out, size):
    layout = blockmap.make_layout(Contiguous(size), LENGTH, held_out.doc)
    return layout, maskable(layout)


def test_block_size_one_is_the_likelihood_itself(model, held_out):
    bound = validate(model, held_out, Noiser(model.spec, 7).for_validation(), 1, 4, 1, OneProcess())
    where, cells = rows(held_out, 1)
    exact = nelbo_exact(model, held_out.ids, where, cells).sum(1).double()
    mean = float(exact.sum() / cells.sum())
    assert bound.nats_per_token == pytest.approx(mean, abs=1e-6)
    assert bound.scored == int(cells.sum()) == 9 * (LENGTH - 1) + 4
    assert bound.bits_per_byte == pytest.approx(mean / math.log(2) / 2)
    residual = exact - mean * cells.sum(1)
    assert bound.stderr == pytest.approx(
        float((residual.square().sum() * 10 / 9).sqrt() / cells.sum()), rel=1e-4
    )


def test_batches_and_replicates_change_only_the_noise(model, held_out):
    noiser = Noiser(model.spec, 7).for_validation()
    first, second = (
        validate(model, held_out, noiser, 2, rows, 1, OneProcess()) for rows in (3, 10)
    )
    assert first.nats_per_token == pytest.approx(second.nats_per_token, abs=1e-6)
    assert noiser.seed != Noiser(model.spec, 7).seed


@pytest.mark.parametrize("size", [2, 4])
def test_the_bound_is_unbiased(model, held_out, size):
    """40 independent seeds against enumeration; |z| < 4.5: false alarms below 1 in 10,000 (t, 39
    degrees of freedom)."""
    where, cells = rows(held_out, size)
    exact = float(nelbo_exact(model, held_out.ids, where, cells).sum() / cells.sum())
    draws = [
        validate(
            model, held_out, Noiser(model.spec, seed).for_validation(), size, 5, 1, OneProcess()
        )
        for seed in range(40)
    ]
    means = torch.tensor([d.nats_per_token for d in draws], dtype=torch.float64)
    assert abs(float(means.mean()) - exact) < 4.5 * float(means.std()) / math.sqrt(len(means))


def test_one_pass_of_the_search_is_drawing_each_interval_directly(model, held_out):
    """The statistic of [0.3, 0.8] from the shared draws against draws from U[0.3, 0.8]: equal in
    distribution, |z| < 4.5 over 60 batches."""
    interval, size = (0.3, 0.8), 4
    base = Noiser(model.spec, 11)
    shared = IntervalSearch(held_out, search_noiser(base, 0), size, 10, OneProcess())
    direct = IntervalSearch(held_out, search_noiser(base, 1).at(interval), size, 10, OneProcess())
    low, high = interval
    there = [
        block_variance(losses[(rates >= low) & (rates <= high)])
        for losses, rates in shared.losses(model, 60)
    ]
    here = [block_variance(losses) for losses, _ in direct.losses(model, 60)]
    for losses, rates in direct.losses(model, 3):
        assert bool(((rates >= low) & (rates <= high))[~losses.isnan()].all())
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (there, here))
    a = a[~a.isnan()]
    assert len(a) > 40
    error = math.sqrt(float(a.var()) / len(a) + float(b.var()) / len(b))
    assert abs(float(a.mean() - b.mean())) < 4.5 * error


def test_search_names_the_interval_of_least_variance(model, held_out):
    found = IntervalSearch(
        held_out, search_noiser(Noiser(model.spec, 3), 0), 4, 10, OneProcess()
    ).run(model, LossModule(model), NoiseSection(search_batches=20, gradient_batches=6))
    assert len(found.loss_variance) == 36
    assert found.loss_variance[found.best] == min(
        v for v in found.loss_variance.values() if not math.isnan(v)
    )
    assert set(found.gradient_variance) == {FULL, found.best}
    assert found.gradient_variance[found.best] < found.gradient_variance[FULL]
    assert found.to_dict()["best"] == list(found.best)


def test_gradient_variance_is_that_of_the_gradients(model, held_out):
    search = IntervalSearch(held_out, search_noiser(Noiser(model.spec, 3), 0), 2, 10, OneProcess())
    gradients = []
    for noised in search.batches(search.noiser, 5):
        total = objective(model, noised).sum() / noised.scored.sum()
        gradients.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]
            ).double()
        )
    expected = float(torch.stack(gradients).var(0).sum())
    assert search.gradient_variance(LossModule(model), search.noiser.interval, 5) == pytest.approx(
        expected, rel=1e-5
    )


def test_block_losses_of_a_search_cover_every_scored_cell(model, held_out):
    search = IntervalSearch(held_out, search_noiser(Noiser(model.spec, 3), 0), 2, 10, OneProcess())
    noised = next(search.batches(search.noiser, 1))
    losses = block_losses(objective(model, noised), noised)
    assert int((~losses.isnan()).sum()) == 9 * 4 + 3  # the padded row has a block and a half less


def test_single_token_blocks_are_masked_unless_the_config_says_otherwise() -> None:
    spec = ModelSpec(vocab_size=9, mask_id=8, block_size=1, max_length=64)
    ids, doc, row = (
        torch.zeros(4, 64, dtype=torch.long),
        torch.zeros(4, 64, dtype=torch.long),
        torch.arange(4),
    )
    share = {}
    for all_masked in (True, False):
        noised = Noiser(spec, 1, distribution="time", mask_single_token_blocks=all_masked)(
            ids, doc, row, size=1, step=0, rows_total=4, first_row=0
        )
        share[all_masked] = float(noised.masked.sum() / noised.scored.sum())
    assert share[True] == 1.0
    assert 0.35 < share[False] < 0.65
