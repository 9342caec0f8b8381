"""The bound and the exact likelihood against brute force and entropies, and every Monte-Carlo
distribution against enumeration.

Random checks are z-tests at 5 standard errors of independent replicates (false alarm 6e-7 each).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import BlockMap, Contiguous, Permuted, make_layout, maskable
from bdlm.core.corruption import corrupt
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.estimators import enumerate_blocks, k_orders, masked_nll
from bdlm.core.objectives import objective
from bdlm.core.schedules import SCHEDULES
from bdlm.core.types import NOWHERE, Layout
from bdlm.models.toy import TOYS, Inconsistent, JointTable, toy_spec
from tests.core.enumerated import discrete_nelbo, exact_likelihood, nelbo_exact
from tests.core.maps import Ragged, Variable

MAPS: dict[str, BlockMap] = {
    "L'=1": Contiguous(1),
    "L'=2": Contiguous(2),
    "L'=3, a tail": Contiguous(3),
    "L'=4": Contiguous(4),
    "ragged": Ragged(1, 3),
    "variable": Variable((1, 2, 1)),
    "permuted": Permuted((1, 0, 2, 1)),
}


def joint_world(map: BlockMap) -> tuple[JointTable, Tensor, Layout, Tensor, Tensor]:
    """Every text of a joint distribution, with its probability: averages over them are exact."""
    model = JointTable.random(toy_spec())
    cells = torch.ones(len(model.texts), model.places, dtype=torch.bool)
    return (
        model,
        model.texts,
        make_layout(map, model.places),
        cells,
        model.log_joint.exp().flatten(),
    )


def ragged_world(rows: int = 4, length: int = 16) -> tuple[Inconsistent, Tensor, Layout, Tensor]:
    """Conditionals of no joint distribution, on documents of other lengths in every row, given
    first tokens, padding and odd tails."""
    model, place = Inconsistent(toy_spec(4, length)), torch.arange(length)
    doc = torch.stack(
        [
            torch.where(place < 5 + r % 4, 0, torch.where(place < length - r % 3, 1, NOWHERE))
            for r in range(rows)
        ]
    )
    layout = make_layout(Ragged(3, 4), length, doc)
    ids = torch.randint(0, 3, (rows, length), generator=torch.Generator().manual_seed(0))
    return model, ids, layout, maskable(layout)


def z_score(values: Tensor, expected: float) -> float:
    return float(
        (values.double().mean() - expected) / (values.double().std() / math.sqrt(len(values)))
    )


# -- one joint distribution: everything equals the entropy -----------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_bound_and_likelihood_equal_the_entropy(name: str) -> None:
    """Spec 1.6: with exact conditionals the bound is tight for every block map; and each text's
    likelihood is its own."""
    model, ids, layout, cells, prob = joint_world(MAPS[name])
    found = enumerate_blocks(model, ids, layout, cells)
    assert abs(float((found.bound.sum(1) * prob).sum()) - model.entropy) < 1e-10
    torch.testing.assert_close(-found.exact.sum(1), model.log_prob(ids), atol=1e-10, rtol=0)


def test_causal_context_is_tight_too() -> None:
    world = TOYS["causal_context"]
    model = world.make()
    assert isinstance(model, JointTable)
    layout, cells = make_layout(world.map, 4, context="causal"), torch.ones(81, 4, dtype=torch.bool)
    torch.testing.assert_close(
        -exact_likelihood(model, model.texts, layout, cells).sum(1),
        model.log_prob(model.texts),
        atol=1e-10,
        rtol=0,
    )


@pytest.mark.parametrize("name", ("shifted", "autoregressive"))
def test_shifted_models_sum_to_one_after_their_first_token(name: str) -> None:
    world = TOYS[name]
    model = world.make()
    assert isinstance(model, JointTable)
    layout = make_layout(world.map, 4, context=model.spec.context)
    exact = exact_likelihood(model, model.texts, layout, maskable(layout).expand(81, -1)).sum(1)
    total = torch.zeros(3, dtype=torch.float64).index_add_(0, model.texts[:, 0], (-exact).exp())
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)
    if name == "autoregressive":
        first = model.log_joint.exp().sum((1, 2, 3)).log()[model.texts[:, 0]]
        torch.testing.assert_close(-exact, model.log_prob(model.texts) - first, atol=1e-12, rtol=0)


def test_discrete_time_converges_from_above() -> None:
    """Spec 1.4: T = 1 pays the sum of marginal entropies, more steps pay less, the limit is the
    entropy; L' = 1 is exact at any T."""
    model, ids, layout, cells, prob = joint_world(Contiguous(4))
    average = lambda nats: float((nats.sum(1) * prob).sum())
    values = [
        average(discrete_nelbo(model, ids, layout, cells, SCHEDULES["linear"], T))
        for T in (1, 2, 4, 8, 16, 64, 256)
    ]
    marginals = [model.log_joint.exp().sum([d for d in range(4) if d != i]) for i in range(4)]
    assert abs(values[0] + sum(float((m * m.log()).sum()) for m in marginals)) < 1e-10
    assert all(a > b > model.entropy for a, b in itertools.pairwise(values))
    assert values[-1] - model.entropy < 0.005
    for steps in (1, 3):
        single = discrete_nelbo(
            model, ids, make_layout(Contiguous(1), 4), cells, SCHEDULES["cosine"], steps
        )
        assert abs(average(single) - model.entropy) < 1e-10


