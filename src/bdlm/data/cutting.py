"""Cuts a long text into pieces so that the ids of the pieces, concatenated, are exactly the ids of
the whole text: encoding in little memory.

In: how a tokenizer.json splits text, and a text. Out: pieces of it. A cut is between a letter and
the space or line end after it, and is used only if the tokenizer is known to end a word there
whatever follows: by the rules of this module, not by guesses from samples. Other texts are encoded
whole. Knows nothing about files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

Encode = Callable[[list[str]], list[list[int]]]

PIECE = 1 << 16  # fewest characters of a piece
TOGETHER = 16  # pieces encoded in one call

# Letters in every known rule for words, also after normalisation: ASCII and CJK ideographs have no
# other form.
ASCII = "A-Za-z"
PLAIN = ASCII + "\u4e00-\u9fff"
# Letters of other scripts. A decomposition would end them in a mark, which is not a letter, so
# these are for text that is not normalised (or NFC).
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
    """Yield the text in pieces of at least `PIECE` characters, ended at cuts; the whole text if
    there are no cuts or `cut` is None."""
    first = 0
    while cut is not None and (found := cut.search(text, first + PIECE)):
        yield text[first : found.end()]
        first = found.end()
    yield text[first:] if first else text


def encoded(
    texts: Sequence[str], cut: Callable[[], re.Pattern[str] | None], encode: Encode
) -> list[list[int]]:
    """Encode the texts, long ones in pieces. cut: returns the cuts; called only for a long text."""
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
    """Return where a tokenizer with this tokenizer.json may be cut; None if nothing is known."""
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
    """Return cuts after one of these letters (a character class) and before a space or a line end.
    The cut is at the end of a match."""
    return re.compile(f"[{letters}](?={AT_BLANKS})")


def _letters(normalizer: dict[str, Any] | None) -> str | None:
    """Return the letters that stay letters, with nothing added or removed next to them; None if
    that is not known."""
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
    """Return whether the pre-tokenizer ends a piece after a letter before a blank, and reads
    nothing beyond."""
    steps = (
        splitter.get("pretokenizers", [])
        if splitter and splitter.get("type") == "Sequence"
        else [splitter]
    )
    found = [_step(step or {}) for step in steps]
    return None not in found and True in found


def _step(step: dict[str, Any]) -> bool | None:
    """Return True if a step ends words there, False if it makes no difference, None if not
    known."""
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
    """Return whether an added token cannot cross a cut: it has no blank next to letters, and does
    not take the blanks after it."""
    content = str(token.get("content"))
    blanks = any(character.isspace() for character in content)
    return not token.get("rstrip") and (not blanks or content.isspace())
