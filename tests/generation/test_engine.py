"""The engine against a one-request-at-a-time oracle: rows join, leave, are cancelled and fail
without touching their neighbours."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bdlm.core.errors import ConfigError
from bdlm.core.forward import extend, predict
from bdlm.core.types import Canvas, Denoiser, Layout, Step
from bdlm.generation.decoders import make_decoder
from bdlm.generation.engine.engine import Engine, generate, stream
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling.sampler import draw, forbid
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.inference import fold
from bdlm.models.toy import Inconsistent, toy_spec
from tests.contracts.builders import BUILDERS, randomised, tiny_dit
from tests.generation.test_speculation import gap


def native(std: float = 0.25) -> Any:
    return randomised(tiny_dit("bd3lm", length=64), std=std).double()


def requests(
    vocab: int, count: int, seed: int = 0, longest: int = 9
) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of every length beside block borders, and other lengths, seeds, temperatures and
    decoders in each row."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda high: int(torch.randint(high, (), generator=draw))
    found = []
    for i in range(count):
        prompt = [number(vocab) for _ in range(1 + number(longest))]
        decoder, options = [
            ("first-hitting", {}),
            ("threshold", {"tau": 0.4}),
            ("ancestral", {"steps": 3}),
        ][number(3)]
        shape = [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 0.0}][
            number(5)
        ]
        found.append(
            (
                prompt,
                SamplingParams(
                    max_new_tokens=1 + number(7), seed=i, decoder=decoder, options=options, **shape
                ),
            )
        )
    return found


KINDS = (
    "dit-bd3lm",
    "dit-bd3lm-1",
    "dit-bd3lm-causal",
    "dit-mdlm",
    "dit-sedd",
    "dit-ar",
    "hf-llama",
    "hf-qwen3-shift",
    "hf-llama-ar",
    "toy-shifted-long",
    "toy-inconsistent",
)


def model_of(kind: str) -> Denoiser:
    if kind == "toy-shifted-long":
        return Inconsistent(replace(toy_spec(4, 16), shift=True))
    model = BUILDERS[kind]().model
    return model.double() if isinstance(model, torch.nn.Module) else model


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_and_go_write_what_each_writes_alone(kind: str) -> None:
    model = model_of(kind)
    asked = requests(model.spec.vocab_size - 1, 7)
    alone = [generate(model, [prompt], [params])[0] for prompt, params in asked]
    together = generate(model, [p for p, _ in asked], [params for _, params in asked], rows=3)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.forward_passes for r in together] == [r.forward_passes for r in alone]
    apart = [
        abs(a - b)
        for x, y in zip(together, alone, strict=True)
        for a, b in zip(x.log_probs, y.log_probs, strict=True)
    ]
    assert max(apart) < 1e-6


def test_fused_commits_write_what_separate_ones_write() -> None:
    model, prompt, new = native(), [1, 2, 3, 4, 5, 6], 14
    text, cache, committed = list(prompt), model.new_cache(1, 32), 0
    at = lambda place: Layout(*[place, *[place // 4 * 4] * 4, torch.zeros_like(place)])
    while len(text) < len(prompt) + new:
        start = len(text) // 4 * 4
        if start > committed:
            extend(
                model,
                torch.tensor([text[committed:start]]),
                at(torch.arange(committed, start)[None]),
                cache,
            )
            committed = start
        place = torch.arange(start, start + 4)[None]
        known = len(text) - start
        ids = torch.tensor([text[start:] + [10] * (4 - known)])
        masked = torch.arange(4)[None] >= known
        keys = CellNoise(torch.tensor([7]), place, torch.zeros_like(place))
        for cell in keys.order().masked_fill(~masked, -1)[0].argsort(descending=True)[: 4 - known]:
            one = torch.zeros_like(masked)
            one[0, cell] = True
            logits = forbid(predict(model, Canvas(ids, masked, at(place)), cache, one).logits, 10)
            ids[0, cell] = draw(
                logits, keys.seed, place[0, cell][None], torch.zeros(1, dtype=torch.long)
            )
            masked[0, cell] = False
        text += ids[0, known:].tolist()
    result = generate(model, [prompt], [SamplingParams(max_new_tokens=new, seed=7)])[0]
    assert result.token_ids == text[len(prompt) :]
    assert result.forward_passes == new, "no call only commits"


class Counted:
    """A model that notes the cells of every call."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.cells = inner, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, step: Step, cache: Any = None) -> Any:
        self.cells.append(int((step.doc >= 0).sum()))
        return self.inner.step(step, cache)


