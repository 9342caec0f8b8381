"""From tokens to text: incremental decoding that never splits a character, and transformers'
streamers.

In: token ids or events. Out: the new text, or calls of a streamer. Knows nothing about blocks or
models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch

from bdlm.core.errors import ConfigError
from bdlm.generation.engine.request import Event
from bdlm.generation.sampling_params import RequestOutput

REPLACEMENT = "\ufffd"
# the most bytes, and so the most replacement characters, of a character that lacks its last byte
UNFINISHED = 3


class TextStream:
    """Turns a growing list of ids into a growing text; holds back an incomplete last character.

    The text does not depend on how the ids are divided among pushes: it equals that of pushing one
    id at a time. Where a tokenizer would rewrite characters that were already returned (byte
    fallback: one bad byte spoils the whole run of bytes), they stay."""

    def __init__(
        self, decode: Callable[[list[int]], str], context: list[int] | None = None
    ) -> None:
        """Start an empty text. context: ids before it, so that the first token is decoded as in the
        middle of a line."""
        # the ids that each push decodes again
        self._decode, self._ids = decode, list(context or [])
        self._settled = len(self._ids)  # how many of them have been returned as text
        self._known = decode(self._ids) if self._ids else ""  # the text of those
        self._out = 0  # how many characters behind it have been returned

    def push(self, ids: list[int]) -> str:
        """Return the text that these ids add."""
        count = len(self._ids)
        self._ids.extend(ids)
        tail = self._tail()
        # what is final then depends on the position of the incomplete character: halve the push
        if len(ids) > 1 and REPLACEMENT in tail[self._out :]:
            del self._ids[count:]
            half = len(ids) // 2
            return self.push(ids[:half]) + self.push(ids[half:])
        final = max(len(tail.rstrip(REPLACEMENT)), len(tail) - UNFINISHED)
        new = tail[self._out : final]
        self._out += len(new)
        if final == len(tail) > 0:
            self._ids = self._ids[self._settled :]
            self._settled, self._known, self._out = len(self._ids), self._decode(self._ids), 0
        return new

    def end(self) -> str:
        """Return what was held back."""
        new = self._tail()[self._out :]
        self._out += len(new)
        return new

    def copy(self) -> TextStream:
        """Return another stream that continues from the same state."""
        other = copy(self)
        other._ids = list(self._ids)
        return other

    def _tail(self) -> str:
        """The text of the ids that have not been returned, as far as it is known now."""
        text, known = self._decode(self._ids), self._known
        if not text.startswith(known) and not known.endswith(REPLACEMENT):
            return self._decode(self._ids[self._settled :])
        while not text.startswith(known):  # the context ended inside a character
            known = known[:-1]
        return text[len(known) :]


def feed(streamer: Any, prompt: list[int], events: Iterable[Event], mask_id: int) -> RequestOutput:
    """Send one request's events to a transformers `TextDiffusionStreamer` (put, put_draft, end); a
    plain `TextStreamer` gets no drafts.

    The prompt is put first, as transformers does. A draft holds the new cells of the block being
    denoised, with `mask_id` where they are masked. Returns the request's result. Raises ConfigError
    if the events hold none."""
    result = None
    streamer.put(torch.tensor([prompt]))
    for event in events:
        if event.kind == "draft" and hasattr(streamer, "put_draft"):
            cells = [
                mask_id if masked else token
                for token, masked in zip(event.ids, event.masked, strict=True)
            ]
            streamer.put_draft(torch.tensor(cells[event.known :]))
        elif event.kind == "commit":
            streamer.put(torch.tensor(event.tokens))
        elif event.result is not None:
            result = event.result
    streamer.end()
    if result is None:
        raise ConfigError("the events end without a result; give all events of one text")
    return result