def test_other_schedules_reach_the_same_limit() -> None:
    model, ids, layout, cells = ragged_world()
    limit = nelbo_exact(model, ids, layout, cells).sum()
    for name, schedule in SCHEDULES.items():
        gaps = [
            float((discrete_nelbo(model, ids, layout, cells, schedule, T).sum() - limit).abs())
            for T in (16, 256, 4096)
        ]
        assert gaps[2] < 0.01 * float(limit), name
        assert gaps[2] < gaps[1] < gaps[0], name


# -- conditionals of no joint distribution ---------------------------------------------------------


def brute_force(
    model: Inconsistent, ids: Tensor, layout: Layout, cells: Tensor, row: int, block: int
) -> tuple[float, float]:
    """Bound and likelihood of one block from all orders of its cells, a call for every cell of
    every order."""
    inside = cells[row] & (layout.block[row] == block)
    places = inside.nonzero().flatten().tolist()
    own = layout.map(lambda x: x[row : row + 1])
    likelihood, bound = 0.0, 0.0
    orders = list(itertools.permutations(places))
    for order in orders:
        masked, log = torch.zeros(1, ids.shape[1], dtype=torch.bool), 0.0
        masked[0, places] = True
        for place in order:
            log -= float(masked_nll(model, ids[row : row + 1], own, masked)[0, place])
            masked[0, place] = False
        likelihood += math.exp(log) / len(orders)
        bound -= log / len(orders)
    return bound, -math.log(likelihood)


def test_enumeration_equals_brute_force_over_orders() -> None:
    """To 1e-10: the bound is the mean over orders of -log p, the likelihood the log of the mean; on
    blocks of 1 to 4 cells."""
    model, ids, layout, cells = ragged_world()
    found, sizes = enumerate_blocks(model, ids, layout, cells), set()
    for row, block in itertools.product(range(4), range(int(layout.block.max()) + 1)):
        size = int(found.tokens[row, block])
        sizes.add(size)
        expected = brute_force(model, ids, layout, cells, row, block) if size else (0.0, 0.0)
        assert abs(float(found.bound[row, block]) - expected[0]) < 1e-10
        assert abs(float(found.exact[row, block]) - expected[1]) < 1e-10
    assert sizes == {0, 1, 2, 3, 4}


def test_likelihood_is_below_the_bound_and_sums_to_one() -> None:
    model = Inconsistent(toy_spec(4))
    texts, cells = JointTable.random(toy_spec()).texts, torch.ones(81, 4, dtype=torch.bool)
    for map in MAPS.values():
        found = enumerate_blocks(model, texts, make_layout(map, 4), cells)
        assert bool((found.exact <= found.bound + 1e-12).all())
        assert abs(float((-found.exact.sum(1)).exp().sum()) - 1) < 1e-10
    assert float((found.bound - found.exact).max()) > 0.1


def test_single_cells_have_no_gap() -> None:
    model, ids, _, _ = ragged_world()
    cells = torch.ones_like(ids, dtype=torch.bool)
    found = enumerate_blocks(model, ids, make_layout(Contiguous(1), 16), cells)
    torch.testing.assert_close(found.bound, found.exact, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        found.exact,
        masked_nll(model, ids, make_layout(Contiguous(1), 16), cells),
        atol=1e-12,
        rtol=0,
    )


def test_a_prompt_inside_a_block_is_given() -> None:
    """The cells of a prompt are shown in their block: the rest is scored as first-hitting writes it
    from there."""
    model = Inconsistent(toy_spec(4))
    texts, layout = JointTable.random(toy_spec()).texts, make_layout(Contiguous(4), 4)
    cells = torch.tensor([False, False, True, True]).expand(81, -1)
    exact = exact_likelihood(model, texts, layout, cells).sum(1)
    total = torch.zeros(9, dtype=torch.float64).index_add_(
        0, texts[:, 0] * 3 + texts[:, 1], (-exact).exp()
    )
    torch.testing.assert_close(total, torch.ones(9, dtype=torch.float64), atol=1e-12, rtol=0)


