"""The paper's detokenizers on hand examples of what their corpora look like."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pytest

from bdlm.data import detokenizers
from bdlm.data.detokenizers import DETOKENIZERS

EXAMPLES = {
    "none": [("a @-@ b , c", "a @-@ b , c")],
    "wikitext": [
        ("a well @-@ known 1 @,@ 000 or 2 @.@ 5", "a well-known 1,000 or 2.5"),
        ("he said , then ; stop . Now ! Yes ? No : end", "he said, then; stop. Now! Yes? No: end"),
        ("( in brackets ) and [ these ] and { those }", "(in brackets) and [these] and {those}"),
        ('she said " hello there " to me', 'she said "hello there" to me'),
        ("John 's bone", "John's bone"),
        ("the dogs ' bone", "the dogs' bone"),
        (" = Robert = \n \n = = Early life = = \n", " = Robert =\n\n== Early life ==\n"),
        ("= = = Part = = =", "=== Part ==="),
        ("at 20 \u00b0 north", "at 20\u00b0north"),
    ],
    "ptb": [
        ("the company 's profit did n't rise", "the company's profit didn't rise"),
        ("about N N of <unk> shares", "about 1 1 of ? shares"),
        ("it paid $ N and # N .", "it paid $1 and #1 ."),
        ("1\\/2 of it", "1/2 of it"),
        (" they sold N \n", "they sold 1"),
        ("the traders ' view", "the traders' view"),
    ],
    "lm1b": [
        ("see http : / / example and https : / / other", "see http://example and https://other"),
        ("It rained . He left .", "It rained. He left."),
        ("Why ? Go ! Really ?", "Why? Go! Really?"),
        ("one , two : three ; four / five", "one, two: three; four/five"),
        ('the " big one " ( or not ) [ sic ]', 'the "big one" (or not) [sic]'),
        ("John 's $ 5 and \u00a3 6", "John's $5 and \u00a36"),
    ],
    "lambada": [(" \u201cNo,\u201d he said. \n", '\n"No," he said.')],
    "scientific_papers": [("well @-@ known ( see [ 1 ] ) , done .", "well-known (see [1]), done.")],
}


def test_every_detokenizer_has_examples() -> None:
    assert set(EXAMPLES) == set(DETOKENIZERS)


@pytest.mark.parametrize(
    ("name", "raw", "clean"),
    [(n, raw, clean) for n, pairs in EXAMPLES.items() for raw, clean in pairs],
)
def test_examples(name: str, raw: str, clean: str) -> None:
    assert DETOKENIZERS[name](raw) == clean


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_plain_prose_keeps_its_words(name: str) -> None:
    prose = "Plain prose, with commas (and brackets). It needs nothing; nothing changes."
    assert DETOKENIZERS[name](prose).strip() == prose


OLD_BRACKETS = (
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)


def old_brackets(text: str) -> str:
    """The patterns that the rules for brackets and quotes are defined by; they take the cube of a
    run of blanks.
    """
    for pattern, replacement in OLD_BRACKETS:
        text = re.sub(pattern, replacement, text)
    return text


def test_brackets_are_tightened_as_the_patterns_say() -> None:
    draw = random.Random(1)
    for _ in range(4000):
        text = "".join(draw.choices("()[]{}\"'  \n\t\u00a0\x1fab", k=draw.randrange(30)))
        new = text
        for rule in detokenizers._BRACKETS:
            assert callable(rule)
            new = rule(new)
        assert new == old_brackets(text)


class Counted(str):
    """A text that counts the characters that its searches and slices go over."""

    work = 0

    def find(self, mark: str, start: int = 0) -> int:  # type: ignore[override]
        found = super().find(mark, start)
        Counted.work += (len(self) if found < 0 else found + 1) - start
        return found

    def __getitem__(self, part: slice) -> str:  # type: ignore[override]
        got = super().__getitem__(part)
        Counted.work += len(got)
        return got


@pytest.mark.parametrize("pattern", ["(%s", "%s(", "((%s", "( ) %s", "(%s)", '"%s', "'%s'"])
def test_the_work_on_brackets_grows_with_the_text_alone(pattern: str) -> None:
    for filler in (" ", "(", ")", "( ", "'\""):
        for rule in detokenizers._BRACKETS:
            text = Counted(pattern % (filler * 5000))
            Counted.work = 0
            assert callable(rule)
            rule(text)
            assert Counted.work <= 6 * len(text)


def test_no_rule_has_two_open_repeats_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern whose repeats can share the same characters takes the square or cube of a run of
    them.
    """
    patterns: list[str] = []
    spy = SimpleNamespace(sub=lambda pattern, _, text: patterns.append(pattern) or text)
    monkeypatch.setattr(detokenizers, "re", spy)
    for clean in DETOKENIZERS.values():
        clean("some text")
    assert len(patterns) > 30
    repeated = [p for p in patterns if len(re.findall(r"(?<!\\)[*+]", p)) > 1]
    assert repeated == []
