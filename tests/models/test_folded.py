"""The folded model is the model: same logits through every call, with rows at any phase, and the same cache content."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core.calls import advance, extend, predict
from bdlm.core.types import NOWHERE, Canvas, Layout, Soft
from bdlm.models.dit import DiT
from bdlm.models.folded import Folded, fold
from tests.contracts.builders import randomised, tiny_dit

ROWS, SIZE, TOLERANCE = 3, 4, 1e-12


def both(algo: str = "bd3lm", context: str = "block") -> tuple[DiT, Any]:
    model: Any = randomised(tiny_dit(algo, context=context, length=64), std=0.5).double()
    folded = fold(model)
    assert isinstance(folded, Folded)
    return model, folded


def where(model: DiT, place: Tensor, real: Tensor) -> Layout:
    start = place // SIZE * SIZE
    doc = torch.where(real, 0, NOWHERE)
    return Layout(place, start, place if model.spec.context == "causal" else start, start, start, doc)


def run(model: Any, plain: DiT, appends: bool, lengths: list[list[int]], soft: bool = False) -> list[Tensor]:
    """Answers of a few calls. lengths[t]: how many committed cells each row has before call t; -1 for a row that is not there.

    What a row commits at a call it commits together with the prediction of its next block.
    """
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(10, (ROWS, 48), generator=draw)
    cache, found = model.new_cache(ROWS, 40), []
    before = torch.zeros(ROWS, dtype=torch.long)
    for now_ in lengths:
        now = torch.tensor(now_)
        alive = now >= 0
        wide = max(1, int((now - before).clamp(min=0).max()))
        place = before[:, None] + torch.arange(wide)
        done = where(plain, place, (place < now[:, None]) & alive[:, None])
        block = now.clamp(min=0)[:, None] + torch.arange(SIZE)
        real = alive[:, None] & (torch.arange(SIZE) < torch.tensor([SIZE, SIZE, 3])[:, None])
        masked = real & (torch.rand(ROWS, SIZE, generator=draw) < 0.7)
        masked[:, 0] = alive
        ids = torch.where(masked, 10, text.gather(1, block.clamp(max=47)))
        mixed = Soft(torch.stack((ids, torch.full_like(ids, 3)), -1), torch.tensor([0.75, 0.25]).double().expand(ROWS, SIZE, 2))
        canvas = Canvas(ids, masked, where(plain, block, real), soft=mixed if soft else None)
        if bool((now > before).any()):
            out = advance(model, text.gather(1, place.clamp(max=47)), done, canvas, cache, appends=appends)
        else:
            out = predict(model, canvas, cache, appends=appends)
        assert out.logits is not None
        found.append(out.logits)
        before = torch.where(alive, now, before)
    assert cache.slots.length.tolist() == before.tolist()
    return found


PHASES = {
    "in step": [[0] * 3, [4] * 3, [4] * 3, [8] * 3],
    "ragged prompts": [[4, 12, 8], [4, 12, 8], [8, 12, 12], [8, 16, 12]],
    "long prompts beside short ones": [[32, 4, 0], [32, 8, 0], [36, 8, 4]],
    "a row that is not there": [[4, -1, 8], [8, -1, 8], [8, -1, 12]],
    "a late row": [[4, 0, 8], [8, 28, 8], [12, 32, 8]],
}


@torch.no_grad()
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("context", ["block", "causal"])
def test_packed_calls_give_the_models_logits(phase: str, context: str) -> None:
    model, folded = both(context=context)
    for got, want in zip(run(folded, model, True, PHASES[phase]), run(model, model, False, PHASES[phase]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_mixtures_are_fed() -> None:
    model, folded = both()
    phase = PHASES["ragged prompts"]
    hard = run(model, model, False, phase)
    for got, want, other in zip(run(folded, model, True, phase, True), run(model, model, False, phase, True), hard, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
        assert not torch.allclose(want, other)


@torch.no_grad()
def test_calls_that_are_not_promised_go_to_the_model_on_the_same_cache() -> None:
    model, folded = both()
    text, place = torch.arange(12)[None].remainder(10).expand(ROWS, -1), torch.arange(12).expand(ROWS, -1)
    every = torch.ones(ROWS, 12, dtype=torch.bool)
    caches = [folded.new_cache(ROWS, 32), model.new_cache(ROWS, 32)]
    outs = []
    for m, cache in zip((folded, model), caches, strict=True):
        extend(m, text[:, :8], where(model, place[:, :8], every[:, :8]), cache, appends=m is folded)
        canvas = Canvas(torch.full((ROWS, 4), 10), every[:, :4], where(model, place[:, 8:], every[:, :4]))
        outs.append(predict(m, canvas, cache, want=frozenset({"logits", "attention", "hidden"})))
    torch.testing.assert_close(caches[0].keys[:, :, :, :8], caches[1].keys[:, :, :, :8], rtol=0, atol=TOLERANCE)
    for name in ("logits", "attention", "hidden"):
        torch.testing.assert_close(getattr(outs[0], name), getattr(outs[1], name), rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("algo", ["mdlm", "ar"])
def test_other_kinds_fold_too(algo: str) -> None:
    model, folded = both(algo)
    ids, place = torch.full((2, 6), 10), torch.arange(6).expand(2, -1)
    real = place < torch.tensor([6, 4])[:, None]
    if algo == "mdlm":
        zero = torch.zeros_like(place)
        canvas = Canvas(ids, real, Layout(place, zero, zero, zero, zero, torch.where(real, 0, NOWHERE)))
        got, want = (predict(m, canvas, None, appends=m is folded).logits for m in (folded, model))
    else:
        at = Layout(place, place, place, place, place, torch.where(real, 0, NOWHERE))
        end = real.sum(1)[:, None]
        canvas = Canvas(ids[:, :1], real[:, :1], Layout(end, end, end, end, end, torch.zeros_like(end)), previous=ids[:, 0])
        text = place.remainder(10)
        got, want = (advance(m, text, at, canvas, m.new_cache(2, 8), appends=m is folded).logits for m in (folded, model))
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_a_model_that_is_told_the_time_stays_as_it_is() -> None:
    model = tiny_dit("sedd")
    assert fold(model) is model
