"""Loss and gradient variance against enumeration and against Eq. 10, bootstrap intervals against
simulation, the search in one pass.

Random checks allow 5 standard errors (false alarm about 6e-7, or 1e-5 where the error itself is
estimated from 40 values)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdlm import cli
from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.counts import CountDistribution
from bdlm.core.errors import ConfigError
from bdlm.core.estimators import masked_nll
from bdlm.core.objectives import objective
from bdlm.core.statistics import GradientVariance, candidate_intervals
from bdlm.likelihood.variance import (
    BootstrapInterval,
    IntervalMap,
    LossSampler,
    NoiseDistribution,
    search,
    variance,
)
from bdlm.models.toy import Inconsistent, toy_spec
from tests.likelihood.networks import small_network


def windows(rows: int = 12) -> Tensor:
    return torch.randint(0, 6, (rows, 8), generator=torch.Generator().manual_seed(1))


def by_enumeration(
    model: Inconsistent,
    ids: Tensor,
    weight: Callable[[int, int], float],
    chance: Callable[[int, int], float],
) -> float:
    """Variance of the mean loss of a block of n scored cells (the window's last n) under a
    distribution of counts.

    weight(n, r), chance(n, r): of a set of r masked cells, and of drawing r.
    """
    n = ids.shape[1] - 1
    layout, first, second = make_layout(Contiguous(n + 1), n + 1), 0.0, 0.0
    for r in range(1, n + 1):
        sets = list(itertools.combinations(range(1, n + 1), r))
        for places in sets:
            masked = torch.zeros(1, n + 1, dtype=torch.bool)
            masked[0, list(places)] = True
            loss = weight(n, r) * float(masked_nll(model, ids, layout, masked).sum()) / n
            first += chance(n, r) / len(sets) * loss
            second += chance(n, r) / len(sets) * loss**2
    return second - first**2


LAW_OF = {
    "count": (lambda n, r: n / r, lambda n, r: 1 / n),
    "importance": (
        lambda n, r: {1: 8, 2: 4, 3: 8 / 3}[r] / 2 / {1: 1, 2: 1, 3: 2}[r],
        lambda n, r: {1: 0.25, 2: 0.25, 3: 0.5}[r],
    ),
    "all": (lambda n, r: 1.0, lambda n, r: float(r == n)),
}


@pytest.mark.parametrize("distribution", LAW_OF)
def test_loss_variance_is_the_enumerated_one(distribution: str) -> None:
    """One text over and over: all that varies is the noise. Strata raise the mean of a batch's
    variance by less than 1 in 256."""
    model, ids = Inconsistent(toy_spec(4)), torch.tensor([[0, 2, 1, 1]])
    counts = CountDistribution(
        torch.tensor(
            [[0.0] * 4, [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0.25, 0.25, 0.5]], dtype=torch.float64
        )
    )
    (found,) = variance(model, ids, [distribution], batches=40, batch_size=256, counts=counts)
    expected = by_enumeration(model, ids, *LAW_OF[distribution])
    error = (found.loss.high - found.loss.low) / (2 * 1.96)
    assert abs(found.loss.value - expected) < 5 * error + expected / 256 + 1e-12
    assert found.unbiased == (distribution != "all")
    assert found.passes == 1
    assert (expected == 0) == (distribution == "all")


def test_counts_vary_less_than_times_and_pairs_less_than_counts() -> None:
    spreads = variance(
        Inconsistent(toy_spec(4, 16)),
        torch.zeros(1, 16, dtype=torch.long),
        batches=40,
        batch_size=32,
    )
    time, count, pair = (s.loss for s in spreads)
    assert pair.high < count.low
    assert count.high < time.low
    assert [s.passes for s in spreads] == [1, 1, 2]


def test_clipped_laws_are_marked_as_biased() -> None:
    names = ["time:clipped:0.3,0.8", "count:clipped:0.3,0.8", "time:cosine", "all"]
    spreads = variance(
        Inconsistent(toy_spec(4, 16)), torch.zeros(1, 16, dtype=torch.long), names, batches=2
    )
    assert [(s.distribution, s.unbiased) for s in spreads] == [
        *((n, False) for n in names[:2]),
        ("time:cosine", True),
        ("all", False),
    ]
    assert variance(
        Inconsistent(toy_spec(1, 16)), torch.zeros(1, 16, dtype=torch.long), ["all"], batches=2
    )[0].unbiased


# -- gradients -------------------------------------------------------------------------------------


def gradients(look: LossSampler, distribution: NoiseDistribution, count: int) -> Tensor:
    """Each batch's gradient of its loss per token, [count, P], by autograd directly."""
    parameters, found = list(look.model.parameters()), []  # type: ignore[attr-defined]
    for noised in look.batches(distribution, count):
        total = objective(look.model, noised).sum() / noised.scored.sum()
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]).double()
        )
    return torch.stack(found)


@pytest.mark.parametrize("distribution", ["time", "count", "complementary"])
def test_gradient_variance_is_equation_10(distribution: str) -> None:
    model = small_network(8).eval()
    look = LossSampler.at(model, windows(), None, 4, seed=2)
    vectors = gradients(look, NoiseDistribution(distribution), 40)
    pairs = look.gradient_variances(NoiseDistribution(distribution), 40)
    torch.testing.assert_close(
        pairs, (vectors[::2] - vectors[1::2]).square().sum(1) / 2, rtol=1e-4, atol=1e-9
    )
    whole, two = GradientVariance(), GradientVariance()
    for i, vector in enumerate(vectors):
        whole.update(vector)
        if i < 2:
            two.update(vector)
    assert float(pairs[0]) == pytest.approx(two.value(), rel=1e-4), (
        "of two batches it is Eq. 10 itself"
    )
    assert abs(float(pairs.mean()) - whole.value()) < 5 * float(pairs.std()) / math.sqrt(20)


