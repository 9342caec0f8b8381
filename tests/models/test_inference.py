"""The inference form is the model: same logits through every call, with rows at any phase, and the
same cache content."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.forward import advance, extend, predict
from bdlm.core.types import NOWHERE, Canvas, Layout, Soft
from bdlm.generation.engine.engine import generate
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.dit import DiT
from bdlm.models.inference import InferenceDiT, for_inference
from tests.contracts.builders import randomised, tiny_dit

ROWS, SIZE, TOLERANCE = 3, 4, 1e-12


def both(algo: str = "bd3lm", context: str = "block") -> tuple[DiT, Any]:
    model: Any = randomised(tiny_dit(algo, context=context, length=64), std=0.5).double()
    inference_form = for_inference(model)
    assert isinstance(inference_form, InferenceDiT)
    return model, inference_form


def layout_of(model: DiT, place: Tensor, real: Tensor) -> Layout:
    start = place // SIZE * SIZE
    doc = torch.where(real, 0, NOWHERE)
    return Layout(
        place, start, place if model.spec.context == "causal" else start, start, start, doc
    )


def with_drafts(canvas: Canvas, canvases: list[int], draw: torch.Generator) -> Canvas:
    """Return a canvas followed by others of the same cells, in groups of their own. canvases: how
    many each row has in all."""
    most = max(canvases)
    repeated = canvas.layout.map(lambda x: x.repeat(1, most))
    number = torch.arange(most).repeat_interleave(SIZE)
    doc = torch.where(number < torch.tensor(canvases)[:, None], repeated.doc, NOWHERE)
    masked = (doc != NOWHERE) & (torch.rand(doc.shape, generator=draw) < 0.5)
    masked[:, :SIZE] = canvas.masked
    ids = torch.where(masked, 10, torch.randint(10, doc.shape, generator=draw))
    return Canvas(ids, masked, replace(repeated, group=repeated.group + number * 1000, doc=doc))


def run(
    model: Any,
    plain: DiT,
    append_only: bool,
    lengths: list[list[int]],
    soft: bool = False,
    canvases: list[int] | None = None,
    grows: bool = True,
) -> list[Tensor]:
    """Answers of a few calls. lengths[t]: how many committed cells each row has before call t; -1
    for a row that is not there.

    What a row commits in a pass it commits together with the prediction of its next block.
    canvases: as in `tried`."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(10, (ROWS, 48), generator=draw)
    cache, found = model.new_cache(ROWS, 36), []
    bytes_before = cache.nbytes
    cache.limit = None if grows else bytes_before
    before = torch.zeros(ROWS, dtype=torch.long)
    for now_ in lengths:
        now = torch.tensor(now_)
        alive = now >= 0
        width = max(1, int((now - before).clamp(min=0).max()))
        place = before[:, None] + torch.arange(width)
        done = layout_of(plain, place, (place < now[:, None]) & alive[:, None])
        block = now.clamp(min=0)[:, None] + torch.arange(SIZE)
        real = alive[:, None] & (torch.arange(SIZE) < torch.tensor([SIZE, SIZE, 3])[:, None])
        masked = real & (torch.rand(ROWS, SIZE, generator=draw) < 0.7)
        masked[:, 0] = alive
        ids = torch.where(masked, 10, text.gather(1, block.clamp(max=47)))
        mixed = Soft(
            torch.stack((ids, torch.full_like(ids, 3)), -1),
            torch.tensor([0.75, 0.25]).double().expand(ROWS, SIZE, 2),
        )
        canvas = Canvas(ids, masked, layout_of(plain, block, real), soft=mixed if soft else None)
        if canvases is not None:
            canvas = with_drafts(canvas, canvases, draw)
        if bool((now > before).any()):
            out = advance(
                model,
                text.gather(1, place.clamp(max=47)),
                done,
                canvas,
                cache,
                append_only=append_only,
            )
        else:
            out = predict(model, canvas, cache, append_only=append_only)
        assert out.logits is not None
        found.append(out.logits)
        before = torch.where(alive, now, before)
    assert cache.slots.length.tolist() == before.tolist()
    assert grows or cache.nbytes == bytes_before
    return found


PHASES = {
    "in step": [[0] * 3, [4] * 3, [4] * 3, [8] * 3],
    "ragged prompts": [[4, 12, 8], [4, 12, 8], [8, 12, 12], [8, 16, 12]],
    "long prompts with short ones": [[32, 4, 0], [32, 8, 0], [36, 8, 4]],
    "a row that is not there": [[4, -1, 8], [8, -1, 8], [8, -1, 12]],
    "a late row": [[4, 0, 8], [8, 28, 8], [12, 32, 8]],
}


