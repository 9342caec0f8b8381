"""CacheRollback the tokenisation that some corpora come with, as the paper does before it measures
(arXiv 2503.09573, App. C.1).

In: one document as its corpus spells it. Out: the text as one would write it. Each cleaner is a
table of rules applied in order; they are lossy, and the likelihood of a cleaned text is not
comparable with that of the raw one."""

from __future__ import annotations

import re
from collections.abc import Callable

# a pattern and its replacement, or a function of the text
Rule = tuple[str, str] | Callable[[str], str]
Rules = tuple[Rule, ...]


def _tight(opening: str, closing: str) -> Callable[[str], str]:
    """A rule that strips the text between each opening mark and the next closing one.

    A search for the marks, in time that grows with the text alone: a pattern with lazy blanks on
    both sides takes the cube of it.
    """

    def rule(text: str) -> str:
        parts, done = [], 0
        while (first := text.find(opening, done)) >= 0 and (
            last := text.find(closing, first + 1)
        ) >= 0:
            parts += [text[done : first + 1], text[first + 1 : last].strip(), closing]
            done = last + 1
        return "".join(parts) + text[done:] if parts else text

    return rule


_BRACKETS: Rules = (*(_tight(a, b) for a, b in ("()", "[]", "{}", '""', "''")),)
_WIKITEXT: Rules = (
    (r"s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    *_BRACKETS,
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_PTB: Rules = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\\/", "/"),
    (" N(?= )", " 1"),
    (r"([$#]) 1", r"\g<1>1"),
    ("<unk>", "?"),
)
_LM1B: Rules = (
    ("(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    *(
        (f" {re.escape(mark)}{end}", mark + keep)
        for mark in "?!"
        for end, keep in ((" ", " "), ("$", ""))
    ),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    ('" ([^"]+) "', r'"\1"'),
    ("' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"\$ ", "$"),
    ("\u00a3 ", "\u00a3"),
)


def _apply(rules: Rules, text: str) -> str:
    for rule in rules:
        text = rule(text) if callable(rule) else re.sub(*rule, text)
    return text


def none(text: str) -> str:
    """The text as it is (OpenWebText, AG News)."""
    return text


def wikitext(text: str) -> str:
    """WikiText: `@-@` joins, spaced punctuation, brackets and quotes, `= =` headings."""
    return _apply(_WIKITEXT, text)


def ptb(text: str) -> str:
    """Penn Treebank: split contractions, `N` for a number becomes 1, `<unk>` becomes ?, the escaped
    slash; the blanks around a line go."""
    return _apply(_PTB, text).strip()


def lm1b(text: str) -> str:
    """One Billion Words: spaced punctuation, quotes, brackets, web addresses, currency signs."""
    return _apply(_LM1B, text)


def lambada(text: str) -> str:
    """LAMBADA: curly double quotes become straight; the text is stripped and opened with an empty
    line."""
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()


def scientific_papers(text: str) -> str:
    """arXiv and PubMed articles: the WikiText cleaner, then that of One Billion Words."""
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": none,
    "wikitext": wikitext,
    "ptb": ptb,
    "lm1b": lm1b,
    "lambada": lambada,
    "scientific_papers": scientific_papers,
}
