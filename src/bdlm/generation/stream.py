"""From committed ids to text, without ever splitting a character.

In: token ids as they are committed. Out: the new text. Knows nothing about blocks or models.
"""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\ufffd"


class TextStream:
    """Turns growing ids into growing text; holds back a tail that is not yet a whole character."""

    def __init__(self, decode: Callable[[list[int]], str], context: list[int] | None = None) -> None:
        """context: ids before the text, so that the first token is decoded as in the middle of a line."""
        self._decode, self._ids = decode, list(context or [])
        self._text = self._whole(self._decode(self._ids)) if self._ids else ""

    @staticmethod
    def _whole(text: str) -> str:
        return text.rstrip(REPLACEMENT)

    def push(self, ids: list[int]) -> str:
        """The text that these ids add."""
        self._ids.extend(ids)
        return self._advance(self._whole(self._decode(self._ids)))

    def end(self) -> str:
        """What was held back."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._text) :]
        self._text = text
        return new
