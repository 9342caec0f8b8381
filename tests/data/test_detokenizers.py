"""The paper's detokenizers on hand examples of what their corpora look like."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize(("name", "raw", "clean"), [(n, raw, clean) for n, pairs in EXAMPLES.items() for raw, clean in pairs])
def test_examples(name: str, raw: str, clean: str) -> None:
    assert DETOKENIZERS[name](raw) == clean


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_plain_prose_keeps_its_words(name: str) -> None:
    prose = "Plain prose, with commas (and brackets). It needs nothing; nothing changes."
    assert DETOKENIZERS[name](prose).strip() == prose
