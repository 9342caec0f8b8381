"""Stop strings and a floor beside each other: the text, its stream and the ids tell the same."""

from __future__ import annotations

import bdlm


def test_a_stop_string_before_the_floor_is_part_of_the_text() -> None:
    lm, asked = bdlm.load("shakespeare"), {"min_new_tokens": 12, "stop": ["\n"], "seed": 3}
    plain = lm.generate("KING", max_new_tokens=40, seed=3)
    assert "\n" in lm.tokenizer.decode(plain.token_ids[:12]), (
        "the test wants a text whose first tokens hold the stop string"
    )
    result = lm.generate("KING", max_new_tokens=40, **asked)
    assert len(result.token_ids) >= 12
    assert result.tokens == len(result.token_ids)
    early, whole = lm.tokenizer.decode(result.token_ids[:12]), lm.tokenizer.decode(result.token_ids)
    assert result.text.strip()
    assert whole.startswith(result.text)
    assert len(result.text) >= len(early.rstrip("\n"))
    assert (
        "".join(
            chunk.text
            for chunk in lm.stream("KING", max_new_tokens=40, **asked)
            if chunk.kind == "text"
        )
        == result.text
    )
    if result.finish_reason == "stop_text":
        assert "\n" not in result.text[len(early) :]
