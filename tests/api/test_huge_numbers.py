"""Numbers beyond any machine end in one line, before memory is taken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bdlm
from bdlm import LM

HUGE = (2**62, 2**63 - 1, 2**63, 10**30, -(2**62))
# of these a large number is a valid wish
FINE = {("top_k", 2**62), ("top_k", 2**63 - 1), ("seed", 2**62), ("seed", 2**63 - 1)}
FINE |= {("seed", -(2**62)), ("entropy_window", 2**62), ("entropy_window", 2**63 - 1)}
OPTIONS: dict[str, Any] = {
    name: lambda n, name=name: {name: n}
    for name in (
        "max_new_tokens",
        "min_new_tokens",
        "top_k",
        "seed",
        "block_size",
        "context_window",
        "entropy_window",
        "retries",
    )
} | {
    "stop_token_ids": lambda n: {"stop_token_ids": [n]},
    "banned_token_ids": lambda n: {"banned_token_ids": [n]},
    "known place": lambda n: {"known_tokens": {n: 1}},
    "known token": lambda n: {"known_tokens": {0: n}},
    "temperature": lambda n: {"temperature": n},
    "decoder's own": lambda n: {"decoder": "ancestral", "steps": n},
}
FINE |= {("temperature", n) for n in (2**62, 2**63 - 1, 2**63, 10**30)}
FINE |= {("decoder's own", n) for n in (2**62, 2**63 - 1)}


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LM:
    return bdlm.load(tiny_model)


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("option", OPTIONS)
def test_generating(lm: LM, option: str, number: int) -> None:
    asked = {"max_new_tokens": 4, **OPTIONS[option](number)}
    if (option, number) in FINE:
        assert lm.generate("a", **asked).tokens <= 4  # type: ignore[call-overload]
        return
    with pytest.raises(bdlm.BdlmError) as error:
        lm.generate("a", **asked)  # type: ignore[call-overload]
    said = str(error.value)
    assert "\n" not in said and (str(number)[:12] in said or f"{float(number)}" in said)


@pytest.mark.parametrize("number", HUGE)
def test_other_methods(lm: LM, number: int) -> None:
    for call in (
        lambda: lm.infill("a", "b", number),
        lambda: lm.stream("a", max_new_tokens=number),
        lambda: lm.stream("a", context_window=number),
        lambda: lm.score("abc", block_size=number),
        lambda: lm.evaluate(__file__, length=number),
        lambda: lm.generate_from_ids([[number]], bdlm.SamplingParams(max_new_tokens=2)),
    ):
        with pytest.raises(bdlm.BdlmError) as error:
            found: Any = call()
            next(found)  # of a stream
        assert "\n" not in str(error.value)
