"""One pass over both streams against other ways to compute the same function, on the paper's
transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bdlm.core import forward
from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.corruption import corrupt
from bdlm.core.objectives import objective
from bdlm.core.schedules import SCHEDULES
from bdlm.core.types import Canvas, NoisedBatch
from bdlm.experiments.passes import block_by_block, two_passes
from bdlm.models.dit import DiT
from tests.contracts.builders import tiny_dit
from tests.core.maps import Ragged

ROWS, LENGTH = 3, 16


def noised_for(model: DiT, size: int, seed: int = 0, distribution: str = "time") -> NoisedBatch:
    clean = torch.randint(
        0, model.spec.mask_id, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed)
    )
    layout, cells = (
        make_layout(Contiguous(size), LENGTH),
        torch.ones(ROWS, LENGTH, dtype=torch.bool),
    )
    row = torch.arange(ROWS)
    return corrupt(
        clean,
        layout,
        cells,
        SCHEDULES["linear"],
        seed=seed,
        step=0,
        row=row,
        distribution=distribution,
        mask_id=model.spec.mask_id,
    )


def gradients(model: DiT, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(model.parameters())))


def weighted(logits: Tensor, noised: NoisedBatch, mask_id: int) -> Tensor:
    """The loss written out: sum of weight * cross-entropy, the mask forbidden. logits: [R, L,
    V]."""
    real = logits.masked_fill(torch.arange(logits.shape[-1]) == mask_id, float("-inf"))
    nll = -real.log_softmax(-1).gather(-1, noised.clean[..., None])[..., 0]
    return (nll * noised.weight)[noised.masked].sum()


@pytest.mark.parametrize(
    ("dtype", "near"), ((torch.float32, 1e-5), (torch.float64, 1e-12)), ids=("float32", "float64")
)
@pytest.mark.parametrize("size", (1, 4, 16))
def test_one_pass_equals_two(size: int, dtype: torch.dtype, near: float) -> None:
    """Spec 9.2. The tolerance on a gradient is relative to its largest entry."""
    model = tiny_dit("bd3lm", size).to(dtype)
    noised = noised_for(model, size)
    everywhere = torch.ones_like(noised.masked)
    one = forward.train_logits(model, noised, everywhere).logits.view(ROWS, LENGTH, -1)
    for other in (two_passes(model, noised), block_by_block(model, noised)):
        torch.testing.assert_close(other, one, atol=near, rtol=0)
        ours = gradients(model, objective(model, noised).sum())
        theirs = gradients(model, weighted(other, noised, model.spec.mask_id))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=20 * near * float(b.abs().max() + 1), rtol=0)


@torch.no_grad()
def test_no_leak() -> None:
    """Spec 9.3: a changed clean block leaves noisy predictions of blocks up to it; a changed noisy
    block leaves all others."""
    model, size = tiny_dit("bd3lm", 4), 4
    noised, other = noised_for(model, size), noised_for(model, size, seed=1)
    everywhere = torch.ones_like(noised.masked)
    logits = lambda b: forward.train_logits(model, b, everywhere).logits.view(ROWS, LENGTH, -1)
    reference = logits(noised)
    for block in range(LENGTH // size):
        here = torch.arange(LENGTH) // size == block
        clean = replace(noised, clean=torch.where(here, other.clean, noised.clean))
        moved = (logits(clean) - reference).abs().amax((0, 2)).view(-1, size).amax(1)
        assert bool((moved[: block + 1] == 0).all())
        assert bool((moved[block + 1 :] > 0).all())
        noisy = replace(noised, noisy=torch.where(here, other.clean, noised.noisy))
        moved = (logits(noisy) - reference).abs().amax((0, 2)).view(-1, size).amax(1)
        assert bool((moved[torch.arange(LENGTH // size) != block] == 0).all())
        assert moved[block] > 0


@torch.no_grad()
def test_block_size_one_is_autoregression() -> None:
    """Spec 1.6: all masked at L' = 1, each place is predicted from the clean places before it and
    its own mask."""
    model = tiny_dit("bd3lm", 1)
    noised = noised_for(model, 1, distribution="all")
    ours = objective(model, noised)
    for place in range(LENGTH):
        cache = model.new_cache(ROWS, LENGTH)
        before = forward.places(Contiguous(1), torch.arange(place).expand(ROWS, -1))
        if place:
            forward.extend(model, noised.clean[:, :place], before, cache)
        here = forward.places(Contiguous(1), torch.full((ROWS, 1), place))
        canvas = Canvas(
            torch.full((ROWS, 1), model.spec.mask_id), torch.ones(ROWS, 1, dtype=torch.bool), here
        )
        logits = forward.predict(model, canvas, cache).logits
        logits[:, model.spec.mask_id] = float("-inf")
        nll = -logits.log_softmax(-1).gather(1, noised.clean[:, place : place + 1])[:, 0]
        torch.testing.assert_close(ours[:, place], nll, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_block_is_mdlm() -> None:
    """Spec 1.6: L' = L computes the one-stream denoiser of the same weights; the clean stream is
    not seen."""
    ours, mdlm = tiny_dit("bd3lm", LENGTH), tiny_dit("mdlm", LENGTH)
    mdlm.load_state_dict(ours.state_dict(), strict=True)
    noised = noised_for(ours, LENGTH)
    torch.testing.assert_close(
        objective(ours, noised), objective(mdlm, noised), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_ragged_edge_equals_training() -> None:
    """A map that starts its blocks after a prompt of 3: cached predictions are those of the
    training pass on the same map."""
    model, map = tiny_dit("bd3lm", 4), Ragged(3, 4)
    noised = noised_for(model, 4)
    noised = replace(noised, layout=make_layout(map, LENGTH))
    everywhere = torch.ones_like(noised.masked)
    reference = forward.train_logits(model, noised, everywhere).logits.view(ROWS, LENGTH, -1)
    cache = model.new_cache(ROWS, LENGTH)
    for start in (0, 3, 7, 11, 15):
        stop = min(3 if start == 0 else start + 4, LENGTH)
        layout = forward.places(map, torch.arange(start, stop).expand(ROWS, -1))
        canvas = Canvas(noised.noisy[:, start:stop], everywhere[:, start:stop], layout)
        logits = forward.predict(model, canvas, cache).logits.view(ROWS, stop - start, -1)
        torch.testing.assert_close(logits, reference[:, start:stop], atol=1e-5, rtol=0)
        forward.extend(model, noised.clean[:, start:stop], layout, cache)
