"""When a row ends: stop tokens, stop strings across block borders, low entropy, length. Row by row,
never pooled.

In: finished blocks. Out: how many new tokens count, and why a row ended. Stop tokens and length are
looked at for all rows at once; only rows that ask for stop strings or an entropy are looked at one
by one. `TextSearch` is also what a user's text is made by, so that the engine and the reader agree
on where it ends. Knows nothing about models. Source: arXiv 2503.09573, App. C.5."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdlm.generation.engine.streaming import TextStream
from bdlm.generation.sampling_params import SamplingParams

Decode = Callable[[list[int]], str]
NONE = -1  # pads rows of stop tokens


class Stops:
    """The stop tokens of every row, int64 [R, K] padded with NONE, and the place before which they
    may not be written, int64 [R]."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tokens = torch.full((rows, 1), NONE, dtype=torch.long, device=device)
        self.floor = torch.zeros(rows, dtype=torch.long, device=device)
        self.searches: dict[int, TextSearch] = {}  # of the rows that have stop strings

    def enter(self, rows: list[int], tokens: list[list[int]], floor: list[int]) -> None:
        for row in rows:
            self.searches.pop(row, None)
        width = max(map(len, tokens), default=0)
        if width > self.tokens.shape[1]:
            more = self.tokens.new_full((len(self.tokens), width - self.tokens.shape[1]), NONE)
            self.tokens = torch.cat((self.tokens, more), 1)
        padded = [t + [NONE] * (self.tokens.shape[1] - len(t)) for t in tokens]
        self.tokens[rows], self.floor[rows] = (
            torch.tensor(x, device=self.tokens.device) for x in (padded, floor)
        )

    def first(self, rows: Tensor, ids: Tensor, position: Tensor, new: Tensor) -> Tensor:
        """Place of the first stop token among the `new` cells, bool [k, n], of some rows; a place
        beyond all texts where there is none."""
        hit = (
            (ids[:, :, None] == self.tokens[rows][:, None, :]).any(2)
            & new
            & (position >= self.floor[rows][:, None])
        )
        return torch.where(hit, position, torch.iinfo(torch.long).max).amin(1)


def entropy(tokens: Sequence[int]) -> float:
    """Plug-in entropy of a token histogram, nats; at most ln(len(tokens))."""
    total = len(tokens)
    return -sum(c / total * math.log(c / total) for c in Counter(tokens).values())


def find_stop(text: str, stops: Sequence[str], early: int = 0) -> int | None:
    """Where the first stop string begins that ends behind the first `early` characters, or None."""
    found = [at for s in stops if (at := text.find(s, max(0, early - len(s) + 1))) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many last characters may yet turn out to begin a stop string."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


class TextSearch:
    """The text of a row's new tokens as it grows, cut before the first stop string.

    text: what is known of it. tokens: how many have been looked at. end: the number of tokens with
    which the first stop string is complete, or None."""

    def __init__(
        self, decode: Decode, prompt: list[int], stops: Sequence[str] = (), min_new_tokens: int = 0
    ) -> None:
        """prompt: ids before the new ones: whether the first of those begins with a space depends
        on them. Stop strings that are complete with the first `min_new_tokens` tokens do not
        count."""
        self.text, self.tokens = "", 0
        self.end: int | None = None
        self._stream, self._stops, self._floor, self._early = (
            TextStream(decode, prompt),
            stops,
            min_new_tokens,
            0,
        )

    def push(self, tokens: list[int]) -> None:
        """Look at more tokens; those behind the end are left out."""
        free = tokens[: max(0, self._floor - self.tokens)]
        if free:
            self._add(self._stream.push(free), len(free))
            self._early = len(self.text)
        rest = tokens[len(free) :]
        if not rest or self.end is not None:
            return
        before = self._stream.copy() if self._stops else self._stream
        new = self._stream.push(rest)
        if self._found(new) is None:
            self._add(new, len(rest))
            return
        for token in rest:  # which of them completes it
            new = before.push([token])
            at = self._found(new)
            self._add(new, 1)
            if at is not None:
                self.text, self.end = self.text[:at], self.tokens
                return

    def finish(self) -> None:
        """No more tokens come: what was held back, half a character, is a part of the text."""
        if self.end is not None:
            return
        new = self._stream.end()
        at = self._found(new)
        self._add(new, 0)
        if at is not None:
            self.text, self.end = self.text[:at], self.tokens

    @property
    def settled(self) -> str:
        """The text without last characters that may yet turn out to begin a stop string."""
        return (
            self.text
            if self.end is not None
            else self.text[: len(self.text) - held_back(self.text, self._stops)]
        )

    def _add(self, text: str, tokens: int) -> None:
        self.text, self.tokens = self.text + text, self.tokens + tokens

    def _found(self, new: str) -> int | None:
        """Where the first stop string begins that ends in the new text, which follows what is
        known."""
        return find_stop(self.text + new, self._stops, max(self._early, len(self.text)))


def low_entropy(tokens: Sequence[int], params: SamplingParams) -> bool:
    """Whether the last `entropy_window` of a row's tokens are too much alike."""
    window = params.entropy_window
    return (
        params.min_entropy is not None
        and len(tokens) >= window
        and entropy(tokens[-window:]) < params.min_entropy
    )
