"""Long prompts are committed in chunks, with the result of one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bdlm.core.errors import ConfigError
from bdlm.core.types import Step
from bdlm.generation import prefill, scheduler
from bdlm.generation.engine.engine import Engine, generate
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.inference import fold
from tests.models.test_model_folder import tiny
from tests.models.tiny_hf import MASK
from tests.models.tiny_hf import tiny as tiny_hf

MODELS = {
    "bd3lm": lambda: tiny(model_length=256),
    "ar": lambda: tiny("ar", model_length=256),
    "hf-shift-causal": lambda: tiny_hf(
        "llama", mask_id=MASK, block_size=4, shift=True, context="causal"
    ),
    "hf-blocks": lambda: tiny_hf("qwen3", mask_id=MASK, block_size=4),
}


def prompts(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(16, (n,), generator=draw).tolist() for n in lengths]


def chunked(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(prefill, "CHUNK", size)
    monkeypatch.setattr(scheduler, "CHUNK", size)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [3, 8, 13])
def test_chunks_give_the_result_of_one_pass(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = MODELS[name](), prompts(50, 7, 33, 21)
    params = SamplingParams(max_new_tokens=9, seed=5, temperature=0.7)
    whole = generate(model, texts, params)
    chunked(monkeypatch, size)
    parts = generate(model, texts, params)
    for a, b in zip(whole, parts, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(
            torch.tensor(a.log_probs), torch.tensor(b.log_probs), atol=1e-4, rtol=0
        )


def test_no_pass_is_wider_than_a_chunk_and_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 8)
    model = fold(tiny(model_length=256))
    widths: list[int] = []
    step = type(model).step

    def watched(self: Any, given: Step, cache: Any = None) -> Any:
        widths.append(given.shape[1])
        return step(self, given, cache)

    monkeypatch.setattr(type(model), "step", watched)
    generate(model, prompts(200), SamplingParams(max_new_tokens=4))
    # shared: one commits for all
    generate(model, prompts(100) * 3, SamplingParams(max_new_tokens=4), rows=3)
    assert len(widths) > 200 // 8 and max(widths) <= 8 + 4


def test_calls_count_for_the_texts_that_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = (
        tiny(model_length=256),
        SamplingParams(max_new_tokens=8, decoder="left-to-right"),
    )
    alone = generate(model, prompts(4), params)[0].forward_passes
    chunked(monkeypatch, 8)
    short, long = generate(model, [*prompts(4), *prompts(100)], [params, params])
    assert short.forward_passes == alone
    # 100 cells are 25 blocks: 12 chunks of 2, and the last with the first step
    assert long.forward_passes == alone + 12


@pytest.mark.parametrize("bitwise", [False, True])
def test_rows_in_company_are_written_as_alone(
    bitwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch, 8)
    model, texts = tiny(model_length=256), prompts(60, 9, 41)

    def written(chosen: list[int]) -> dict[int, Any]:
        engine = Engine(model, rows=3, capacity=128, bitwise=bitwise)
        numbers = {
            engine.submit(texts[i], SamplingParams(max_new_tokens=8, seed=i)): i for i in chosen
        }
        ends = [e for e in engine.run() if e.kind == "end"]
        return {numbers[e.request]: e.result for e in ends}

    together = written([0, 1, 2])
    for i in range(3):
        own = written([i])[i]
        assert together[i].tokens == own.tokens and together[i].forward_passes == own.forward_passes
        if bitwise:
            assert together[i].log_probs == own.log_probs


def test_a_model_that_raises_fails_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 8)
    model = fold(tiny(model_length=256))
    step = type(model).step

    def poisoned(self: Any, given: Step, cache: Any = None) -> Any:
        if bool(((given.ids == 15) & (given.doc >= 0)).any()):
            raise ValueError("cannot read 15")
        return step(self, given, cache)

    monkeypatch.setattr(type(model), "step", poisoned)
    good, bad = [3] * 40, [3] * 30 + [15] + [3] * 9
    engine = Engine(model, rows=2, capacity=64)
    numbers = [
        engine.submit(ids, SamplingParams(max_new_tokens=4, banned_token_ids=(15,)))
        for ids in (good, bad)
    ]
    ends = {e.request: e for e in engine.run() if e.kind == "end"}
    assert ends[numbers[0]].error is None and len(ends[numbers[0]].result.token_ids) == 4
    assert isinstance(ends[numbers[1]].error, ValueError)


# -- memory follows the text, not what was allowed -------------------------------------------------


def test_a_large_window_takes_the_memory_of_the_text() -> None:
    model, params = tiny(), SamplingParams(max_new_tokens=4)
    small, large = (Engine(model, 1, capacity=12, window=w).nbytes for w in (None, 10**6))
    assert small == large
    assert (
        generate(model, prompts(8), params, context_window=10**6)[0].token_ids
        == generate(model, prompts(8), params)[0].token_ids
    )


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("tokens", [10**12, 10**30])
def test_more_tokens_than_any_memory_holds_are_refused(window: int | None, tokens: int) -> None:
    with pytest.raises(ConfigError, match=r"needs .* GB, but cpu has") as caught:
        generate(tiny(), prompts(8), SamplingParams(max_new_tokens=tokens), context_window=window)
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_a_rows_room_is_refused_under_a_window() -> None:
    engine = Engine(tiny(), rows=1, capacity=16, window=64)
    with pytest.raises(ConfigError, match="the window holds 16"):
        engine.submit(prompts(40)[0], SamplingParams(max_new_tokens=4))