def test_shared_prompts_are_computed_once_and_change_nothing() -> None:
    model = Counted(fold(native()))
    system = [int(t) for t in torch.randint(10, (40,), generator=torch.Generator().manual_seed(1))]
    asked = [([*system, i], SamplingParams(max_new_tokens=5, seed=i)) for i in range(4)]
    asked += [
        (system[:36] + [7] * 6, SamplingParams(max_new_tokens=5, seed=9)),
        ([3] * 40, SamplingParams(max_new_tokens=5, seed=10)),
    ]
    alone = [generate(model.inner, [prompt], [params])[0].token_ids for prompt, params in asked]
    assert [
        r.token_ids for r in generate(model, [p for p, _ in asked], [p for _, p in asked])
    ] == alone
    assert sum(model.cells[:2]) < 40 + 40 + 8 + 6 * 8, (
        "the shared blocks were computed more than once"
    )
    engine = Engine(model, 2, capacity=64)
    texts, most = [], []
    for prompt, params in asked:  # one after another, into rows that were used before
        model.cells.clear()
        engine.submit(prompt, params)
        texts.append(next(e.result.token_ids for e in engine.run() if e.result is not None))
        most.append(max(model.cells))
    assert texts == alone
    assert [cells > 12 for cells in most] == [True, False, False, False, False, True]


def test_memory_is_what_was_stated() -> None:
    model = native()
    each = model.new_cache(1, 64).nbytes
    engine = Engine(model, 16, capacity=64, memory=5 * each + 7)
    assert engine.rows == 5
    assert engine.scheduler.cache.nbytes == 5 * each
    before = engine.nbytes
    for i in range(12):
        engine.submit([1] * 20, SamplingParams(max_new_tokens=40, seed=i))
    assert len([e for e in engine.run() if e.kind == "end"]) == 12
    assert engine.scheduler.cache.nbytes == 5 * each, "the cache is what it was"
    assert engine.nbytes - before <= 5 * 60 * (8 + 8 + 1 + 4), "the texts are all that grew"
    with pytest.raises(ConfigError, match="takes"):
        Engine(model, 16, capacity=64, memory=each - 1)
    with pytest.raises(ConfigError, match="raise capacity"):
        Engine(model, 1, capacity=16).submit([1] * 10, SamplingParams(max_new_tokens=20))


def test_a_thousand_requests_leave_nothing_behind() -> None:
    engine = Engine(Inconsistent(toy_spec(4, 16)), 50)

    def tensors_after(count: int) -> int:
        for i in range(count):
            engine.submit(
                [i % 3],
                SamplingParams(
                    max_new_tokens=1 + i % 5, seed=i, decoder=("first-hitting", "swd")[i % 2]
                ),
            )
        assert sum(e.kind == "end" for e in engine.run()) == count
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    tensors_after(50)
    early = tensors_after(50)
    assert tensors_after(1000) <= early
    assert not engine.busy
    assert not engine.scheduler.slots.taken
    assert engine.scheduler.slots.free == 50