def test_gradients_leave_the_model_as_it_was() -> None:
    model = small_network(8).train()
    (spread,) = variance(model, windows(), ["count"], batches=2, gradient_batches=4, batch_size=4)
    assert spread.gradient is not None
    assert spread.gradient.value > 0
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# -- intervals -------------------------------------------------------------------------------------


def test_the_bootstrap_covers() -> None:
    """Intervals of 30 skewed values: the mean lies inside in 90 to 97 of 100 (nominal 95; small
    samples of skewed values cover less)."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(600, 30, dtype=torch.float64).exponential_(generator=generator)
    bands = [BootstrapInterval.of(v, seed=i) for i, v in enumerate(values)]
    assert 0.90 < sum(b.low < 1 < b.high for b in bands) / len(bands) < 0.97
    assert bands[0] == BootstrapInterval.of(values[0], seed=0)
    assert BootstrapInterval.of(torch.tensor([2.0, float("nan"), 2.0]), 0) == BootstrapInterval(
        2.0, 2.0, 2.0
    )
    assert math.isnan(BootstrapInterval.of(torch.tensor([float("nan")]), 0).value)


def test_one_batch_has_no_interval() -> None:
    band = BootstrapInterval.of(torch.tensor([2.0]), 0)
    assert band.value == 2
    assert math.isnan(band.low)
    assert math.isnan(band.high)
    assert band.to_json() == {"value": 2.0, "low": None, "high": None}


def test_the_search_of_one_pass_is_drawing_each_interval() -> None:
    model, ids = small_network(8).eval(), windows()
    found = search(model, ids, batches=150, batch_size=12)
    assert list(found.bands) == candidate_intervals(4)
    assert len(found.bands) == 36
    assert found.bands[found.best].value == min(b.value for b in found.bands.values())
    for low, high in ((0.3, 0.8), (0.5, 1.0)):
        (direct,) = variance(
            model, ids, [f"time:clipped:{low},{high}"], batches=150, batch_size=12, seed=9
        )
        shared = found.bands[low, high]
        error = math.hypot(*(((b.high - b.low) / 3.92) for b in (direct.loss, shared)))
        assert abs(direct.loss.value - shared.value) < 5 * error


def test_single_cells_choose_between_the_full_interval_and_all_masked() -> None:
    found = search(small_network(8).eval(), windows(), block_size=1, batches=20)
    assert list(found.bands) == [(0.001, 1.0), (1.0, 1.0)]
    assert found.best == (1.0, 1.0)


def test_a_search_that_saw_nothing_says_so() -> None:
    with pytest.raises(ConfigError, match="more batches"):
        _ = IntervalMap({(0.0, 0.5): BootstrapInterval(math.nan, math.nan, math.nan)}).best


def test_equal_seeds_give_equal_figures() -> None:
    run = lambda seed: variance(
        small_network(8).eval(), windows(), batches=4, gradient_batches=2, batch_size=4, seed=seed
    )
    assert run(1) == run(1) != run(2)


# -- refusals and the command ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distributions": ["tme"]}, "did you mean 'time'"),
        ({"distributions": ["time:cosin"]}, "did you mean 'cosine'"),
        ({"distributions": ["complementary:cosine"]}, "write 'complementary'"),
        ({"distributions": ["importance"]}, "fitted on other data"),
        ({"gradient_batches": 3}, "even number"),
        ({"gradient_batches": 2}, "no weights"),
        ({"batches": 0}, "batches is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variance(
            Inconsistent(toy_spec(4, 16)),
            torch.zeros(1, 16, dtype=torch.long),
            **{"batches": 1, **options},
        )  # type: ignore[arg-type]


def test_the_command(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "variance",
        "--model",
        str(tiny_model),
        "--data",
        str(text_file),
        "--batches",
        "3",
        "--batch-size",
        "4",
    ]
    distributions = [
        "--distributions",
        "time",
        "count",
        "importance",
        "--fit-on",
        str(text_file),
        "--gradient-batches",
        "4",
    ]
    assert cli.run([*base, *distributions, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [s["distribution"] for s in said] == ["time:linear", "count", "importance"]
    assert all(
        s[k]["low"] <= s[k]["value"] <= s[k]["high"] for s in said for k in ("loss", "gradient")
    )
    assert (
        cli.run(
            [
                *base,
                *distributions[distributions.index("--fit-on") :],
                "--distributions",
                "time",
                "importance",
                "complementary",
                "time:clipped:0.3,0.8",
            ]
        )
        == 0
    )
    _, first, fitted, pairs, clipped = capsys.readouterr().out.splitlines()
    assert first.count("x 1.000") == 2
    assert "biased" not in first + fitted + pairs
    assert clipped.split()[1] == "biased"
    picture = tmp_path / "map.png"
    assert cli.run([*base, "--heat-map", str(picture), "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert drawn["best"] in [r["interval"] for r in drawn["intervals"]]
    assert len(drawn["intervals"]) == 1 + sum(range(2, 11))
    assert cli.run([*base, "--search"]) == 0
    assert "<- least" in capsys.readouterr().out
    assert cli.run([*base, "--search", "--heat-map", "x.png"]) == 2
