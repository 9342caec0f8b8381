"""A stream is its text, whatever is asked for: pieces join to the text, commits to the ids, and
both are what `generate` gives."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from bdlm.api import LM
from bdlm.core.errors import ConfigError
from bdlm.generation.engine.engine import Engine
from bdlm.generation.sampling_params import sampling_params
from tests.api.tiny_tokenizers import CORPUS, KINDS, writer
from tests.contracts.builders import randomised, tiny_dit

DECODERS = [
    "first-hitting",
    "ancestral",
    "left-to-right",
    "fixed-k",
    "threshold",
    "eb",
    "spaced",
    "adablock",
    "credit",
    "speculative",
    "remdm",
    "wino",
    "edit",
    "soft",
]
NEW = 18


class Letters:
    """One letter a token."""

    eos_id = bos_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(97 + int(i)) for i in ids)


@functools.cache
def letters(algo: str) -> LM:
    return LM(randomised(tiny_dit(algo, length=64), std=0.25), Letters())  # type: ignore[arg-type]


@st.composite
def asked(draw: st.DrawFn, words: list[str], tokens: int) -> dict[str, Any]:
    """Options of a request over `tokens` ids, with stop strings of parts of `words`."""
    new = draw(st.integers(1, NEW))
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "seed": draw(st.integers(0, 99)),
        "decoder": draw(st.sampled_from(DECODERS)),
    }
    maybe = lambda name, values: (
        options.update({name: draw(values)}) if draw(st.booleans()) else None
    )
    piece = st.sampled_from(words).flatmap(
        lambda w: st.integers(0, len(w) - 1).map(lambda i: w[i : i + 3])
    )
    maybe("stop", st.lists(piece, min_size=1, max_size=3))
    maybe(
        "known_tokens",
        st.dictionaries(st.integers(0, new - 1), st.integers(0, tokens - 1), max_size=new - 1),
    )
    maybe("infill_mode", st.sampled_from(["blocks", "gap", "text"]))
    maybe("block_size", st.sampled_from([1, 2, 4, 8]))
    maybe("min_new_tokens", st.integers(0, new))
    maybe("stop_token_ids", st.lists(st.integers(0, tokens - 1), min_size=1, max_size=2))
    maybe("top_p", st.sampled_from([0.5, 0.9]))
    maybe("temperature", st.sampled_from([0.0, 0.5]))
    maybe("guidance_scale", st.just(1.0))
    if draw(st.booleans()):
        options |= {
            "min_entropy": draw(st.sampled_from([0.5, 1.2, 1.8])),
            "entropy_window": draw(st.integers(2, 8)),
        }
    return options


def streams_join(lm: LM, prompt: str, options: dict[str, Any], drafts: bool) -> None:
    """The stream of a request against its text."""
    try:
        whole = lm.generate(prompt, **options)
    except ConfigError:
        assume(False)  # a model or decoder that does not take these options together
    event(f"ended by {whole.finish_reason}")
    *pieces, last = lm.stream(prompt, drafts=drafts, **options)
    assert last.kind == "end" and last.result is not None
    assert (last.result.text, last.result.token_ids, last.result.finish_reason) == (
        whole.text,
        whole.token_ids,
        whole.finish_reason,
    )
    assert "".join(chunk.text for chunk in pieces if chunk.kind == "text") == whole.text
    assert any(chunk.kind == "draft" for chunk in pieces) == (drafts and whole.forward_passes > 0)
    assert not any(stop in whole.text for stop in options.get("stop", ())) or options.get(
        "min_new_tokens"
    )


def commits_join(lm: LM, requests: list[tuple[str, dict[str, Any]]]) -> None:
    """Several requests in one engine: the ids of each one's commit events are those of its result,
    and never the mask."""
    engine = Engine(lm.model, 4, decode=lm.tokenizer.decode)
    told: dict[int, list[int]] = {}
    ended: dict[int, list[int]] = {}
    for prompt, options in requests:
        with suppress(ConfigError):  # a decoder that does not take these options together
            told[engine.submit(lm.prompt_ids(prompt), sampling_params(**options))] = []
    for happened in engine.run():
        if happened.kind == "commit":
            told[happened.request] += happened.tokens
        elif happened.result is not None:
            ended[happened.request] = happened.result.token_ids
    assert told == ended and not any(lm.spec.mask_id in tokens for tokens in told.values())


LETTERS = ["abcdefghij", "jihgfedcba", "aabbccdd"]
MANY = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@MANY
@given(
    asked(LETTERS, 10),
    st.sampled_from(["bd3lm", "mdlm", "ar"]),
    st.text("abcdefghij", min_size=1, max_size=9),
    st.booleans(),
)
def test_pieces_join_to_the_text(
    options: dict[str, Any], algo: str, prompt: str, drafts: bool
) -> None:
    streams_join(letters(algo), prompt, options, drafts)


@pytest.mark.parametrize("kind", KINDS)
@settings(MANY, max_examples=12)
@given(data=st.data())
def test_pieces_join_to_the_text_under_every_kind_of_tokenizer(
    kind: str, data: st.DataObject
) -> None:
    lm = writer(kind)
    options = data.draw(asked([*CORPUS, "\ufffd", " ", "é"], min(lm.tokenizer.mask_id, 100)))
    streams_join(
        lm,
        data.draw(st.sampled_from(["the cat", "KING: ", "é\ufffd", "\ufffd", ""])),
        options,
        data.draw(st.booleans()),
    )


@MANY
@given(
    st.lists(
        st.tuples(st.text("abcdefghij", min_size=1, max_size=9), asked(LETTERS, 10)),
        min_size=1,
        max_size=4,
    )
)
def test_commit_events_tell_every_token_once(requests: list[tuple[str, dict[str, Any]]]) -> None:
    commits_join(letters("bd3lm"), requests)


@MANY
@given(
    st.text("abcdefghij", min_size=1, max_size=9),
    st.text("abcdefghij", min_size=1, max_size=9),
    asked(LETTERS, 10),
)
def test_pieces_of_infilled_texts_join(before: str, after: str, options: dict[str, Any]) -> None:
    lm = letters("bd3lm")
    for name in ("known_tokens", "max_new_tokens", "min_new_tokens"):
        options.pop(name, None)
    given_cells = {5 + i: token for i, token in enumerate(lm.tokenizer.encode(after))}
    streams_join(
        lm,
        before,
        options | {"max_new_tokens": 5 + len(after), "known_tokens": given_cells},
        drafts=True,
    )


@pytest.mark.parametrize("prompt", ["a\ufffd", "\ufffd", "\ufffd\ufffd\ufffd\ufffd"])
def test_a_replacement_character_at_the_prompts_end_stays_there(prompt: str) -> None:
    lm = writer("bytes")
    for seed in range(4):
        result = lm.generate(prompt, max_new_tokens=12, seed=seed)
        whole = lm.tokenizer.decode(lm.tokenizer.encode(prompt) + result.token_ids)
        assert (
            prompt + result.text
            == whole
            == prompt
            + "".join(chunk.text for chunk in lm.stream(prompt, max_new_tokens=12, seed=seed))
        )
