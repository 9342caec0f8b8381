"""The toy worlds themselves: conditionals by brute force over the joint distribution, in each
convention."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core import forward
from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.types import Canvas, NoisedBatch
from bdlm.models.toy import MASK_LOGIT, TOYS, Inconsistent, JointTable, toy_spec


def conditional(model: JointTable, place: int, weight: Tensor) -> Tensor:
    """p(token at place) under the joint distribution times a weight for each text, [tokens]."""
    mass = model.log_joint.exp().flatten() * weight
    out = torch.zeros(model.tokens, dtype=torch.float64).index_add_(0, model.texts[:, place], mass)
    return out / out.sum()


def predictions(model: JointTable, clean: Tensor, noisy: Tensor, time: float = 0.4) -> Tensor:
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    times = torch.full((1, 4), time)
    noised = NoisedBatch(
        clean[None],
        noisy[None],
        everywhere,
        times,
        times,
        everywhere,
        make_layout(Contiguous(2), 4),
    )
    logits = forward.train_logits(model, noised).logits
    assert logits is not None
    return logits


def test_masked_cells_are_predicted_from_what_they_see() -> None:
    """Block 2 of 2 with its first cell shown: clean block 1 (not its noisy copy) and the shown cell
    tell, nothing else."""
    model = JointTable.random(toy_spec(2))
    clean, noisy = torch.tensor([2, 0, 1, 1]), torch.tensor([0, 3, 1, 3])
    logits = predictions(model, clean, noisy)
    assert bool((logits[:, 3] == MASK_LOGIT).all())
    same = model.texts == clean
    torch.testing.assert_close(
        logits[3, :3].exp(), conditional(model, 3, (same[:, 0] & same[:, 1] & same[:, 2]).double())
    )
    torch.testing.assert_close(
        logits[1, :3].exp(), conditional(model, 1, (model.texts[:, 0] == 0).double())
    )


def test_uniform_noise_is_weighed() -> None:
    """Both noisy cells of block 2 tell q(x_t | x_0) = (1 - p) [same] + p / 3."""
    world = TOYS["uniform"].make()
    assert isinstance(world, JointTable)
    clean, noisy, p = torch.tensor([2, 0, 1, 1]), torch.tensor([1, 1, 2, 0]), 0.4
    told = (world.texts[:, :2] == clean[:2]).all(1).double()
    for cell in (2, 3):
        told = told * torch.where(world.texts[:, cell] == noisy[cell], 1 - p + p / 3, p / 3)
    torch.testing.assert_close(
        predictions(world, clean, noisy, p)[3, :3].exp(),
        conditional(world, 3, told),
        atol=1e-7,
        rtol=1e-6,
    )


def test_law_helpers() -> None:
    model = JointTable.random(toy_spec())
    assert abs(float(model.log_prob(model.texts).exp().sum()) - 1) < 1e-12
    draws = model.sample(40_000, seed=0)
    index = (draws * torch.tensor([27, 9, 3, 1])).sum(1)
    shares, prob = torch.bincount(index, minlength=81) / 40_000, model.log_joint.exp().flatten()
    # 81 shares, each within 5 standard errors: false alarm 5e-5
    assert bool(((shares - prob).abs() < 5 * (prob * (1 - prob) / 40_000).sqrt() + 1e-9).all())


def test_inconsistent_conditionals_belong_to_no_joint_distribution() -> None:
    """p(a) p(b | a) differs from p(b) p(a | b); the same sight gives the same prediction whatever
    the order of cells or the cache."""
    model, map = Inconsistent(toy_spec(4, 16)), Contiguous(4)
    place = torch.arange(4)[None]

    def predict(ids: list[int], masked: list[bool], order: list[int]) -> Tensor:
        layout = forward.places(map, place[:, order])
        canvas = Canvas(torch.tensor([ids])[:, order], torch.tensor([masked])[:, order], layout)
        logits = forward.predict(
            model, canvas, None, query_mask=torch.ones(1, 4, dtype=torch.bool)
        ).logits
        return logits[torch.tensor(order).argsort(), :3].exp()

    nothing = predict([3, 3, 3, 3], [True] * 4, [0, 1, 2, 3])
    first, second = (
        predict([1, 3, 3, 3], [False, True, True, True], [0, 1, 2, 3]),
        predict([3, 2, 3, 3], [True, False, True, True], [0, 1, 2, 3]),
    )
    assert abs(float(nothing[0, 1] * first[1, 2] - nothing[1, 2] * second[0, 1])) > 1e-3
    torch.testing.assert_close(
        predict([1, 3, 3, 3], [False, True, True, True], [2, 0, 3, 1]), first
    )


def test_toys_state_their_conventions() -> None:
    specs = {name: world.make().spec for name, world in TOYS.items()}
    assert {s.noise for s in specs.values()} == {"mask", "uniform", "none"}
    assert {s.prediction for s in specs.values()} == {"tokens", "log_score"}
    assert (
        {s.shift for s in specs.values()}
        == {s.time_conditioned for s in specs.values()}
        == {True, False}
    )
    assert {s.context for s in specs.values()} == {"block", "causal"}
