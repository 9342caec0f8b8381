"""Writing through `LM`: streams join to the text, infilling, streamers, and weights that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TextStreamer

from bdlm.api import LM
from bdlm.core.errors import ConfigError
from bdlm.generation.sampling_params import SamplingParams
from tests.contracts.builders import randomised, tiny_dit


class Letters:
    """One letter a token."""

    eos_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(97 + int(i)) for i in ids)


def lm() -> LM:
    tokenizer: Any = Letters()
    return LM(randomised(tiny_dit("bd3lm", length=64), std=0.25), tokenizer)


def test_a_stream_joins_to_the_text_and_never_takes_back_a_stop_string() -> None:
    writer = lm()
    text = writer.generate("abc", max_new_tokens=40).text
    for at in range(2, 20, 3):
        stop = (text[at : at + 3], text[at + 9 : at + 14])
        whole = writer.generate("abc", max_new_tokens=40, stop=stop)
        pieces = [
            c.text for c in writer.stream("abc", max_new_tokens=40, stop=stop) if c.kind == "text"
        ]
        assert "".join(pieces) == whole.text == text[: min(text.index(s) for s in stop)]


def test_each_prompt_of_ids_has_its_own_params() -> None:
    writer = lm()
    params = [
        SamplingParams(max_new_tokens=12, seed=5),
        SamplingParams(max_new_tokens=80, seed=2, temperature=0.5),
        SamplingParams(max_new_tokens=12, seed=5),
    ]
    one, two, same = writer.generate_from_ids([[0, 1, 2], [3], [0, 1, 2]], params)
    assert one.token_ids == same.token_ids and (one.text, one.prompt) == (
        writer.generate("abc", max_new_tokens=12, seed=5).text,
        "abc",
    )
    assert (two.token_ids, two.context_window) == (
        writer.generate("d", max_new_tokens=80, seed=2, temperature=0.5).token_ids,
        64,
    )
    with pytest.raises(ConfigError, match="2 prompts came with 1 params"):
        writer.generate_from_ids([[1], [2]], params[:1])


def test_infilling_between_two_texts() -> None:
    writer = lm()
    for over in ("gap", "text", "blocks"):
        result = writer.infill("abcde", "fghij", 6, infill_mode=over)
        assert len(result.text) == 11
        assert result.text.endswith("fghij")
        assert bool(result.notes) == (over == "blocks")
    gaps = [
        [writer.infill("abcde", after, 6, seed=s).text[:6] for s in range(12)]
        for after in ("fghij", "aaaaa")
    ]
    assert gaps[0] != gaps[1], "what comes after is not seen"


def test_weights_that_change_are_read_again() -> None:
    writer = lm()
    before = writer.generate("abc", max_new_tokens=20).text
    with torch.no_grad():
        for p in writer.model.parameters():
            p.mul_(-1.0)
    after = writer.generate("abc", max_new_tokens=20).text
    assert after != before
    assert after == LM(writer.model, writer.tokenizer).generate("abc", max_new_tokens=20).text


def test_what_cannot_be_streamed_is_said() -> None:
    silent = TextStreamer(AutoTokenizer)  # type: ignore[arg-type]
    for wrong in ({"streamer": silent}, {"retries": 2, "min_entropy": 1.0, "streamer": silent}):
        with pytest.raises(ConfigError, match="streamer takes one text"):
            lm().generate(
                ["a", "b"] if "retries" not in wrong else ["a"], max_new_tokens=4, **wrong
            )
    with pytest.raises(ConfigError, match="cannot take text back"):
        lm().stream("a", max_new_tokens=4, retries=1, min_entropy=1.0)
