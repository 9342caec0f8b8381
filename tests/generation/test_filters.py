"""Temperature to its limits, min-p, and bans that hold whatever a processor returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.commands.generate import Options, _request
from bdlm.core.errors import BdlmError, ConfigError
from bdlm.core.types import Denoiser
from bdlm.generation.engine.engine import Engine, generate
from bdlm.generation.full_sequence.engine import generate_full_sequence
from bdlm.generation.sampling import logits_filters as ours
from bdlm.generation.sampling.sampler import draw
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.toy import Inconsistent, toy_spec
from tests.contracts.builders import randomised, tiny_dit
from tests.generation.worlds import FALSE_ALARM, p_value

MODEL = Inconsistent(toy_spec(4, 16))  # three tokens, 0 to 2, and the mask, 3


def whole() -> Denoiser:
    return randomised(tiny_dit("mdlm"), std=0.7).double()  # type: ignore[return-value]


def heat(*temperatures: float) -> Tensor:
    return torch.tensor([ours.clamp_temperature(t) for t in temperatures])


# -- temperature -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 1e-4, 1e-6, 1e-30, 1e-38, 1e-40, 1e-45, 1e-300])
def test_a_small_temperature_is_greedy_in_every_precision(
    temperature: float, dtype: torch.dtype
) -> None:
    # 50 values 1 apart: no ties
    spread = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).argsort(1)
    logits = (30.0 + spread).to(dtype).masked_fill(spread % 7 == 0, ours.NEVER)
    tempered = ours.temper(logits, heat(temperature).expand(40))
    assert bool((tempered < float("inf")).all()) and torch.equal(
        tempered == ours.NEVER, (logits == ours.NEVER) | (tempered == ours.NEVER)
    )
    cells = torch.arange(40)
    drawn = draw(tempered, cells, cells, cells, heat(temperature).expand(40) == 0)
    assert torch.equal(drawn, logits.argmax(1))


def test_a_usual_temperature_divides_as_it_did() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours.temper(logits, torch.full((5,), 0.7)), logits / 0.7)
    half = logits.half()
    assert torch.equal(ours.temper(half, torch.full((5,), 0.7)), half.float() / 0.7)


@pytest.mark.parametrize("temperature", [3.3e38, 3.5e38, 1e300])
def test_a_great_temperature_is_uniform_over_what_is_allowed(temperature: float) -> None:
    results = generate(
        MODEL,
        [[0]] * 600,
        SamplingParams(max_new_tokens=3, temperature=temperature, banned_token_ids=(1,)),
        max_num_seqs=100,
    )
    tokens = torch.tensor([t for r in results for t in r.token_ids])
    assert p_value(tokens.bincount(minlength=3), torch.tensor([0.5, 0.0, 0.5])) > FALSE_ALARM


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-40, 1e-310])
def test_texts_at_a_small_temperature_are_those_at_zero(temperature: float) -> None:
    for model in (MODEL, whole()):
        texts = [
            [
                r.token_ids
                for r in generate(
                    model, [[1], [0, 2], [2]], SamplingParams(max_new_tokens=6, temperature=t)
                )
            ]
            for t in (0.0, temperature)
        ]
        assert texts[0] == texts[1]
    kept = [
        generate_full_sequence(
            whole(), [[1]], SamplingParams(max_new_tokens=6, temperature=t), "none"
        )[0].token_ids
        for t in (0.0, temperature)
    ]
    assert kept[0] == kept[1]


# -- min-p -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.9, 1.0])
def test_min_p_is_transformers_min_p(share: float, dtype: torch.dtype) -> None:
    from transformers import MinPLogitsWarper

    logits = 3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(2), dtype=dtype)
    theirs = MinPLogitsWarper(min_p=share)(None, logits.clone())
    assert torch.equal(ours.min_p(logits, share), theirs)
    assert bool((theirs == ours.NEVER).any()) == (share > 0)


def test_min_p_of_each_row_comes_after_temperature() -> None:
    from transformers import MinPLogitsWarper

    pairs = [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5), (0.6, 2.0), (1.0, 1.0)]
    rows = [
        SamplingParams(max_new_tokens=9, min_p=p, temperature=t, seed=i)
        for i, (p, t) in enumerate(pairs)
    ]
    together = [r.token_ids for r in generate(MODEL, [[0, 1]] * 5, rows)]
    assert together == [generate(MODEL, [[0, 1]], [own])[0].token_ids for own in rows]
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    share, temperature = (torch.tensor(x) for x in zip(*pairs, strict=True))
    cut = ours.min_p(ours.temper(logits, temperature), share)
    for line, own, (p, t) in zip(cut, logits, pairs, strict=True):
        assert torch.equal(line, MinPLogitsWarper(min_p=p)(None, own[None] / t)[0])
    seeds = range(20)
    greedy = generate(MODEL, [[0, 1]], SamplingParams(max_new_tokens=9, temperature=0.0))[
        0
    ].token_ids
    most = [
        generate(
            MODEL,
            [[0, 1]],
            SamplingParams(max_new_tokens=9, min_p=1.0, seed=s, decoder="left-to-right"),
        )[0].token_ids
        for s in seeds
    ]
    first = generate(
        MODEL, [[0, 1]], SamplingParams(max_new_tokens=9, temperature=0.0, decoder="left-to-right")
    )[0].token_ids
    assert len(greedy) == 9 and most == [first] * 20


def test_the_command_line_hands_min_p_on() -> None:
    assert _request(Options("a model", min_p=0.2))["min_p"] == 0.2


def test_min_p_out_of_range_is_named() -> None:
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="min_p"):
            SamplingParams(min_p=bad)


# -- bans ------------------------------------------------------------------------------------------


def scores_like(value: float) -> Any:
    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, value)

    processor.any_order = True  # type: ignore[attr-defined]
    return processor


@pytest.mark.parametrize(
    "name", ["first-hitting", "threshold", "eb", "edit", "wino", "klass", "remdm", "credit"]
)
def test_what_is_banned_stays_so_after_a_processor(name: str) -> None:
    params = SamplingParams(
        max_new_tokens=8,
        decoder=name,
        banned_token_ids=(1,),
        logits_processor=(scores_like(0.0),),
        stop_token_ids=(2,),
        min_new_tokens=8,
    )
    if name == "wino":  # it tries canvases, which processors cannot follow
        params = params.with_(logits_processor=())
    for result in generate(MODEL, [[0]] * 20, params):
        assert result.token_ids == [0] * 8, "1 is forbidden, 2 ends the text, 3 is the mask"


class FlatWarper:
    """Stands last and counts as a filter by its name."""

    any_order = True

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores)


def test_what_is_banned_stays_so_after_a_warper() -> None:
    for result in generate(
        MODEL,
        [[0]] * 20,
        SamplingParams(max_new_tokens=8, banned_token_ids=(1,), logits_processor=(FlatWarper(),)),
    ):
        assert set(result.token_ids) <= {0, 2}


class NaNWarper(FlatWarper):
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("nan"))


NOTHING: dict[str, SamplingParams] = {
    "all but the stop token": SamplingParams(
        max_new_tokens=5, allowed_token_ids=(2,), stop_token_ids=(2,), min_new_tokens=5
    ),
    "the stop tokens and the forbidden ones": SamplingParams(
        max_new_tokens=5, banned_token_ids=(0,), stop_token_ids=(1, 2), min_new_tokens=1
    ),
    "a processor's NaN": SamplingParams(
        max_new_tokens=5, logits_processor=(scores_like(float("nan")),)
    ),
    "a processor's -inf": SamplingParams(
        max_new_tokens=5, logits_processor=(scores_like(ours.NEVER),)
    ),
    "a warper's NaN": SamplingParams(max_new_tokens=5, logits_processor=(NaNWarper(),)),
}


@pytest.mark.parametrize(
    "name", ["first-hitting", "threshold", "eb", "left-to-right", "speculative", "wino"]
)
@pytest.mark.parametrize("what", NOTHING)
def test_a_row_without_a_token_to_write_fails_alone(what: str, name: str) -> None:
    bad = replace(NOTHING[what], decoder=name, options={})
    if bad.logits_processor and name in ("speculative", "wino"):
        bad = bad.with_(decoder="fixed-k", options={})
    good = SamplingParams(max_new_tokens=5, decoder=name, seed=3)
    engine = Engine(MODEL, 3)
    for params in (good, bad, good):
        engine.submit([0], params)
    ended = {e.request: e for e in engine.run() if e.result is not None}
    assert ended[1].result.finish_reason == "error" and ended[1].result.token_ids == []
    assert isinstance(
        ended[1].error, ConfigError
    ) and "no token can be written as new token" in str(ended[1].error)
    assert "\n" not in str(ended[1].error)
    alone = generate(MODEL, [[0]], [good])[0].token_ids
    assert ended[0].result.token_ids == ended[2].result.token_ids == alone
    with pytest.raises(BdlmError, match="no token can be written"):
        generate(MODEL, [[0]], [bad])


@pytest.mark.parametrize("name", ["first-hitting", "threshold"])
def test_writing_under_a_cache_says_so_too(name: str) -> None:
    bad = SamplingParams(
        max_new_tokens=5,
        allowed_token_ids=(2,),
        stop_token_ids=(2,),
        min_new_tokens=5,
        decoder=name,
    )
    with pytest.raises(ConfigError, match="no token can be written as new token 0"):
        generate_full_sequence(whole(), [[1]], bad, "none")
