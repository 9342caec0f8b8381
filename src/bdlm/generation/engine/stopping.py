"""When a row ends: stop tokens, stop strings (also across block borders), low entropy, length.

In: finished blocks. Out: how many new tokens count, and why a row ended. Each row is treated alone.
Stop tokens and length are checked for all rows at once; only rows with stop strings or
`min_entropy` are checked one by one. `TextSearch` also makes the text that a user reads, so that
the engine and the reader agree on where it ends. Knows nothing about models. Source: arXiv
2503.09573, App. C.5."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdlm.core.types import ModelSpec
from bdlm.generation.engine.streaming import TextStream
from bdlm.generation.sampling_params import SamplingParams

Decode = Callable[[list[int]], str]
NONE = -1  # pads rows of stop tokens


class StopTokens:
    """The stop tokens of every row, int64 [R, K] padded with NONE, and the position before which
    they must not be written, int64 [R]."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.tokens = torch.full((num_rows, 1), NONE, dtype=torch.long, device=device)
        self.floor = torch.zeros(num_rows, dtype=torch.long, device=device)

    def enter(self, rows: list[int], tokens: list[list[int]], floor: list[int]) -> None:
        """Set the stop tokens and floors of requests that took these rows."""
        width = max(map(len, tokens), default=0)
        if width > self.tokens.shape[1]:
            more = self.tokens.new_full((len(self.tokens), width - self.tokens.shape[1]), NONE)
            self.tokens = torch.cat((self.tokens, more), 1)
        padded = [t + [NONE] * (self.tokens.shape[1] - len(t)) for t in tokens]
        self.tokens[rows] = torch.tensor(padded, device=self.tokens.device)
        self.floor[rows] = torch.tensor(floor, device=self.tokens.device)

    def is_early(self, position: Tensor) -> Tensor:
        """Whether stop tokens must not be written at these positions, int64 [R, n]; bool [R, n]."""
        return position < self.floor[:, None]

    def first(self, rows: Tensor, ids: Tensor, position: Tensor, new: Tensor) -> Tensor:
        """Return the position of the first stop token among the `new` cells, bool [k, n], of some
        rows, int64 [k]; where there is none, a position beyond every row's end."""
        hit = (
            (ids[:, :, None] == self.tokens[rows][:, None, :]).any(2)
            & new
            & (position >= self.floor[rows][:, None])
        )
        return torch.where(hit, position, torch.iinfo(torch.long).max).amin(1)


def stop_tokens_of(params: SamplingParams, spec: ModelSpec) -> list[int]:
    """Return the ids that end a request: its own, and the model's unless `ignore_eos`."""
    ends = () if spec.stop_token is None else (spec.stop_token,)
    of_model = () if params.ignore_eos else (*ends, *spec.other_stop_tokens)
    return sorted({*params.stop_token_ids, *of_model})


def entropy(tokens: Sequence[int]) -> float:
    """Return the plug-in entropy of a token histogram, nats, in [0, ln(len(tokens))]."""
    total = len(tokens)
    return -sum(c / total * math.log(c / total) for c in Counter(tokens).values())


def find_stop(text: str, stops: Sequence[str], early: int = 0) -> int | None:
    """Return where the first stop string begins that ends behind the first `early` characters, or
    None."""
    found = [at for s in stops if (at := text.find(s, max(0, early - len(s) + 1))) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many of the last characters may be the beginning of a stop string."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


class TextSearch:
    """Decodes a row's new tokens as they come, and cuts the text before the first stop string.

    text: the text so far. tokens: how many have been read. end: the number of tokens that complete
    the first stop string, or None."""

    def __init__(
        self, decode: Decode, prompt: list[int], stops: Sequence[str] = (), min_new_tokens: int = 0
    ) -> None:
        """Start with an empty text.

        prompt: ids before the new ones: they decide whether the first of those begins with a space.
        min_new_tokens: stop strings that are complete with so many tokens do not count."""
        self.text, self.tokens = "", 0
        self.end: int | None = None
        self._stream, self._stops = TextStream(decode, prompt), stops
        self._floor, self._early = min_new_tokens, 0

    def push(self, tokens: list[int]) -> None:
        """Read more tokens; those behind the end are ignored."""
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
        for token in rest:  # find the one that completes it
            new = before.push([token])
            at = self._found(new)
            self._add(new, 1)
            if at is not None:
                self.text, self.end = self.text[:at], self.tokens
                return

    def finish(self) -> None:
        """Add what was held back (half a character): no more tokens come."""
        if self.end is not None:
            return
        new = self._stream.end()
        at = self._found(new)
        self._add(new, 0)
        if at is not None:
            self.text, self.end = self.text[:at], self.tokens

    @property
    def settled(self) -> str:
        """The text without the last characters that may be the beginning of a stop string."""
        if self.end is not None:
            return self.text
        return self.text[: len(self.text) - held_back(self.text, self._stops)]

    def _add(self, text: str, tokens: int) -> None:
        self.text, self.tokens = self.text + text, self.tokens + tokens

    def _found(self, new: str) -> int | None:
        """Where the first stop string begins that ends in the new text, which follows the text so
        far."""
        return find_stop(self.text + new, self._stops, max(self._early, len(self.text)))


def low_entropy(tokens: Sequence[int], params: SamplingParams) -> bool:
    """Whether the entropy of the last `entropy_window` tokens is below `min_entropy`."""
    window = params.entropy_window
    if params.min_entropy is None or len(tokens) < window:
        return False
    return entropy(tokens[-window:]) < params.min_entropy
