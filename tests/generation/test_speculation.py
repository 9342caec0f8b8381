"""Lossless speculation writes first-hitting's text: token for token in float64, up to near ties in
float32, in fewer forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bdlm.core import randomness
from bdlm.core.errors import ConfigError
from bdlm.core.forward import extend, predict
from bdlm.core.types import CLEAN, Canvas, Denoiser, Layout, Out, Step
from bdlm.generation.decoders.base import DraftCanvases
from bdlm.generation.engine.draft_canvases import concatenate
from bdlm.generation.engine.engine import Engine, generate
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling.sampler import TOKEN
from bdlm.generation.sampling_params import RequestOutput, SamplingParams, check_fits
from bdlm.models.toy import Inconsistent, TokenCache, toy_spec
from tests.contracts.builders import randomised, tiny_dit

PROMPTS = 200


def prompts(vocab: int, seed: int = 0) -> list[list[int]]:
    """Of 1 to 6 tokens."""
    lengths = 1 + randomness.bits(seed, torch.arange(PROMPTS)).remainder(6)
    tokens = randomness.bits(seed + 1, torch.arange(PROMPTS)[:, None], torch.arange(6)).remainder(
        vocab
    )
    return [row[:n].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)]


def both(
    model: Denoiser, k: int, **options: object
) -> tuple[list[RequestOutput], list[RequestOutput]]:
    given = prompts(model.spec.vocab_size - 1)
    exact, fast = (
        generate(
            model,
            given,
            SamplingParams(max_new_tokens=10, decoder=p, options=o, **options),
            max_num_seqs=50,
        )  # type: ignore[arg-type]
        for p, o in (("first-hitting", {}), ("speculative", {"k": k}))
    )
    return exact, fast


MODELS = {
    "toy": lambda: Inconsistent(toy_spec(4, 16), spread=3.0),
    "toy_shifted": lambda: Inconsistent(replace(toy_spec(4, 16), shift=True), spread=3.0),
    "native": lambda: randomised(tiny_dit("bd3lm"), std=0.5).double(),
    "native_causal": lambda: randomised(tiny_dit("bd3lm", context="causal"), std=0.5).double(),
    "native_whole": lambda: randomised(tiny_dit("mdlm"), std=0.5).double(),
    "native_whole_told_the_time": lambda: randomised(tiny_dit("sedd"), std=0.5).double(),
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_log_probs_are_those_of_first_hitting_in_fewer_calls(name: str) -> None:
    exact, fast = both(MODELS[name](), k=3)
    assert [r.token_ids for r in fast] == [r.token_ids for r in exact]
    difference = torch.tensor([r.log_probs for r in fast]) - torch.tensor(
        [r.log_probs for r in exact]
    )
    assert float(difference.abs().max()) < 1e-5
    assert sum(r.forward_passes for r in exact) > 1.1 * sum(r.forward_passes for r in fast)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_p": 0.8},
        {"temperature": 0.0},
        {"banned_token_ids": (0, 3)},
        {"min_new_tokens": 6, "stop_token_ids": (1,)},
    ],
)
def test_sampling_parameters_reach_the_trial_canvases(options: dict[str, object]) -> None:
    exact, fast = both(MODELS["native"](), k=2, **options)
    assert [r.token_ids for r in fast] == [r.token_ids for r in exact]


def test_more_drafts_never_need_more_calls_and_none_is_first_hitting() -> None:
    model = MODELS["toy"]()
    passes = []
    for k in (0, 1, 3):
        exact, fast = both(model, k)
        assert [r.token_ids for r in fast] == [r.token_ids for r in exact]
        passes.append(sum(r.forward_passes for r in fast))
    assert passes[0] == sum(r.forward_passes for r in exact)
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] < passes[0]


def test_every_forward_counts_once_and_the_trials_beside_it_are_counted_too() -> None:
    canvases: list[int] = []

    class Watched(Inconsistent):
        def step(self, step: Step, cache: TokenCache | None = None) -> Out:
            canvases.append(len(step.group[step.group != CLEAN].unique()))
            return super().step(step, cache)

    result = generate(
        Watched(toy_spec(4, 16), spread=3.0),
        [[1]],
        SamplingParams(max_new_tokens=11, decoder="speculative"),
    )[0]
    assert result.forward_passes == len(canvases)
    assert result.num_draft_canvases == sum(canvases) - len(canvases) > 0


def test_trial_canvases_keep_within_a_memory_budget() -> None:
    model, params = (
        MODELS["native"](),
        SamplingParams(max_new_tokens=14, decoder="speculative", options={"k": 3}),
    )
    budget = 3 * model.new_cache(1, 12).nbytes + 1
    for memory in (None, budget):
        engine = Engine(model, 3, capacity=12, max_cache_bytes=memory)
        for i in range(6):
            engine.submit([1, i], params.with_(seed=i))
        ended = {e.request: e.result.token_ids for e in engine.run() if e.result is not None}
        alone = [
            generate(model, [[1, i]], [params.with_(seed=i, decoder="first-hitting", options={})])[
                0
            ].token_ids
            for i in range(6)
        ]
        assert [ended[i] for i in range(6)] == alone
        assert (engine.cache_bytes <= budget) == (memory is not None), (
            "room for trials is made where it may be"
        )


def test_canvases_side_by_side_predict_as_each_would_alone() -> None:
    model = MODELS["native"]()
    cache, place = model.new_cache(2, 16), torch.arange(8).expand(2, -1)
    start = place // 4 * 4
    done = Layout(*(x[:, :4] for x in (place, start, start, start, start, torch.zeros_like(place))))
    here = Layout(*(x[:, 4:] for x in (place, start, start, start, start, torch.zeros_like(place))))
    extend(model, torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), done, cache)
    masked = torch.ones(2, 4, dtype=torch.bool)
    canvas = Canvas(torch.full((2, 4), 10), masked, here)
    draft_masked = torch.tensor(
        [
            [[True, False, True, True], [True, False, False, True]],
            [[False, True, True, True], [False, True, False, True]],
        ]
    )
    tokens = torch.tensor([3, 1, 4, 1]).expand(2, 2, 4)
    drafts = DraftCanvases(tokens, draft_masked, draft_masked)
    noise = CellNoise(
        torch.zeros(2, dtype=torch.long), place[:, 4:], torch.zeros(2, 4, dtype=torch.long)
    )
    concatenated = predict(
        model,
        concatenate(canvas, drafts, noise, 10),
        cache,
        torch.cat((masked, draft_masked.flatten(1)), 1),
    ).logits
    assert concatenated is not None
    parts = [predict(model, canvas, cache).logits]
    for k in range(2):
        ids = torch.where(draft_masked[:, k], 10, tokens[:, k])
        parts.append(predict(model, Canvas(ids, draft_masked[:, k], here), cache).logits)
    number = (torch.arange(12) // 4).expand(2, -1)[torch.cat((masked, draft_masked.flatten(1)), 1)]
    for k, alone in enumerate(parts):
        assert alone is not None
        assert torch.allclose(concatenated[number == k], alone, atol=1e-12)


def gap(
    model: Denoiser, prompt: list[int], result: RequestOutput, seed: int, other: list[int]
) -> float:
    """How far apart, in nats, the two best candidates were at the first draw in which two texts of
    one seed differ (float64)."""
    text, size = [*prompt, *result.token_ids], model.spec.block_size
    first = next(
        i for i, (a, b) in enumerate(zip(result.token_ids, other, strict=True)) if a != b
    ) + len(prompt)
    start = first // size * size
    place = torch.arange(start, min(start + size, len(text)))[None]
    noise = CellNoise(torch.tensor([seed]), place, torch.zeros_like(place))
    order = noise.order()[0].argsort(descending=True).tolist()
    whole = torch.arange(start)[None]
    at = lambda p: Layout(
        p,
        p // size * size,
        p // size * size,
        p // size * size,
        p // size * size,
        torch.zeros_like(p),
    )
    cache = model.new_cache(1, max(start, 1))
    if start:
        extend(model, torch.tensor([text[:start]]), at(whole), cache)
    masked: Tensor = place >= len(prompt)
    for cell in order:
        if not bool(masked[0, cell]):
            continue
        ids = torch.where(
            masked, model.spec.mask_id, torch.tensor([text[start : start + place.shape[1]]])
        )
        query_mask = torch.zeros_like(masked)
        query_mask[0, cell] = True
        logits = predict(model, Canvas(ids, masked, at(place)), cache, query_mask).logits
        assert logits is not None
        if text[start + cell] != ([*prompt, *other])[start + cell]:
            noise = randomness.gumbel(
                torch.tensor(seed),
                TOKEN,
                place[0, cell],
                torch.tensor(0),
                torch.arange(logits.shape[1] - 1),
            )
            top = (logits[0, :-1].double() + noise).topk(2).values
            return (top[0] - top[1]).item()
        masked = masked & ~query_mask
    raise AssertionError("the texts do not differ")


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_flips_in_lower_precision_are_near_ties(dtype: torch.dtype, near: float) -> None:
    """Canvases of other shapes round otherwise: a text may then differ from first-hitting's, where
    two candidates were all but equal."""
    model = randomised(tiny_dit("bd3lm"), std=0.5)
    exact, fast = both(model.to(dtype), k=3)  # type: ignore[arg-type]
    double = randomised(tiny_dit("bd3lm"), std=0.5).to(dtype).double()
    flips = [
        i for i, (a, b) in enumerate(zip(exact, fast, strict=True)) if a.token_ids != b.token_ids
    ]
    assert len(flips) <= PROMPTS // 20
    for i in flips:
        apart = gap(double, prompts(10)[i], exact[i], i, fast[i].token_ids)
        assert apart < near


def test_what_speculation_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"speculative\.k"):
        SamplingParams(decoder="speculative", options={"k": -1})
    with pytest.raises(ConfigError, match=r"guidance_scale is 1\.0"):
        check_fits(SamplingParams(decoder="speculative", guidance_scale=1.0), [0], toy_spec(4, 16))
