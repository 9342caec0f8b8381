"""What a request may ask for: infilling, bans, processors, guidance, stops, retries; and clear
errors before any forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous
from bdlm.core.errors import BdlmError, ConfigError
from bdlm.core.forward import extend, layout_at, predict
from bdlm.core.types import Canvas, ModelSpec
from bdlm.generation.engine.engine import Engine, generate, stream
from bdlm.generation.engine.stopping import TextSearch
from bdlm.generation.engine.streaming import feed
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling_params import RequestOutput, SamplingParams, sampling_params
from bdlm.models.toy import Inconsistent, JointTable, toy_spec
from tests.contracts.builders import randomised, tiny_dit
from tests.generation.worlds import FALSE_ALARM, conditional, counted, p_value

SAMPLES = 8000


def native(algo: str = "bd3lm") -> Any:
    return randomised(tiny_dit(algo, length=64), std=0.25).double()


def one(model: Any, prompt: list[int], **options: Any) -> RequestOutput:
    return generate(model, [prompt], [SamplingParams(**options)])[0]


# -- given cells -----------------------------------------------------------------------------------


def posterior(table: JointTable, known: dict[int, int]) -> dict[tuple[int, ...], float]:
    """p(text | known tokens), from the table."""
    distribution = {
        tuple(t): float(table.log_joint[tuple(t)].exp())
        for t in table.texts.tolist()
        if all(t[i] == v for i, v in known.items())
    }
    return {t: p / sum(distribution.values()) for t, p in distribution.items()}


@pytest.mark.parametrize("over", ["gap", "text"])
def test_one_block_over_the_gap_samples_the_posterior(over: str) -> None:
    table = JointTable.random(toy_spec(2), seed=11)
    distribution = posterior(table, {0: 1, 3: 2})
    mode: Any = over
    params = SamplingParams(max_new_tokens=3, known_tokens={2: 2}, infill_mode=mode)
    results = generate(table, [[1]] * SAMPLES, params)
    counts, probs = counted([[1, *r.token_ids] for r in results], distribution)
    assert p_value(counts, probs) > FALSE_ALARM
    assert results[0].notes == ()
    assert results[0].log_probs[2] == 0


def test_given_cells_of_later_blocks_are_forced_and_the_result_says_so() -> None:
    table = JointTable.random(toy_spec(2), seed=11)
    results = generate(
        table, [[1]] * SAMPLES, SamplingParams(max_new_tokens=3, known_tokens={2: 2})
    )
    assert all(r.token_ids[2] == 2 for r in results)
    assert "forced when reached" in results[0].notes[0]
    first, distribution = conditional(table, {0: 1}, 1), {}
    for a in range(3):
        for b, p in enumerate(conditional(table, {0: 1, 1: a, 3: 2}, 2).tolist()):
            distribution[(1, a, b, 2)] = float(first[a]) * p
    counts, probs = counted([[1, *r.token_ids] for r in results], distribution)
    assert p_value(counts, probs) > FALSE_ALARM
    assert (
        p_value(
            counts,
            torch.tensor(
                [posterior(table, {0: 1, 3: 2})[t] for t in distribution], dtype=torch.float64
            ),
        )
        < FALSE_ALARM
    )


def test_blocks_that_are_given_whole_cost_no_call() -> None:
    model = native()
    given = {i: i % 10 for i in range(3, 14)}
    result = one(model, [1, 2, 3], max_new_tokens=20, known_tokens=given, seed=4)
    assert [result.token_ids[i] for i in given] == list(given.values())
    assert result.forward_passes == 20 - len(given)
    through = one(model, [1, 2, 3, *result.token_ids[:14]], max_new_tokens=6, seed=4)
    assert through.token_ids == result.token_ids[14:]


# -- tokens that may be written --------------------------------------------------------------------


def test_forbidden_and_allowed_tokens_hold_for_their_row_alone() -> None:
    model = native()
    plain, banned, few = generate(
        model,
        [[1]] * 3,
        [
            SamplingParams(max_new_tokens=30, **o)
            for o in ({}, {"banned_token_ids": (2, 3)}, {"allowed_token_ids": (4, 5)})
        ],
    )  # type: ignore[arg-type]
    assert not {2, 3} & set(banned.token_ids)
    assert set(few.token_ids) <= {4, 5}
    assert {2, 3} & set(plain.token_ids)
    assert plain.token_ids == one(model, [1], max_new_tokens=30).token_ids


def test_stop_tokens_end_the_text_but_not_before_min_new_tokens() -> None:
    model = Inconsistent(toy_spec(4, 64))
    free = one(model, [1], max_new_tokens=30, seed=2)
    first = free.token_ids.index(2)
    ended = one(model, [1], max_new_tokens=30, seed=2, stop_token_ids=(2,))
    assert ended.token_ids == free.token_ids[:first]
    assert ended.finish_reason == "stop_token"
    late = one(model, [1], max_new_tokens=30, seed=2, stop_token_ids=(2,), min_new_tokens=12)
    assert len(late.token_ids) >= 12
    assert 2 not in late.token_ids


def test_stop_strings_are_found_across_block_borders() -> None:
    model, decode = Inconsistent(toy_spec(4, 64)), lambda ids: "".join("abc"[i] for i in ids)
    free = generate(model, [[1]], [SamplingParams(max_new_tokens=40, seed=5)], decode=decode)[0]
    text = decode(free.token_ids)
    for at in (2, 6, 10):  # first new cell is cell 1: these pairs lie on both sides of a border
        stop = text[at : at + 3]
        cut = text.index(stop)
        result = generate(
            model, [[1]], [SamplingParams(max_new_tokens=40, seed=5, stop=(stop,))], decode=decode
        )[0]
        assert decode(result.token_ids).startswith(text[:cut])
        assert len(result.token_ids) <= cut + 3
        assert result.finish_reason == "stop_text"


def test_a_text_of_low_entropy_is_written_anew_at_most_so_often() -> None:
    model = Inconsistent(toy_spec(4, 64))
    options: dict[str, Any] = {"max_new_tokens": 16, "min_entropy": 1.0, "entropy_window": 8}
    never = one(model, [1], **(options | {"min_entropy": 1.2}), retries=2)  # more than ln 3
    assert (
        never.finish_reason == "low_entropy"
        and never.retries == 2
        and never.forward_passes == 3 * 8 + 3 * 0 - 0
    ) or never.retries == 2
    seeds = [
        s for s in range(40) if one(model, [1], **options, seed=s).finish_reason == "low_entropy"
    ]
    assert seeds, "no text of low entropy to begin with"
    again = [one(model, [1], **options, seed=s, retries=20) for s in seeds[:5]]
    assert any(
        r.finish_reason == "length" and 1 <= r.retries <= 20 and len(r.token_ids) == 16
        for r in again
    )
    events = list(stream(model, [1], SamplingParams(**options, seed=seeds[0], retries=1)))
    assert [e.kind for e in events if e.kind in ("retry", "end")] == ["retry", "end"]


# -- transformers' processors and streamers --------------------------------------------------------


class Favour:
    """Adds to token 3; reads nothing else."""

    any_order = True

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 3] += 100
        return scores


def test_processors_that_do_not_mind_the_order_shape_their_row_alone() -> None:
    from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor, TopKLogitsWarper

    model = native()
    plain = one(model, [1], max_new_tokens=9)
    favoured, also = generate(
        model,
        [[1]] * 2,
        [
            SamplingParams(max_new_tokens=9, logits_processor=(Favour(),)),
            SamplingParams(max_new_tokens=9),
        ],
    )
    assert favoured.token_ids == [3] * 9
    assert also.token_ids == plain.token_ids
    off = LogitsProcessorList([SuppressTokensLogitsProcessor([3]), TopKLogitsWarper(5)])
    assert 3 not in one(model, [1], max_new_tokens=9, logits_processor=tuple(off)).token_ids
    assert (
        len(set(one(model, [1], max_new_tokens=9, logits_processor=(OnceOnly(),)).token_ids) - {1})
        == 9
    )


def test_processors_that_read_from_the_left_are_refused_unless_writing_is() -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    model, params = (
        native(),
        {
            "max_new_tokens": 12,
            "logits_processor": (NoRepeatNGramLogitsProcessor(1),),
        },
    )
    with pytest.raises(ConfigError, match="NoRepeatNGramLogitsProcessor"):
        one(model, [1], **params)
    params["max_new_tokens"] = 8
    result = one(model, [1], **params, decoder="left-to-right")
    assert len({1, *result.token_ids}) == 9


class OnceOnly:
    """Forbids what is known anywhere in the text."""

    any_order = True

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, ids, float("-inf"))


class Recorder:
    """What a transformers TextDiffusionStreamer is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[int]]] = []

    def put(self, value: Tensor) -> None:
        self.told.append(("put", value.flatten().tolist()))

    def put_draft(self, value: Tensor, **_: Any) -> None:
        self.told.append(("draft", value.flatten().tolist()))

    def end(self) -> None:
        self.told.append(("end", []))


