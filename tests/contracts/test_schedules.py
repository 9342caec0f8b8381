"""What every schedule promises, over all of `SCHEDULES`, and the clipped training distribution."""

from __future__ import annotations

import pytest
import torch

from bdlm.core.errors import ConfigError
from bdlm.core.schedules import SCHEDULES, Clipped, Schedule, schedule_of

TIMES = torch.linspace(0, 1, 401, dtype=torch.float64)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


def test_ends_are_exact_and_masking_grows(schedule: Schedule) -> None:
    p = schedule.mask_prob(TIMES)
    assert p[0] == 0
    assert abs(float(p[-1]) - 1) < 1e-15
    assert bool((p.diff() > 0).all())
    assert schedule.bounds


def test_slope_is_the_derivative(schedule: Schedule) -> None:
    t = TIMES[1:]
    torch.testing.assert_close(
        schedule.slope(t), Schedule.slope(schedule, t), atol=1e-12, rtol=1e-12
    )
    inner, h = t[:-1], 1e-6
    secant = (schedule.mask_prob(inner + h) - schedule.mask_prob(inner - h)) / (2 * h)
    torch.testing.assert_close(schedule.slope(inner), secant, atol=1e-6, rtol=1e-5)


def test_weight_is_slope_over_probability(schedule: Schedule) -> None:
    t = TIMES[1:]
    torch.testing.assert_close(
        schedule.weight(t), schedule.slope(t) / schedule.mask_prob(t), atol=0, rtol=1e-9
    )
    assert bool((schedule.weight(t) > 0).all())
    assert bool((schedule.weight(t * 1e-9) < 1e30).all())


def test_inverse(schedule: Schedule) -> None:
    torch.testing.assert_close(
        schedule.inverse(schedule.mask_prob(TIMES)), TIMES, atol=1e-12, rtol=1e-9
    )
    torch.testing.assert_close(
        Schedule.inverse(schedule, schedule.mask_prob(TIMES)), TIMES, atol=1e-12, rtol=1e-9
    )
    tiny = torch.tensor([1e-12], dtype=torch.float64)
    torch.testing.assert_close(schedule.mask_prob(schedule.inverse(tiny)), tiny, atol=0, rtol=1e-6)


def test_single_precision_and_shape(schedule: Schedule) -> None:
    t = TIMES[1:].float().reshape(20, 20)
    for values in (
        schedule.mask_prob(t),
        schedule.slope(t),
        schedule.weight(t),
        schedule.inverse(t),
    ):
        assert values.dtype == torch.float32
        assert values.shape == t.shape
        assert bool(values.isfinite().all())


def test_weights_integrate_every_set_size_alike(schedule: Schedule) -> None:
    """Spec 4.3 of the paper: the bound does not depend on the schedule. One masked set of r among n
    weighs (r-1)! (n-r)! / n!."""
    from bdlm.core.estimators import set_weights

    v, width = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000, 1 / 200_000
    t = v**4  # grades the midpoint rule towards t = 0, where weights grow
    p, measure = schedule.mask_prob(t), schedule.weight(t) * 4 * v**3 * width
    for n in (1, 2, 3, 5):
        for r in range(1, n + 1):
            integral = float((measure * p**r * (1 - p) ** (n - r)).sum())
            assert abs(integral - float(set_weights(n)[n, r])) < 1e-6, (n, r)


def test_clipped() -> None:
    distribution = schedule_of("clipped:0.3,0.8")
    assert distribution == Clipped(0.3, 0.8)
    assert not distribution.bounds
    p = distribution.mask_prob(TIMES)
    assert float(p[0]) == 0.3
    assert abs(float(p[-1]) - 0.8) < 1e-15
    torch.testing.assert_close(distribution.weight(TIMES), 1 / p)
    torch.testing.assert_close(distribution.inverse(p), TIMES, atol=1e-12, rtol=0)
    assert float(distribution.inverse(torch.tensor(0.1))) == 0
    assert float(distribution.inverse(torch.tensor(0.9))) == 1
    point = schedule_of("clipped:1,1")
    assert bool((point.mask_prob(TIMES) == 1).all())
    assert bool((point.inverse(TIMES) == 0).all())


@pytest.mark.parametrize(
    ("name", "says"),
    (
        ("linaer", "did you mean 'linear'"),
        ("clipped", "clipped:LOW,HIGH"),
        ("clipped:0.8,0.3", "0 <= low"),
        ("clipped:0,0", "0 <= low"),
        ("clipped:a,b", "clipped:LOW"),
    ),
)
def test_unreadable_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        schedule_of(name)
