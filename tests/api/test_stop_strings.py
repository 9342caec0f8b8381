"""Stop strings over tokenizers of every kind: found wherever they begin, also at the very start of
the new text."""

from __future__ import annotations

import random

import pytest

from tests.api.tiny_tokenizers import KINDS, writer

PROMPTS = ["the cat", "the cat ", "KING:\n", "", "café €"]
TRIALS = 80


def trial(kind: str, number: int) -> str | None:
    """What a random stop string, taken from the text itself, gets wrong; None if nothing."""
    draw, lm = random.Random(f"{kind} {number}"), writer(kind)
    prompt, asked = draw.choice(PROMPTS), {"seed": number, "temperature": draw.choice([0.3, 1.0])}
    text = lm.generate(prompt, max_new_tokens=24, **asked).text
    if not text:
        return None
    first = draw.choice([0, 0, draw.randrange(len(text))])
    stop = text[first : first + draw.randint(1, 6)]
    result = lm.generate(prompt, max_new_tokens=24, stop=stop, **asked)
    streamed = "".join(
        chunk.text for chunk in lm.stream(prompt, max_new_tokens=24, stop=stop, **asked)
    )
    expected = text[: text.index(stop)]
    if result.finish_reason != "stop_text":
        return f"{prompt!r}: {stop!r} of {text!r} was missed"
    if result.text != expected:
        return f"{prompt!r}: {stop!r} of {text!r} gives {result.text!r}"
    return (
        None if streamed == expected else f"{prompt!r}: {stop!r} of {text!r} streams {streamed!r}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_of_the_text_ends_it_before_the_string(kind: str) -> None:
    wrong = [said for said in (trial(kind, number) for number in range(TRIALS)) if said]
    assert not wrong, f"{len(wrong)} of {TRIALS} trials: {wrong[:3]}"
