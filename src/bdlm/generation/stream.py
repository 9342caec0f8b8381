"""From events to text: committed ids without ever splitting a character, and transformers' streamers.

In: token ids or events. Out: the new text, or calls of a streamer. Knows nothing about blocks or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bdlm.core.errors import ConfigError
from bdlm.generation.params import Result
from bdlm.generation.requests import Event

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


def feed(streamer: Any, prompt: list[int], events: Iterable[Event], mask_id: int) -> Result:
    """Tell a transformers `TextDiffusionStreamer` (put, put_draft, end) of one text's events; a plain `TextStreamer` gets no drafts.

    The prompt is put first, as transformers does. A draft holds the new cells of the block being written, with `mask_id` where they are
    still masked. Returns the result. Raises ConfigError if the events hold none.
    """
    given, size, result = len(prompt), 0, None
    streamer.put(torch.tensor([prompt]))
    for event in events:
        if event.kind == "draft" and hasattr(streamer, "put_draft"):
            size = size or len(event.ids)
            known = given % size if size else 0
            cells = [mask_id if hidden else token for token, hidden in zip(event.ids, event.masked, strict=True)]
            streamer.put_draft(torch.tensor(cells[known:]))
        elif event.kind == "commit":
            given = 0
            streamer.put(torch.tensor(event.tokens))
        elif event.result is not None:
            result = event.result
    streamer.end()
    if result is None:
        raise ConfigError("the events end without a result; give all events of one text")
    return result
