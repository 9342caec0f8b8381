"""`bdlm generate`: the JSON contract, seeds, stop strings, the live view, prompts that are long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdlm.commands.generate import unescaped
from tests.cli.conftest import Run


def test_generate_json_contract(bdlm: Run, tiny_model: Path) -> None:
    words = (
        "generate",
        "--model",
        tiny_model,
        "--prompt",
        "the ",
        "--max-new-tokens",
        10,
        "--decoder",
        "first-hitting",
        "--seed",
        3,
        "--json",
    )
    code, out, _ = bdlm(*words)
    facts = json.loads(out)
    assert code == 0
    assert {"text", "tokens", "forward_passes", "tokens_per_forward", "seconds"} <= facts.keys()
    assert facts["tokens"] == len(facts["token_ids"]) <= 10
    assert facts["tokens_per_forward"] == pytest.approx(facts["tokens"] / facts["forward_passes"])
    again = json.loads(bdlm(*words)[1])
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}
    assert json.loads(bdlm(*words[:-2], 4, "--json")[1])["token_ids"] != facts["token_ids"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", r"\n"),
        (r"\x41\u20ac\\", "A€\\"),
        ("\n", "\n"),
        ("a.b", "a.b"),
    ],
)
def test_stop_strings_are_read_with_their_escapes(word: str, meant: str) -> None:
    assert unescaped(word) == meant


def test_a_stop_string_of_a_new_line_ends_the_text_before_it(bdlm: Run) -> None:
    words = (
        "generate",
        "--model",
        "shakespeare",
        "--prompt",
        "KING",
        "--max-new-tokens",
        40,
        "--seed",
        3,
        "--json",
    )
    whole, cut = (
        json.loads(bdlm(*words, *more)[1])["text"] for more in ((), ("--stop", r"\n", r"\u0021"))
    )
    assert "\n" in whole and cut == min(whole.split("\n")[0], whole.split("!")[0], key=len)
    code, out, _ = bdlm(*words[:3], "--prompt=--- x", "--max-new-tokens", 4)
    assert code == 0 and out.startswith("--- x")


def test_generate_many_equals_one_each(bdlm: Run, tiny_model: Path) -> None:
    base = ("generate", "--model", tiny_model, "--prompt", "a cat", "--max-new-tokens", 9, "--json")
    many = json.loads(bdlm(*base, "--count", 3, "--seed", 5)[1])
    alone = [json.loads(bdlm(*base, "--seed", 5 + i)[1]) for i in range(3)]
    assert [m["token_ids"] for m in many] == [a["token_ids"] for a in alone]


def test_live_prints_the_same_text(bdlm: Run, tiny_model: Path) -> None:
    base = ("generate", "--model", tiny_model, "--prompt", "the", "--max-new-tokens", 12)
    text = json.loads(bdlm(*base, "--json")[1])["text"]
    assert bdlm(*base, "--live")[1].strip("\n") == ("the" + text).strip("\n")


def test_a_long_prompt_is_warned_of_in_one_line(bdlm: Run, tiny_model: Path) -> None:
    words = (
        "generate",
        "--model",
        tiny_model,
        "--prompt",
        "the cat sat on the mat and the dog",
        "--max-new-tokens",
        4,
        "--json",
    )
    code, out, err = bdlm(*words)
    assert code == 0
    assert json.loads(out)["context_window"] == 35
    assert len(err.splitlines()) == 1
    assert err.startswith("bdlm: the prompt has 35 tokens, more than the 32")
