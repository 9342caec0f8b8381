"""The likelihood's mathematics on worlds where every number can be enumerated.

Random checks are z-tests at 5 Monte-Carlo standard errors of 64 independent replicates or more:
false alarm below 5e-6 each (t, 63 degrees of freedom), 1e-4 for the file. For `time` that is the
rate of a light tail: its variance is infinite (weight 1/t at t in (0, 1] gives E[w^2] = integral of
1/t), so its means lie low more often than high; a wrong weight is still seen at 1 %."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from bdlm.core.blockmap import Contiguous
from bdlm.core.counts import CountDistribution
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.forward import extend, layout_at, predict
from bdlm.core.objectives import log_probs
from bdlm.core.schedules import SCHEDULES
from bdlm.core.types import NOWHERE, Canvas, Denoiser
from bdlm.generation.engine.engine import generate
from bdlm.generation.sampling_params import SamplingParams
from bdlm.likelihood.bound import evaluate, fit_counts
from bdlm.likelihood.methods import ESTIMATORS
from bdlm.likelihood.score import Score
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.toy import Inconsistent, JointTable, Toy, toy_spec
from tests.likelihood.networks import small_network

# -- worlds ----------------------------------------------------------------------------------------


def ragged(times: int = 1) -> tuple[Inconsistent, tuple[Tensor, Tensor]]:
    """Conditionals of no joint distribution; windows with two documents, padding, given first cells
    and tails of 1 to 4 cells, `times` over."""
    length, place = 16, torch.arange(16)
    doc = torch.stack(
        [
            torch.where(place < 5 + r, 0, torch.where(place < length - r, 1, NOWHERE))
            for r in range(4)
        ]
    )
    ids = torch.randint(0, 3, doc.shape, generator=torch.Generator().manual_seed(0))
    return Inconsistent(toy_spec(4, length)), (ids.repeat(times, 1), doc.repeat(times, 1))


FAMILIES = {
    "autoregressive": replace(toy_spec(1), noise="none", shift=True, context="causal", streams=1),
    "blocks of 1": toy_spec(1),
    "blocks of 2": toy_spec(2),
    "one block, two streams": toy_spec(4),
    "mdlm": replace(toy_spec(4), streams=1),
    "sedd": replace(toy_spec(4), prediction="log_score", time_conditioned=True, streams=1),
    "causal context": replace(toy_spec(2), context="causal"),
}


def total(report: Score) -> float:
    return report.nats_per_token * report.tokens


REPLICATES = 100


def z_score(report: Score, expected: float) -> float:
    assert report.stderr_monte_carlo
    assert report.replicates >= 64
    return (report.nats_per_token - expected) / report.stderr_monte_carlo


# -- estimators against enumeration ----------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_unbiased(estimator: str) -> None:
    """Against the enumerated bound on ragged blocks, known to half a percent (`time`: one): a wrong
    weight or distribution shows."""
    model, windows = ragged(32)
    counts = CountDistribution.uniform(4) if estimator == "importance" else None
    if counts is not None:  # a distribution far from uniform, to be undone by its weights
        skewed = counts.probs * torch.tensor([1.0, 6, 1, 1, 6], dtype=torch.float64)
        counts = CountDistribution(skewed / skewed.sum(1, keepdim=True).clamp(min=1e-300))
    expected = evaluate(model, windows, method="nelbo-exact").nats_per_token
    found = evaluate(
        model,
        windows,
        estimator=estimator,
        counts=counts,
        replicates=REPLICATES,
        batch_size=128,
        seed=1,
    )
    assert abs(z_score(found, expected)) < 5
    assert found.stderr_monte_carlo is not None
    assert found.stderr_monte_carlo < (0.01 if estimator == "time" else 0.005) * expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_does_not_depend_on_the_schedule(schedule: str) -> None:
    model, windows = ragged(32)
    expected = evaluate(model, windows, method="nelbo-exact").nats_per_token
    found = evaluate(
        model, windows, estimator="time", schedule=schedule, replicates=REPLICATES, batch_size=128
    )
    assert abs(z_score(found, expected)) < 5


def test_a_planted_bias_is_seen() -> None:
    """The same z-test rejects count weights without their distribution's share (importance counts
    taken for uniform ones), and a bias of 3 %."""
    model, windows = ragged(32)
    expected = evaluate(model, windows, method="nelbo-exact").nats_per_token
    run = lambda **options: evaluate(
        model, windows, replicates=REPLICATES, batch_size=128, **options
    )
    assert abs(z_score(run(), expected * 1.03)) > 5
    # rows do not sum to 1
    mostly_one = CountDistribution.uniform(4).probs * torch.tensor(
        [1.0, 4, 1, 1, 1], dtype=torch.float64
    )
    assert (
        abs(z_score(run(estimator="importance", counts=CountDistribution(mostly_one)), expected))
        > 5
    )


def test_fitted_counts_vary_less_than_uniform_ones() -> None:
    """Fitted on other text: unbiased, floored, and of less variance per pass than uniform
    counts."""
    model = Inconsistent(toy_spec(4, 16), spread=3.0)
    draw = lambda seed: torch.randint(0, 3, (40, 16), generator=torch.Generator().manual_seed(seed))
    distribution = fit_counts(model, draw(1), draws=20, floor=0.2)
    for n in range(1, distribution.widest + 1):
        row = distribution.probs[n]
        assert float(row.sum()) == pytest.approx(1)
        assert float(row[1 : n + 1].min()) >= 0.2 / n - 1e-12
        assert not bool(row[n + 1 :].any())
    expected = evaluate(model, draw(2), method="nelbo-exact").nats_per_token
    found = evaluate(model, draw(2), estimator="importance", counts=distribution, replicates=100)
    assert abs(z_score(found, expected)) < 5
    with pytest.raises(ConfigError, match="floor"):
        fit_counts(model, draw(1), floor=0)


def test_stated_noise_is_the_noise() -> None:
    """The Monte-Carlo error of 4 replicates, root mean square over 150 seeds, against the spread of
    their means, within 20 %."""
    model, windows = ragged()
    found = [evaluate(model, windows, replicates=4, seed=s) for s in range(150)]
    spread = float(torch.tensor([f.nats_per_token for f in found], dtype=torch.float64).std())
    stated = math.sqrt(
        sum(f.stderr_monte_carlo**2 for f in found if f.stderr_monte_carlo is not None) / len(found)
    )
    assert stated == pytest.approx(spread, rel=0.2)


def test_target_stderr_is_reached_by_more_draws() -> None:
    model, windows = ragged()
    few = evaluate(model, windows)
    assert few.stderr_monte_carlo is not None
    found = evaluate(model, windows, target_stderr=few.stderr_monte_carlo / 3)
    assert found.replicates > 8
    assert found.stderr_monte_carlo is not None
    assert found.stderr_monte_carlo <= few.stderr_monte_carlo / 3
    assert evaluate(model, windows, target_stderr=0.0, max_replicates=6).replicates == 6
    assert evaluate(model, windows, method="exact", target_stderr=0.0).replicates == 1


# -- one joint distribution: every family on the same footing --------------------------------------


def truth(model: JointTable) -> float:
    """-log p of all texts given their first tokens, nats, summed."""
    first = model.log_joint.exp().sum((1, 2, 3)).log()[model.texts[:, 0]]
    return float((first - model.log_prob(model.texts)).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_score_one_law_alike(family: str) -> None:
    """Exact conditionals of one distribution, in the convention of each kind of model: same
    windows, same positions, same nats."""
    model = JointTable.random(FAMILIES[family])
    found = evaluate(model, model.texts, replicates=64)
    assert found.tokens == 81 * 3
    if found.method == "nll":
        assert total(found) == pytest.approx(truth(model), abs=1e-4)
    else:
        assert abs(z_score(found, truth(model) / found.tokens)) < 5
    if family != "sedd":
        for method in ("nelbo-exact", "exact"):
            assert total(evaluate(model, model.texts, method=method)) == pytest.approx(
                truth(model), abs=1e-4
            )


def test_bound_equals_likelihood_only_for_conditionals_of_one_distribution() -> None:
    """exact <= nelbo-exact, block by block, with equality to 1e-10 for one joint distribution and a
    gap where there is none."""
    for size in (1, 2, 3, 4):
        table = JointTable.random(toy_spec(size))
        bound, exact = (
            total(evaluate(table, table.texts, method=m, block_size=size))
            for m in ("nelbo-exact", "exact")
        )
        assert bound == pytest.approx(exact, abs=1e-9)
        mixed = Inconsistent(toy_spec(size))
        bound, exact = (
            total(evaluate(mixed, table.texts, method=m, block_size=size))
            for m in ("nelbo-exact", "exact")
        )
        assert (bound - exact > 1) if size > 1 else bound == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("method", ["nelbo", "nelbo-exact", "exact", "k-orders"])
def test_block_size_one_is_the_chain_rule(method: str) -> None:
    """Whatever the method: the sum of -log p(token | all before), token by token, in one pass."""
    model, ids = (
        Inconsistent(toy_spec(4, 16)),
        torch.randint(0, 3, (3, 16), generator=torch.Generator().manual_seed(2)),
    )
    found = evaluate(model, ids, method=method, block_size=1)
    assert (found.method, found.passes, found.stderr_monte_carlo, found.estimator) == (
        "nll",
        1,
        0.0,
        None,
    )
    by_hand = sum(
        _next(model, ids[row, :place], int(ids[row, place]))
        for row in range(3)
        for place in range(1, 16)
    )
    assert total(found) == pytest.approx(by_hand, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(by_hand / 45), rel=1e-5)


def _next(model: Denoiser, before: Tensor, token: int) -> float:
    """-log p(token | before), from the sampler's side: a cache of the text before, one masked
    cell."""
    map = Contiguous(1)
    cache = model.new_cache(1, 32)
    extend(model, before[None], layout_at(map, torch.arange(len(before))[None]), cache)
    canvas = Canvas(
        torch.tensor([[model.spec.mask_id]]),
        torch.tensor([[True]]),
        layout_at(map, torch.tensor([[len(before)]])),
    )
    logits = predict(model, canvas, cache).logits
    assert logits is not None
    return -float(log_probs(logits, model.spec.mask_id)[0, token])


# -- the exact likelihood of a network, from the sampler's side ------------------------------------


@torch.no_grad()
def by_orders(model: Denoiser, ids: Tensor, size: int) -> tuple[float, float]:
    """(bound, -log likelihood) of one text as first-hitting would write it: every order of every
    block, one cached call a cell."""
    bound = exact = 0.0
    for first in range(0, len(ids), size):
        place = torch.arange(first, min(first + size, len(ids)))[None]
        layout, here = layout_at(Contiguous(size), place), ids[place]
        given = 1 if first == 0 else 0
        paths = []
        for order in itertools.permutations(range(given, place.shape[1])):
            cache = model.new_cache(1, len(ids) + size)
            if first:
                extend(
                    model,
                    ids[None, :first],
                    layout_at(Contiguous(size), torch.arange(first)[None]),
                    cache,
                )
            masked, log = torch.arange(place.shape[1])[None] >= given, 0.0
            for cell in order:
                noisy = torch.where(masked, model.spec.mask_id, here)
                at = torch.zeros_like(masked)
                at[0, cell] = True
                logits = predict(model, Canvas(noisy, masked.clone(), layout), cache, at).logits
                assert logits is not None
                log += float(log_probs(logits, model.spec.mask_id)[0, here[0, cell]])
                masked[0, cell] = False
            paths.append(log)
        nats = torch.tensor(paths, dtype=torch.float64)
        bound -= float(nats.mean())
        exact -= float(nats.logsumexp(0)) - math.log(len(paths))
    return bound, exact


@pytest.mark.parametrize("size", [2, 4])
def test_a_networks_likelihood_is_that_of_its_sampler(size: int) -> None:
    """To 1e-10 in float64: subsets in two-stream passes against orders in cached calls, a tail of
    one or three cells included."""
    model, ids = (
        small_network(12).double().eval(),
        torch.randint(0, 6, (11,), generator=torch.Generator().manual_seed(1)),
    )
    bound, exact = by_orders(model, ids, size)
    assert total(evaluate(model, ids[None], method="exact", block_size=size)) == pytest.approx(
        exact, abs=1e-10
    )
    assert total(
        evaluate(model, ids[None], method="nelbo-exact", block_size=size)
    ) == pytest.approx(bound, abs=1e-10)
    assert exact < bound


def test_samples_of_first_hitting_follow_the_exact_likelihood() -> None:
    """3,000 texts of the sampler against exp(-exact) of all 27, conditionals of no joint
    distribution: chi-square, false alarm 1e-6; the bound is not a distribution at all (its exp sums
    to less than one)."""
    model, rows = Inconsistent(toy_spec(4)), 3_000
    wrote = torch.tensor(
        [r.token_ids for r in generate(model, [[1]] * rows, SamplingParams(max_new_tokens=3))]
    )
    seen = torch.bincount(wrote @ torch.tensor([9, 3, 1]), minlength=27).double()
    texts = torch.cat(
        (torch.ones(27, 1, dtype=torch.long), torch.cartesian_prod(*[torch.arange(3)] * 3)), 1
    )
    distribution = {
        m: torch.tensor(evaluate(model, texts, method=m, unit="window").unit_nats).neg().exp()
        for m in ("exact", "nelbo-exact")
    }
    assert float(distribution["exact"].sum()) == pytest.approx(1, abs=1e-6)
    assert float(distribution["nelbo-exact"].sum()) < 0.95
    statistic = float(
        ((seen - rows * distribution["exact"]).square() / (rows * distribution["exact"])).sum()
    )
    assert chi2.sf(statistic, 26) > 1e-6


def test_random_orders_lie_between_likelihood_and_bound() -> None:
    """In the mean over 64 draws: exact < 16 orders < 4 orders < 1 order = the bound."""
    model, windows = ragged()
    exact, bound = (
        evaluate(model, windows, method=m).nats_per_token for m in ("exact", "nelbo-exact")
    )
    found = {
        K: evaluate(model, windows, method="k-orders", orders=K, replicates=64) for K in (1, 4, 16)
    }
    assert abs(z_score(found[1], bound)) < 5
    means = [exact, *(found[K].nats_per_token for K in (16, 4, 1))]
    assert means == sorted(means)
    assert found[4].nats_per_token < bound - 5 * (found[4].stderr_monte_carlo or 0)
    assert (found[4].passes, found[4].estimator) == (4 * 4 * 64, "4 orders")


# -- the same seed, the same report ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["nelbo", "nelbo-exact", "exact", "k-orders"])
@pytest.mark.parametrize("estimator", ["count", "time", "complementary"])
def test_equal_seeds_give_equal_reports(method: str, estimator: str) -> None:
    model, windows = ragged()
    run = lambda seed, rows: evaluate(
        model,
        windows,
        method=method,
        estimator=estimator,
        seed=seed,
        batch_size=rows,
        positions=4,
        orders=2,
    )
    first = run(3, 16).to_json()
    assert run(3, 16).to_json() == first
    assert run(3, 1).nats_per_token == pytest.approx(first["nats_per_token"], abs=1e-12), (
        "noise does not depend on the batch"
    )
    assert (run(4, 16).nats_per_token != first["nats_per_token"]) == (
        method in ("nelbo", "k-orders")
    )


def test_the_models_mode_is_put_back_and_dropout_is_off() -> None:
    sizes = {
        "hidden_dim": 16,
        "n_blocks": 1,
        "n_heads": 2,
        "cond_dim": 8,
        "model_length": 12,
        "block_size": 4,
        "dropout": 0.5,
    }
    model = DiT(DiTConfig(vocab_size=7, mask_id=6, **sizes)).train()
    torch.nn.init.normal_(model.head.weight)
    ids = torch.randint(0, 6, (2, 12))
    one, two = (evaluate(model, ids, method="exact") for _ in range(2))
    assert one == two
    assert model.training


# -- bytes and places ------------------------------------------------------------------------------


class TwoBytes:
    """Every token stands for two bytes, token 2 for none."""

    def byte_lengths(self, ids: list[int]) -> list[int]:
        return [0 if i == 2 else 2 for i in ids]


def test_bits_per_byte_is_over_the_bytes_of_scored_tokens() -> None:
    model, (ids, doc) = ragged()
    found = evaluate(model, (ids, doc), method="exact", tokenizer=TwoBytes(), positions=3)
    scored = (doc != NOWHERE) & (doc == torch.cat((torch.full_like(doc[:, :1], 9), doc[:, :-1]), 1))
    assert found.tokens == int(scored.sum())
    assert found.bytes == 2 * int((ids[scored] != 2).sum())
    assert found.bits_per_byte == pytest.approx(total(found) / math.log(2) / found.bytes)
    assert sum(p.nats_per_token * p.tokens for p in found.positions) == pytest.approx(total(found))
    assert evaluate(model, (ids, doc), method="exact").bits_per_byte is None


# -- refusals --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "block too large to enumerate": (
        {"method": "exact", "block_size": 16},
        "too large to enumerate .* use method 'k-orders'",
    ),
    "bound of such a block": ({"method": "nelbo-exact", "block_size": 16}, "use method 'nelbo'"),
    "unknown method": ({"method": "exct"}, "did you mean 'exact'"),
    "unknown estimator": ({"estimator": "counts"}, "did you mean 'count'"),
    "unknown schedule": ({"schedule": "cosin"}, "did you mean 'cosine'"),
    "clipped schedule": ({"schedule": "clipped:0.3,0.8"}, "schedule"),
    "importance without counts": ({"estimator": "importance"}, "fitted on other data"),
    "counts of smaller blocks": (
        {"estimator": "importance", "counts": CountDistribution.uniform(2)},
        "fitted for blocks of up to 2 cells",
    ),
    "no replicate": ({"replicates": 0}, "replicates is 0"),
    "no order": ({"method": "k-orders", "orders": 0}, "orders is 0"),
    "no block": ({"block_size": 0}, "block_size is 0"),
    "no place": ({"positions": 0}, "positions is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_fix(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        evaluate(Inconsistent(toy_spec(4, 16)), torch.zeros(1, 16, dtype=torch.long), **options)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sedd", {"method": "exact"}, "use method 'nelbo'"),
        ("mdlm", {"block_size": 2}, "leave block_size out"),
        ("autoregressive", {"block_size": 2}, "blocks of 1"),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    family: str, options: dict[str, object], message: str
) -> None:
    model: Toy = JointTable.random(FAMILIES[family])
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        evaluate(model, torch.zeros(1, 4, dtype=torch.long), **options)  # type: ignore[arg-type]