def test_a_text_diffusion_streamer_is_fed_as_transformers_feeds_it() -> None:
    model, params = native(), SamplingParams(max_new_tokens=9, seed=1)
    recorder = Recorder()
    result = feed(recorder, [1, 2, 3], stream(model, [1, 2, 3], params), mask_id=10)
    kinds = [kind for kind, _ in recorder.told]
    assert recorder.told[0] == ("put", [1, 2, 3])
    assert kinds[-1] == "end"
    assert [t for kind, ids in recorder.told[1:] for t in ids if kind == "put"] == result.token_ids
    assert kinds.count("draft") == 9
    assert len(next(ids for kind, ids in recorder.told if kind == "draft")) == 1


def test_transformers_own_streamer_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextDiffusionStreamer

    class Letters:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join("abcdefghij_"[int(i)] for i in ids)

    streamer = TextDiffusionStreamer(Letters(), skip_prompt=True)
    result = feed(
        streamer, [1, 2], stream(native(), [1, 2], SamplingParams(max_new_tokens=6)), mask_id=10
    )
    assert result is not None
    assert Letters().decode(result.token_ids)[-2:] in capsys.readouterr().out


# -- guidance --------------------------------------------------------------------------------------


def test_guidance_is_the_law_of_both_prompts() -> None:
    table = JointTable.random(toy_spec(1), seed=6)
    with_prompt = conditional(table, {0: 1, 1: 2}, 2)
    without = conditional(table, {0: 0, 1: 0}, 2)
    distribution = ((1 + 0.7) * with_prompt.log() - 0.7 * without.log()).softmax(0)
    params = SamplingParams(max_new_tokens=1, guidance_scale=0.7, negative_prompt_ids=(0, 0))
    counts, probs = counted(
        [r.token_ids for r in generate(table, [[1, 2]] * SAMPLES, params)],
        {(t,): float(distribution[t]) for t in range(3)},
    )
    assert p_value(counts, probs) > FALSE_ALARM


