"""Learning rate, budget, phases and the moving average: each against its formula."""

import math

import pytest
import torch
from torch import nn

from bdlm.training.optim import Ema, block_sizes_at, budget_share, learning_rate, make_optimizer
from bdlm.training.sections import LimitsSection, OptimSection


@pytest.mark.parametrize(
    ("decay", "middle", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.1 + 0.9 * 0.5, 0.1)],
)
def test_learning_rate(decay, middle, end):
    config = OptimSection(lr=2.0, warmup_steps=4, decay=decay, decay_to=0.1)
    assert [learning_rate(config, step, 0.0) for step in range(5)] == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0]
    )
    assert learning_rate(config, 100, 0.5) == pytest.approx(2 * middle)
    assert learning_rate(config, 100, 1.0) == pytest.approx(2 * end)
    assert learning_rate(config, 100, 1.3) == pytest.approx(2 * end)
    late = OptimSection(lr=2.0, warmup_steps=0, decay=decay, decay_to=0.1, decay_from=0.8)
    assert learning_rate(late, 0, 0.8) == pytest.approx(2.0)
    assert learning_rate(late, 0, 0.9) == pytest.approx(2 * middle)


def test_the_nearest_limit_counts():
    limits = LimitsSection(minutes=2, tokens=1000, steps=10)
    assert budget_share(limits, 5, 100, 6) == 0.5
    assert budget_share(limits, 1, 900, 6) == 0.9
    assert budget_share(limits, 1, 100, 119) == pytest.approx(119 / 120)
    assert budget_share(LimitsSection(steps=4), 4, 10**9, 10**9) == 1


def test_phases_begin_at_their_share():
    phases = ((0.0, (1,)), (0.5, (1, 4)), (0.75, (8,)))
    assert [block_sizes_at(phases, share, 8) for share in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [
        (1,),
        (1,),
        (1, 4),
        (1, 4),
        (8,),
        (8,),
    ]
    assert block_sizes_at((), 0.3, 16) == (16,)


def test_ema_follows_its_formula_with_warm_up():
    model = nn.Linear(3, 2).double()
    ema, decay = Ema(model, 0.5), 0.5
    expected = [p.detach().clone() for p in model.parameters()]
    for n in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        ema.update()
        now = min(decay, (1 + n) / (10 + n))
        expected = [now * e + (1 - now) * p.detach() for e, p in zip(expected, model.parameters())]
    for e, w in zip(expected, ema.weights):
        torch.testing.assert_close(e, w)
    assert ema.updates == 12


def test_averaged_weights_in_place_and_back_bit_for_bit():
    model = nn.Linear(3, 2)
    ema = Ema(model, 0.9)
    before = [p.detach().clone() for p in model.parameters()]
    averages = [torch.randn_like(w) for w in ema.weights]
    ema.weights = [a.clone() for a in averages]
    with pytest.raises(RuntimeError), ema.in_place():
        assert all(torch.equal(p, a) for p, a in zip(model.parameters(), averages))
        raise RuntimeError
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert all(torch.equal(w, a) for w, a in zip(ema.weights, averages))


def test_weight_decay_is_for_matrices_only():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    weight = model[0].weight.detach().clone()
    make_optimizer(model, OptimSection(lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(model[0].weight.detach(), weight * (1 - 0.05))
    assert torch.equal(model[0].bias, torch.ones(2))
    assert torch.equal(model[1].weight, torch.ones(2))
    assert math.isfinite(float(model[0].weight.sum()))