@torch.no_grad()
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("context", ["block", "causal"])
def test_packed_calls_give_the_models_logits(phase: str, context: str) -> None:
    model, inference_form = both(context=context)
    for got, reference in zip(
        run(inference_form, model, True, PHASES[phase]),
        run(model, model, False, PHASES[phase]),
        strict=True,
    ):
        torch.testing.assert_close(got, reference, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "canvases", [[3, 3, 3], [1, 4, 2]], ids=["as many in each row", "more in some"]
)
@pytest.mark.parametrize("grows", [True, False], ids=["room is made", "no room"])
def test_canvases_side_by_side_are_packed_too(phase: str, canvases: list[int], grows: bool) -> None:
    model, inference_form = both()
    calls = (
        run(inference_form, model, True, PHASES[phase], False, canvases, grows),
        run(model, model, False, PHASES[phase], False, canvases),
    )
    for got, reference in zip(*calls, strict=True):
        torch.testing.assert_close(got, reference, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_the_model_itself_makes_calls_only_where_the_cache_may_not_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inference_form = both()
    own: list[int] = []
    step = DiT.step
    monkeypatch.setattr(DiT, "step", lambda self, *a: own.append(1) or step(self, *a))
    phase = PHASES["long prompts with short ones"]
    run(inference_form, model, True, phase, canvases=[4, 4, 4])
    assert not own
    run(inference_form, model, True, phase, canvases=[4, 4, 4], grows=False)
    assert own


@torch.no_grad()
def test_mixtures_are_fed() -> None:
    model, inference_form = both()
    phase = PHASES["ragged prompts"]
    hard = run(model, model, False, phase)
    for got, reference, other in zip(
        run(inference_form, model, True, phase, True),
        run(model, model, False, phase, True),
        hard,
        strict=True,
    ):
        torch.testing.assert_close(got, reference, rtol=0, atol=TOLERANCE)
        assert not torch.allclose(reference, other)


@torch.no_grad()
def test_calls_that_are_not_promised_go_to_the_model_on_the_same_cache() -> None:
    model, inference_form = both()
    text, place = (
        torch.arange(12)[None].remainder(10).expand(ROWS, -1),
        torch.arange(12).expand(ROWS, -1),
    )
    every = torch.ones(ROWS, 12, dtype=torch.bool)
    caches = [inference_form.new_cache(ROWS, 32), model.new_cache(ROWS, 32)]
    outs = []
    for m, cache in zip((inference_form, model), caches, strict=True):
        extend(
            m,
            text[:, :8],
            layout_of(model, place[:, :8], every[:, :8]),
            cache,
            append_only=m is inference_form,
        )
        canvas = Canvas(
            torch.full((ROWS, 4), 10), every[:, :4], layout_of(model, place[:, 8:], every[:, :4])
        )
        outs.append(predict(m, canvas, cache, outputs=frozenset({"logits", "attention", "hidden"})))
    torch.testing.assert_close(
        caches[0].keys[:, :, :, :8], caches[1].keys[:, :, :, :8], rtol=0, atol=TOLERANCE
    )
    for name in ("logits", "attention", "hidden"):
        torch.testing.assert_close(
            getattr(outs[0], name), getattr(outs[1], name), rtol=0, atol=TOLERANCE
        )


@torch.no_grad()
@pytest.mark.parametrize("algo", ["mdlm", "ar"])
def test_other_kinds_fold_too(algo: str) -> None:
    model, inference_form = both(algo)
    ids, place = torch.full((2, 6), 10), torch.arange(6).expand(2, -1)
    real = place < torch.tensor([6, 4])[:, None]
    if algo == "mdlm":
        zero = torch.zeros_like(place)
        canvas = Canvas(
            ids, real, Layout(place, zero, zero, zero, zero, torch.where(real, 0, NOWHERE))
        )
        got, reference = (
            predict(m, canvas, None, append_only=m is inference_form).logits
            for m in (inference_form, model)
        )
    else:
        at = Layout(place, place, place, place, place, torch.where(real, 0, NOWHERE))
        end = real.sum(1)[:, None]
        canvas = Canvas(
            ids[:, :1],
            real[:, :1],
            Layout(end, end, end, end, end, torch.zeros_like(end)),
            previous=ids[:, 0],
        )
        text = place.remainder(10)
        got, reference = (
            advance(m, text, at, canvas, m.new_cache(2, 8), append_only=m is inference_form).logits
            for m in (inference_form, model)
        )
    torch.testing.assert_close(got, reference, rtol=0, atol=TOLERANCE)


def test_a_model_that_is_told_the_time_stays_as_it_is() -> None:
    model = tiny_dit("sedd")
    assert for_inference(model) is model


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_a_compiled_model_writes_the_same_text() -> None:
    model = randomised(tiny_dit("bd3lm", length=64), std=0.5).double()
    params = SamplingParams(max_new_tokens=13, seed=3)
    texts = [
        generate(for_inference(model, compile), [[1], [2, 3, 4, 5, 6]], params)
        for compile in (False, True)
    ]
    assert [r.token_ids for r in texts[0]] == [r.token_ids for r in texts[1]]
    for plain, compiled in zip(*texts, strict=True):
        torch.testing.assert_close(
            torch.tensor(compiled.log_probs), torch.tensor(plain.log_probs), rtol=0, atol=1e-5
        )


def test_what_cannot_be_compiled_says_so() -> None:
    with pytest.raises(ConfigError, match="compile is True, but only native models"):
        for_inference(tiny_dit("sedd"), compile=True)