# -- Monte-Carlo distributions against enumeration -------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "schedule"),
    [
        ("count", "linear"),
        ("complementary", "linear"),
        ("time", "linear"),
        *(
            pytest.param("time", s, marks=pytest.mark.slow)
            for s in SCHEDULES
            if s not in ("linear", "square_root")
        ),
    ],
)
def test_laws_are_unbiased_on_ragged_blocks(distribution: str, schedule: str) -> None:
    """The bound of every distribution is the enumerated one; of the time distribution, under every
    schedule but square_root (infinite variance)."""
    model, ids, layout, cells = ragged_world()
    expected = float(nelbo_exact(model, ids, layout, cells).sum())
    repeat = lambda x: x.repeat(8, 1)
    layout8 = layout.map(repeat)
    totals = []
    for step in range(300):
        noised = corrupt(
            repeat(ids),
            layout8,
            repeat(cells),
            SCHEDULES[schedule],
            seed=0,
            step=step,
            row=torch.arange(32),
            distribution=distribution,
            mask_id=3,
        )
        totals.append(objective(model, noised).sum() / 8)
    values = torch.stack(totals)
    assert abs(z_score(values, expected)) < 5
    assert float(values.std()) / math.sqrt(300) < 0.01 * expected, "too noisy to prove anything"


def test_discrete_times_are_unbiased() -> None:
    model, ids, layout, cells = ragged_world()
    expected = float(discrete_nelbo(model, ids, layout, cells, SCHEDULES["cosine"], 3).sum())
    totals = [
        objective(
            model,
            corrupt(
                ids,
                layout,
                cells,
                SCHEDULES["cosine"],
                seed=0,
                step=s,
                row=torch.arange(4),
                steps=3,
                mask_id=3,
            ),
        ).sum()
        for s in range(200)
    ]
    assert abs(z_score(torch.stack(totals), expected)) < 5
    assert expected > float(nelbo_exact(model, ids, layout, cells).sum()) * 0.5


def test_random_orders_average_to_the_likelihood() -> None:
    """exp(-k_orders) is unbiased for the likelihood at any K; its -log lies above in the mean and
    closes in with K."""
    model, ids, layout, cells = ragged_world(rows=1)
    exact = exact_likelihood(model, ids, layout, cells)
    many = layout.map(lambda x: x.repeat(200, 1))
    found = {}
    for K in (1, 8):
        nats = k_orders(model, ids.repeat(200, 1), many, cells.repeat(200, 1), K, seed=K)
        for block in range(exact.shape[1]):
            ratio = (exact[0, block] - nats[:, block]).exp()
            if float(ratio.std()) > 1e-9:
                assert abs(z_score(ratio, 1.0)) < 5
            else:
                torch.testing.assert_close(ratio, torch.ones_like(ratio))
        found[K] = float(nats.sum(1).mean())
    assert float(exact.sum()) < found[8] < found[1]
    bound = float(nelbo_exact(model, ids, layout, cells).sum())
    assert abs(found[1] - bound) < 0.2, "one order is the bound in the mean"


# -- refusals --------------------------------------------------------------------------------------


def test_large_blocks_are_refused_with_the_alternative() -> None:
    model, ids = Inconsistent(toy_spec(16, 16)), torch.zeros(1, 16, dtype=torch.long)
    layout, cells = make_layout(Contiguous(16), 16), torch.ones(1, 16, dtype=torch.bool)
    for method in (nelbo_exact, exact_likelihood):
        with pytest.raises(ConfigError, match="k_orders"):
            method(model, ids, layout, cells)
    with pytest.raises(ConfigError, match="orders is 0"):
        k_orders(model, ids, layout, cells, 0, seed=0)
    assert k_orders(model, ids, layout, cells, 2, seed=0).shape == (1, 1)


@pytest.mark.parametrize("name", ("score", "uniform"))
def test_models_without_token_likelihood_are_refused(name: str) -> None:
    model, layout = TOYS[name].make(), make_layout(Contiguous(2), 4)
    with pytest.raises(UnsupportedError):
        nelbo_exact(
            model, torch.zeros(1, 4, dtype=torch.long), layout, torch.ones(1, 4, dtype=torch.bool)
        )


def test_nothing_to_score_is_zero() -> None:
    model, ids, layout, cells = ragged_world()
    found = enumerate_blocks(model, ids, layout, torch.zeros_like(cells))
    assert not bool(found.bound.any())
    assert not bool(found.exact.any())
