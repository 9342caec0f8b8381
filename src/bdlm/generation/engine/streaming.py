"""From events to text: committed ids without ever splitting a character, and transformers'
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
# most bytes, and so most replacement characters, of a character that lacks its last byte
UNFINISHED = 3


class TextStream:
    """Turns growing ids into growing text; holds back a tail that is not yet a whole character.

    The text does not depend on how the ids are cut into pushes: it is the text that comes out one
    id at a time. Where a tokenizer would rewrite characters that are out already (byte fallback:
    one bad byte spoils the whole run of bytes), they stay."""

    def __init__(
        self, decode: Callable[[list[int]], str], context: list[int] | None = None
    ) -> None:
        """context: ids before the text, so that the first token is decoded as in the middle of a
        line."""
        # the ids that are decoded anew with each push
        self._decode, self._ids = decode, list(context or [])
        self._settled = len(self._ids)  # how many of them are told
        self._known = decode(self._ids) if self._ids else ""  # the text of those
        self._out = 0  # how many characters behind it are told

    def push(self, ids: list[int]) -> str:
        """The text that these ids add."""
        count = len(self._ids)
        self._ids.extend(ids)
        tail = self._tail()
        # what is final then depends on the place: look at fewer ids
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
        """What was held back."""
        new = self._tail()[self._out :]
        self._out += len(new)
        return new

    def copy(self) -> TextStream:
        """Another one that goes on from the same place."""
        other = copy(self)
        other._ids = list(self._ids)
        return other

    def _tail(self) -> str:
        """The text of the ids that are not told, as far as it is known now."""
        text, known = self._decode(self._ids), self._known
        if not text.startswith(known) and not known.endswith(REPLACEMENT):
            return self._decode(self._ids[self._settled :])
        while not text.startswith(known):  # the context ended inside a character
            known = known[:-1]
        return text[len(known) :]


def feed(streamer: Any, prompt: list[int], events: Iterable[Event], mask_id: int) -> RequestOutput:
    """Tell a transformers `TextDiffusionStreamer` (put, put_draft, end) of one text's events; a
    plain `TextStreamer` gets no drafts.

    The prompt is put first, as transformers does. A draft holds the new cells of the block being
    written, with `mask_id` where they are still masked. Returns the result. Raises ConfigError if
    the events hold none."""
    result = None
    streamer.put(torch.tensor([prompt]))
    for event in events:
        if event.kind == "draft" and hasattr(streamer, "put_draft"):
            cells = [
                mask_id if hidden else token
                for token, hidden in zip(event.ids, event.masked, strict=True)
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