@pytest.mark.parametrize("negative", [(), (3,), (3, 4, 5, 6, 7, 8)])
def test_unconditional_rows_follow_their_requests(negative: tuple[int, ...]) -> None:
    model = native()
    guided = SamplingParams(
        max_new_tokens=11, guidance_scale=5.0, negative_prompt_ids=negative, seed=3
    )
    submitted = [
        ([1, 2, 3, 4, 5], guided),
        ([1], SamplingParams(max_new_tokens=7, seed=4)),
        ([2, 2, 2, 2, 2, 2, 2], guided),
    ]
    alone = [generate(model, [p], [q])[0].token_ids for p, q in submitted]
    assert [
        r.token_ids
        for r in generate(
            model, [p for p, _ in submitted], [q for _, q in submitted], max_num_seqs=3
        )
    ] == alone
    assert (
        alone[0]
        != generate(model, [submitted[0][0]], [replace(guided, guidance_scale=0.0)])[0].token_ids
    )
    same = generate(
        model, [[1, 2, 3, 4, 5]], [replace(guided, negative_prompt_ids=(1, 2, 3, 4, 5))]
    )[0]
    assert (
        same.token_ids
        == generate(model, [[1, 2, 3, 4, 5]], [replace(guided, guidance_scale=0.0)])[0].token_ids
    ), "against itself nothing changes"


def test_guidance_without_a_negative_prompt_is_against_no_prompt() -> None:
    """The unconditional row's distribution is that of the same places with nothing before them: by
    hand from the model, in float64."""
    model, weight, prompt, size = native().double(), 1.5, [1, 2, 3, 4, 5, 6, 7, 8], 4
    place = torch.arange(8, 12)[None]
    cells = lambda p, real=None: layout_at(Contiguous(size), p, real)
    canvas = Canvas(
        torch.full((1, size), model.spec.mask_id),
        torch.ones(1, size, dtype=torch.bool),
        cells(place),
    )
    cache = model.new_cache(1, 12)
    for start in (0, 4):
        extend(
            model,
            torch.tensor([prompt[start : start + 4]]),
            cells(torch.arange(start, start + 4)[None]),
            cache,
        )
    with torch.no_grad():
        answers = [predict(model, canvas, held).logits for held in (cache, model.new_cache(1, 12))]
    own, bare = (x[:, : model.spec.mask_id].log_softmax(-1) for x in answers)
    distribution = ((1 + weight) * own - weight * bare).log_softmax(-1)
    # alone, and in slots where others were
    for prompts, rows in (([prompt], 2), ([[3] * 8, [4] * 6, prompt], 2)):
        each = [SamplingParams(max_new_tokens=4, seed=3)] * (len(prompts) - 1) + [
            SamplingParams(max_new_tokens=4, seed=7, guidance_scale=weight)
        ]
        result = generate(model, prompts, each, max_num_seqs=rows)[-1]
        first = int(CellNoise(torch.tensor([7]), place, torch.zeros_like(place)).order().argmax())
        assert result.log_probs[first] == pytest.approx(
            float(distribution[first, result.token_ids[first]]), abs=1e-5
        )