def test_the_queue_is_bounded_and_cancels_reach_it() -> None:
    engine = Engine(Inconsistent(toy_spec(4, 16)), 1, queue=2)
    for i in range(2):
        engine.submit([i], SamplingParams(max_new_tokens=8))
    with pytest.raises(ConfigError, match="the queue is full"):
        engine.submit([2], SamplingParams(max_new_tokens=8))
    (event,) = engine.cancel(1)
    assert event.result.finish_reason == "cancelled"
    assert event.result.token_ids == []
    assert engine.waiting == 1
    engine.step()
    assert engine.cancel(99) == []
    (event,) = engine.cancel(0)
    assert event.result.finish_reason == "cancelled"
    assert event.result.forward_passes == 1
    assert not engine.busy


def test_drafts_and_commits_tell_the_text() -> None:
    model, prompt = native(), [1, 2, 3]
    events = list(stream(model, prompt, SamplingParams(max_new_tokens=9, seed=3)))
    assert [t for e in events if e.kind == "commit" for t in e.tokens] == events[
        -1
    ].result.token_ids
    drafts = [e for e in events if e.kind == "draft"]
    assert len(drafts) == events[-1].result.forward_passes
    assert drafts[0].ids[:3] == prompt
    assert sum(drafts[0].masked) == 0
    assert all(
        t != 10 for e in drafts for t, hidden in zip(e.ids, e.masked, strict=True) if not hidden
    )


@pytest.mark.parametrize("kind", ["dit-bd3lm", "toy-inconsistent", "hf-llama"])
def test_the_window_slides_and_the_result_says_so(kind: str) -> None:
    model = model_of(kind)
    asked = [
        ([1, 2, 3, 4, 5, 6], SamplingParams(max_new_tokens=14, seed=1)),
        ([1], SamplingParams(max_new_tokens=4, seed=2)),
    ]
    asked = [([t % 3 for t in p], q) for p, q in asked]
    long, short = generate(model, [p for p, _ in asked], [q for _, q in asked], context_window=8)
    assert len(long.token_ids) == 14
    assert "slid" in long.notes[0]
    assert short.notes == ()
    assert short.token_ids == generate(model, [asked[1][0]], [asked[1][1]])[0].token_ids
    whole = generate(model, [asked[0][0]], [asked[0][1]])[0]
    assert whole.notes == (), "exact until the first drop"
    assert whole.token_ids[:6] == long.token_ids[:6], "exact until the first drop"


# -- arrivals, cancels and steps in any order ------------------------------------------------------


class Traffic(RuleBasedStateMachine):
    """Requests arrive and are cancelled between calls; whatever happens, a text is a prefix of what
    it is alone."""

    model = Inconsistent(toy_spec(4, 32), seed=3)
    known: dict[Any, list[int]] = {}  # noqa: RUF012 (alone: one answer a request, shared by all examples)

    @initialize(rows=st.integers(1, 4))
    def begin(self, rows: int) -> None:
        self.engine = Engine(self.model, rows)
        self.asked: dict[int, tuple[tuple[int, ...], int, int, int]] = {}
        self.ended: dict[int, Any] = {}
        self.text: dict[int, list[int]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=9),
        new=st.integers(1, 9),
        seed=st.integers(0, 3),
        kind=st.integers(0, 2),
    )
    def arrive(self, prompt: list[int], new: int, seed: int, kind: int) -> None:
        key = (tuple(prompt), new, seed, kind)
        self.asked[self.engine.submit(prompt, self.params(key))] = key

    def params(self, key: Any) -> SamplingParams:
        decoder, options = [
            ("first-hitting", {}),
            ("threshold", {"tau": 0.5}),
            ("remdm", {"steps": 3, "eta": 0.5}),
        ][key[3]]
        return SamplingParams(
            max_new_tokens=key[1],
            seed=key[2],
            decoder=decoder,
            options=options,
            stop_token_ids=(2,),
        )

    def alone(self, key: Any) -> list[int]:
        if key not in self.known:
            self.known[key] = generate(self.model, [list(key[0])], [self.params(key)])[0].token_ids
        return self.known[key]

    def note(self, events: list[Any]) -> None:
        for event in events:
            if event.kind == "commit":
                self.text.setdefault(event.request, []).extend(event.tokens)
            elif event.kind == "end":
                assert event.request not in self.ended, "a request ended twice"
                self.ended[event.request] = event.result

    @precondition(lambda self: self.asked)
    @rule()
    def call(self) -> None:
        self.note(self.engine.step())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        self.note(self.engine.cancel(data.draw(st.sampled_from(sorted(self.asked)))))

    @invariant()
    def texts_are_those_of_the_oracle(self) -> None:
        for number, result in getattr(self, "ended", {}).items():
            expected = self.alone(self.asked[number])
            assert self.text.get(number, []) == result.tokens
            if result.finish_reason == "cancelled":
                assert result.tokens == expected[: len(result.tokens)]
            else:
                assert result.tokens == expected

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.note(list(self.engine.run()))
        assert sorted(self.ended) == sorted(self.asked), "a request was lost"
        self.texts_are_those_of_the_oracle()


