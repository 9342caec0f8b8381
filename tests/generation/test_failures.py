"""One request's failure never touches another's: decoders, processors and models that raise or give
no numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bdlm.core.types import Commit, Denoiser, Step
from bdlm.generation.decoders import Decoder
from bdlm.generation.decoders.base import View
from bdlm.generation.engine import prefill
from bdlm.generation.engine.engine import Engine, generate
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.inference import for_inference
from bdlm.models.toy import Inconsistent, toy_spec
from tests.generation.test_engine import model_of, native


@dataclass(frozen=True)
class Breaks(Decoder):
    """Raises in a row whose seed is 13."""

    def choose(self, view: View) -> Any:
        assert not bool(((view.noise.seed == 13) & view.masked.any(1)).any()), "unlucky"
        return Commit(view.masked, view.drawn(view.masked))


def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise ValueError("processor broke")


processor.any_order = True  # type: ignore[attr-defined]


class SometimesNaN(Inconsistent):
    """Gives NaN to rows whose text holds two 2s in a row at the start."""

    def log_conditional(self, known: Any) -> torch.Tensor:
        log = super().log_conditional(known)
        sick = (known.ids[:, :2] == 2).all(1)
        return torch.where(sick[:, None], float("nan"), log)


def test_a_request_that_fails_fails_alone() -> None:
    model = SometimesNaN(toy_spec(4, 32))
    bad = {
        1: ([1], SamplingParams(max_new_tokens=6, decoder=Breaks(), seed=13)),
        3: ([1, 1], SamplingParams(max_new_tokens=6, logits_processor=(processor,))),
        4: ([2, 2, 1], SamplingParams(max_new_tokens=6)),
    }
    good = {
        i: (
            [0, i % 3, 1],
            SamplingParams(
                max_new_tokens=6, decoder=Breaks() if i % 2 else "first-hitting", seed=i
            ),
        )
        for i in (0, 2, 5, 6, 7)
    }
    engine = Engine(model, 4)
    for i in range(8):
        engine.submit(*(bad | good)[i])
    results = {e.request: e for e in engine.run() if e.kind == "end"}
    for i, (prompt, params) in good.items():
        assert results[i].result.token_ids == generate(model, [prompt], [params])[0].token_ids
        assert results[i].error is None
    for i, what in ((1, "unlucky"), (3, "processor broke"), (4, "not numbers")):
        assert results[i].result.finish_reason == "error"
        assert what in results[i].result.notes[-1]
        with pytest.raises(Exception, match=what):
            generate(model, [bad[i][0]], [bad[i][1]])


class Raises:
    """A model that raises after a forward pass that holds token 9, and after those with the numbers
    `at_passes`."""

    def __init__(self, inner: Denoiser, at_passes: frozenset[int] = frozenset()) -> None:
        self.inner, self.at_passes, self.passes = inner, at_passes, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, step: Step, cache: Any = None) -> Any:
        self.passes += 1
        out = self.inner.step(step, cache)
        if self.passes in self.at_passes or bool(((step.ids == 9) & (step.doc >= 0)).any()):
            raise RuntimeError("the model broke")
        return out


def telling() -> Any:
    """A model whose texts tell what lies in its cache: the head's shift and bias, which drown it,
    are zero."""
    model = native(1.0)
    head = model.backbone.output_layer
    with torch.no_grad():
        for constant in (
            head.linear.bias,
            head.adaLN_modulation.weight,
            head.adaLN_modulation.bias,
        ):
            constant.zero_()
        head.norm_final.weight.fill_(1)
    return model


def test_what_ends_a_request_and_what_is_retried_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", 8)
    engine = Engine(Raises(for_inference(telling())), 2)
    engine.submit([1] * 30 + [9] * 10, SamplingParams(max_new_tokens=4, banned_token_ids=(9,)))
    with caplog.at_level(logging.WARNING, logger="bdlm.engine"):
        (ended,) = [e for e in engine.run() if e.kind == "end"]
    assert isinstance(ended.error, RuntimeError)
    said = [record.getMessage() for record in caplog.records]
    assert [what.split(" raised")[0] for what in said[:2]] == [
        "the prefill of 1 rows",
        "a forward pass of 1 requests",
    ]
    assert said[2] == "request 0 failed"
    assert caplog.records[2].exc_info is not None
    assert caplog.records[2].exc_info[1] is ended.error


@dataclass(frozen=True)
class Spoils(Decoder):
    """Raises in `bound`, or leaves what is not a tensor for its next decision."""

    how: str = "bound"

    def bound(self, block: int) -> int:
        if self.how == "bound":
            raise ValueError("no bound")
        return block

    def choose(self, view: View) -> Commit:
        return Commit(view.masked, view.drawn(view.masked), extra={"state": 1})


@pytest.mark.parametrize(("how", "what"), [("bound", "no bound"), ("extra", "Commit.extra")])
def test_a_bound_that_raises_and_a_state_that_is_no_tensor_end_their_request(
    how: str, what: str
) -> None:
    engine = Engine(Inconsistent(toy_spec(4, 32)), 2)
    good = SamplingParams(max_new_tokens=6, seed=1)
    engine.submit([0], good)
    engine.submit([1], good.with_(decoder=Spoils(how)))
    ended = {e.request: e.result for e in engine.run() if e.result is not None}
    assert ended[1].finish_reason == "error" and what in ended[1].notes[-1]
    assert ended[0].token_ids == generate(engine.runner.model, [[0]], [good])[0].token_ids


PREFIX = [i % 7 for i in range(40)]


@pytest.mark.parametrize("kind", ["native", "dit-mdlm", "dit-ar", "hf-qwen3-shift"])
def test_a_request_that_the_model_cannot_read_fails_alone(kind: str) -> None:
    model = telling() if kind == "native" else model_of(kind)
    nine = SamplingParams(max_new_tokens=5, banned_token_ids=(9,))
    prompts = [[1, 2, 3], [1, 9, 3, 4, 5], [4, 5, 6, 7, 8, 1], [2], [9], [1, 1, 1, 1, 1]]
    engine = Engine(Raises(for_inference(model)), 3)
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, nine.with_(seed=i))
    ended = {e.request: e for e in engine.run() if e.kind == "end"}
    for i, prompt in enumerate(prompts):
        if 9 in prompt:
            assert ended[i].result.finish_reason == "error"
            assert "the model broke" in ended[i].result.notes[-1]
        else:
            alone = generate(model, [prompt], [nine.with_(seed=i)])[0]
            assert (ended[i].result.token_ids, ended[i].result.forward_passes) == (
                alone.token_ids,
                alone.forward_passes,
            )


def test_a_shared_prompt_that_the_model_cannot_read_fails_alone() -> None:
    model, params = telling(), SamplingParams(max_new_tokens=5, banned_token_ids=(9,))
    prompts = [[*PREFIX, 1], [*PREFIX, 2], [9] * 41, [9] * 42, [*PREFIX, 3]]
    engine = Engine(Raises(for_inference(model)), 4)
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, params.with_(seed=i))
    ended = {e.request: e for e in engine.run() if e.kind == "end"}
    assert [ended[i].error is not None for i in range(5)] == [False, False, True, True, False]
    for i in (0, 1, 4):
        assert (
            ended[i].result.token_ids
            == generate(model, [prompts[i]], [params.with_(seed=i)])[0].token_ids
        )


def test_a_call_that_nobody_is_to_blame_for_ends_its_requests_and_the_engine_goes_on() -> None:
    model = telling()
    params = SamplingParams(max_new_tokens=9, banned_token_ids=(9,))
    engine = Engine(Raises(for_inference(model), frozenset({3})), 2)
    for i in range(4):
        engine.submit([i], params.with_(seed=i))
    ended = {e.request: e.result for e in engine.run() if e.kind == "end"}
    assert [ended[i].finish_reason for i in range(4)] == ["error", "error", "length", "length"]
    for i in range(4):
        alone = generate(model, [[i]], [params.with_(seed=i)])[0].token_ids
        assert ended[i].token_ids == alone[: len(ended[i].token_ids)]
    with pytest.raises(RuntimeError, match="the model broke"):
        generate(
            Raises(for_inference(model), frozenset({2})),
            [[1], [2]],
            SamplingParams(max_new_tokens=4),
        )


@dataclass(frozen=True)
class PlansNothing(Decoder):
    """Raises before its first forward pass."""

    def plan(self, masked: torch.Tensor, noise: CellNoise) -> torch.Tensor:
        raise ValueError("no plan")


def test_who_joins_after_a_failure_does_not_copy_what_was_never_committed() -> None:
    model, params = telling(), SamplingParams(max_new_tokens=5)
    engine = Engine(model, 2)
    engine.submit([1], SamplingParams(max_new_tokens=5, decoder=PlansNothing()))
    for i in (1, 2):
        engine.submit([*PREFIX, i], params.with_(seed=i))
    ended = {e.request: e.result for e in engine.run() if e.kind == "end"}
    assert ended[0].finish_reason == "error"
    for i in (1, 2):
        assert (
            ended[i].token_ids
            == generate(model, [[*PREFIX, i]], [params.with_(seed=i)])[0].token_ids
        )
