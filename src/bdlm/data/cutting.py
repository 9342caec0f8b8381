"""Cuts a long text into pieces whose ids, one after the other, are exactly the ids of the whole:
encoding in little memory.

In: what a tokenizer.json says of how it splits text, and a text. Out: pieces of it. A cut lies
between a letter and the space or line end after it, and is used only where the tokenizer is known
to end a word there whatever follows: rules of this module, not guesses from samples. Everything
else is encoded whole. Knows nothing about files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

Encode = Callable[[list[str]], list[list[int]]]

PIECE = 1 << 16  # least characters of a piece
TOGETHER = 16  # pieces that are encoded at once

# Letters that every known rule for words takes as letters, also after normalisation: ASCII and CJK
# ideographs have no other form.
ASCII = "A-Za-z"
PLAIN = ASCII + "\u4e00-\u9fff"
# Letters of other scripts: a decomposition would end them in a mark, which is not a letter, so
# these are for text left as it is (or NFC).
COMPOSED = (
    "\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u063a\u0641-\u064a"
    "\u0905-\u0939\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\uac00-\ud7a3"
)
AT_BLANKS = "[ \\n]"

# Words, numbers and runs of punctuation with the space before them; line ends belong to the
# punctuation that they follow.
WORDS = r" ?\p{L}+(?:'\p{L}{1,2}(?!\p{L}))?| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n*|\s*\n|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (
    WORDS,
    GPT2,
    GPT4,
    GPT4.replace("{1,3}", ""),
)  # in each a letter ends its piece where a blank follows; the last is Qwen's


def pieces(text: str, cut: re.Pattern[str] | None) -> Iterator[str]:
    """The text in pieces of at least `PIECE` characters, ended at cuts; None, and a text without
    cuts: the whole.
    """
    first = 0
    while cut is not None and (found := cut.search(text, first + PIECE)):
        yield text[first : found.end()]
        first = found.end()
    yield text[first:] if first else text


def encoded(
    texts: Sequence[str], cut: Callable[[], re.Pattern[str] | None], encode: Encode
) -> list[list[int]]:
    """`encode` of the texts, long ones in pieces. cut: gives the cuts, asked only where a text is
    long.
    """
    if all(len(text) <= 2 * PIECE for text in texts):
        return encode(list(texts))
    return [_joined(text, cut(), encode) for text in texts]


def _joined(text: str, cut: re.Pattern[str] | None, encode: Encode) -> list[int]:
    ids: list[int] = []
    parts = pieces(text, cut)
    while some := list(islice(parts, TOGETHER)):
        for part in encode(some):
            ids += part
    return ids


def cuts_of(definition: str) -> re.Pattern[str] | None:
    """Where a tokenizer with this tokenizer.json may be cut; None where nothing is known."""
    parts: dict[str, Any] = json.loads(definition)
    letters = None if parts.get("truncation") else _letters(parts.get("normalizer"))
    words = _ends_words(parts.get("pre_tokenizer"))
    model = parts.get("model") or {}
    if (
        letters is None
        or not words
        or model.get("dropout")
        or not all(map(_stays_inside, parts.get("added_tokens") or []))
    ):
        return None
    return cuts_at(letters)


def cuts_at(letters: str) -> re.Pattern[str]:
    """Cuts after one of these letters (a character class) and before a space or a line end. The end
    of a match is the cut.
    """
    return re.compile(f"[{letters}](?={AT_BLANKS})")


def _letters(normalizer: dict[str, Any] | None) -> str | None:
    """The letters that stay letters, and at whose side nothing is added or removed; None if that is
    not known.
    """
    if normalizer is None:
        return PLAIN + COMPOSED
    kind = normalizer.get("type")
    if kind == "Sequence":
        inner = [_letters(each) for each in normalizer.get("normalizers", [])]
        return (
            None
            if None in inner
            else min((each for each in inner if each), key=len, default=PLAIN + COMPOSED)
        )
    if kind == "NFC":
        return PLAIN + COMPOSED
    if kind == "BertNormalizer":
        return ASCII  # it puts blanks around ideographs
    return PLAIN if kind in ("NFD", "NFKC", "NFKD", "Lowercase", "StripAccents") else None


def _ends_words(splitter: dict[str, Any] | None) -> bool:
    """Whether the pre-tokenizer ends a piece after a letter that a blank follows, and sees nothing
    beyond.
    """
    steps = (
        splitter.get("pretokenizers", [])
        if splitter and splitter.get("type") == "Sequence"
        else [splitter]
    )
    found = [_step(step or {}) for step in steps]
    return None not in found and True in found


def _step(step: dict[str, Any]) -> bool | None:
    """True: ends words there. False: does not care. None: not known."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return None if step.get("add_prefix_space") else bool(step.get("use_regex", True))
    if kind == "Split":
        alone = step.get("behavior") == "Isolated" or (
            step.get("behavior") == "Removed" and step.get("invert")
        )
        return True if alone and (step.get("pattern") or {}).get("Regex") in PATTERNS else None
    if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"):
        return True
    return (
        False
        if kind == "Digits" or (kind == "Punctuation" and step.get("behavior") == "Isolated")
        else None
    )


def _stays_inside(token: dict[str, Any]) -> bool:
    """Whether an added token cannot reach over a cut: it holds no blank beside letters, and does
    not take the blanks after it.
    """
    content = str(token.get("content"))
    blanks = any(character.isspace() for character in content)
    return not token.get("rstrip") and (not blanks or content.isspace())