Traffic.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestTraffic = Traffic.TestCase


def test_flips_between_batch_sizes_in_single_precision_are_near_ties() -> None:
    model, flips = native().float(), 0
    exact = native()
    asked = [([1 + i % 9, i % 7], SamplingParams(max_new_tokens=16, seed=i)) for i in range(60)]
    together = generate(model, [p for p, _ in asked], [q for _, q in asked], rows=30)
    for (prompt, params), result in zip(asked, together, strict=True):
        alone = generate(model, [prompt], [params])[0]
        if alone.token_ids != result.token_ids:
            flips += 1
            assert gap(exact, prompt, result, params.seed, alone.token_ids) < 1e-4, (
                "texts differ although the draw was no tie"
            )
    assert flips <= 3, "single precision flips far more often than its rounding explains"


def texts(model: Denoiser, asked: list[Any], rows: int, order: list[int]) -> dict[int, Any]:
    """Tokens and log-probabilities by request, submitted in some order to an engine of so many
    rows."""
    engine = Engine(model, rows, bitwise=True)
    numbers = {engine.submit(*asked[i]): i for i in order}
    return {
        numbers[e.request]: (e.result.token_ids, e.result.log_probs)
        for e in engine.run()
        if e.result is not None
    }


@pytest.mark.parametrize("algo", ["bd3lm", "mdlm"])
def test_bitwise_texts_are_the_same_to_the_last_bit_in_any_company(algo: str) -> None:
    """In single precision, on a model wide enough for products of other shapes to round otherwise:
    log-probabilities, not only tokens."""
    sizes = {"hidden_dim": 128, "n_blocks": 2, "n_heads": 2, "cond_dim": 8}
    model: Any = randomised(
        DiT(DiTConfig(11, 10, model_length=64, block_size=4, algo=algo, **sizes)), std=0.2
    )
    asked = requests(10, 9)
    asked += [
        ([1, 2], SamplingParams(max_new_tokens=6, guidance_scale=1.0)),
        ([3] * 40, SamplingParams(max_new_tokens=6, decoder="speculative")),
    ]
    alone = {i: texts(model, asked, 2, [i])[i] for i in range(11)}
    for rows, order in ((4, [*range(11)]), (11, [*range(11)][::-1])):
        assert texts(model, asked, rows, order) == alone


def test_bitwise_is_refused_where_it_cannot_be() -> None:
    for model in (Inconsistent(toy_spec(4, 16)), tiny_dit("ar"), tiny_dit("sedd")):
        with pytest.raises(ConfigError, match="bitwise is True"):
            Engine(model, bitwise=True)
    for decoder, memory in (("attention", None), ("speculative", 1 << 20), ("wino", 1 << 20)):
        with pytest.raises(
            ConfigError,
            match=(
                f"decoder {type(make_decoder(decoder)).__name__}.* makes calls that are not packed"
            ),
        ):
            Engine(native(), bitwise=True, memory=memory).submit(
                [1], SamplingParams(decoder=decoder)
            )
    Engine(native(), bitwise=True).submit(
        [1], SamplingParams(max_new_tokens=8, decoder="speculative")
    )