def test_a_row_without_a_block_size_has_the_models_own_whoever_stands_first() -> None:
    plain, small = (
        SamplingParams(max_new_tokens=24, seed=1),
        SamplingParams(max_new_tokens=24, seed=1, block_size=2),
    )
    model = native()
    alone = [generate(model, [[1, 2, 3]], [q])[0].log_probs for q in (plain, small)]
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)
    for order in ([0, 1], [1, 0]):
        results = generate(model, [[1, 2, 3]] * 2, [(plain, small)[i] for i in order])
        assert [r.log_probs for r in results] == [pytest.approx(alone[i], abs=1e-5) for i in order]


@pytest.mark.parametrize(("floor", "count"), [(0, 3), (2, 3), (3, 6), (4, 6), (6, None)])
def test_stop_strings_that_are_complete_before_the_floor_do_not_count(
    floor: int, count: int | None
) -> None:
    for cut in (0, 1, 4):
        search = TextSearch(lambda ids: "".join("abc"[i] for i in ids), [], ("bc",), floor)
        search.push([0, 1, 2, 0, 1, 2, 0][:cut])
        search.push([0, 1, 2, 0, 1, 2, 0][cut:])
        assert search.end == count


# -- errors ----------------------------------------------------------------------------------------


class Untouchable(Inconsistent):
    def step(self, step: Any, cache: Any = None) -> Any:
        raise AssertionError("the model was called")


WRONG: dict[str, tuple[list[int], dict[str, Any]]] = {
    "max_new_tokens": ([1], {"max_new_tokens": 0}),
    "temperature": ([1], {"temperature": -1.0}),
    "top_p": ([1], {"top_p": 0.0}),
    "top_k": ([1], {"top_k": -1}),
    "tau": ([1], {"decoder": "threshold", "options": {"tau": 1.5}}),
    "more than the 4 cells": ([1], {"decoder": "fixed-k", "options": {"k": 5}}),
    "treshold": ([1], {"decoder": "treshold"}),
    "did you mean 'tau'": ([1], {"decoder": "threshold", "options": {"tua": 0.5}}),
    "prompt is empty": ([], {}),
    "outside the vocabulary": ([7], {}),
    "mask token": ([3], {}),
    "min_new_tokens": ([1], {"max_new_tokens": 4, "min_new_tokens": 5}),
    "banned_token_ids leaves no token": ([1], {"banned_token_ids": (0, 1, 2)}),
    "known_tokens is": ([1], {"max_new_tokens": 4, "known_tokens": {4: 1}}),
    "at least one token": ([1], {"max_new_tokens": 1, "known_tokens": {0: 1}}),
    "retries": ([1], {"retries": 3}),
    "guidance_scale": ([1], {"guidance_scale": -0.5}),
    "max_new_tokens is 2.5": ([1], {"max_new_tokens": 2.5}),
    "seed is 'a'": ([1], {"seed": "a"}),
    "temperature is 'hot'": ([1], {"temperature": "hot"}),
    "decoder is 3": ([1], {"decoder": 3}),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_parameters_are_named_before_any_model_call(what: str) -> None:
    prompt, options = WRONG[what]
    with pytest.raises(BdlmError, match=what) as error:
        Engine(Untouchable(toy_spec(4, 16)), 1).submit(
            prompt, SamplingParams(**{"max_new_tokens": 4} | options)
        )
    assert "\n" not in str(error.value)


def test_a_prompt_longer_than_the_window_and_misspelt_options_are_named() -> None:
    model = Untouchable(toy_spec(4, 16))
    with pytest.raises(ConfigError, match="the prompt has 9 tokens, but the window holds 8"):
        generate(model, [[1] * 9], SamplingParams(max_new_tokens=4), context_window=8)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        sampling_params(temprature=0.5)
    with pytest.raises(ConfigError, match="room for 8 tokens"):
        generate(
            Untouchable(ModelSpec(4, 3, 16, 16, streams=1)),
            [[1] * 8],
            SamplingParams(max_new_tokens=9),
        )
    with pytest.raises(ConfigError, match="guidance takes two rows"):
        Engine(model, 1).submit([1], SamplingParams(max_new_tokens=4, guidance_scale=1.0))
    with pytest.raises(ConfigError, match="infill_mode is 'gap'"):
        generate(
            Untouchable(replace(toy_spec(4, 16), shift=True)),
            [[1]],
            SamplingParams(max_new_tokens=4, known_tokens={3: 1}, infill_mode="gap"),
        )


def test_whole_numbers_stand_for_floats() -> None:
    """temperature=1 and top_p=1 are what people write."""
    model = native()
    texts = [
        generate(model, [[1]], SamplingParams(max_new_tokens=4, temperature=t, top_p=p))[
            0
        ].token_ids
        for t, p in ((1, 1), (1.0, 1.0))
    ]
    assert texts[0] == texts[1]
    assert (
        generate(model, [[1]], SamplingParams(max_new_tokens=4, temperature=0))[0].token_ids
        == generate(model, [[1]], SamplingParams(max_new_tokens=4, temperature=0.0))[0].token_ids
    )
