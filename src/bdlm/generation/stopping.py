"""When a row ends: stop tokens, stop strings across block borders, low entropy, length. Row by row, never pooled.

In: finished blocks. Out: how many new tokens count, and why a row ended. Stop tokens and length are looked at for all rows at once; only
rows that ask for stop strings or an entropy are looked at one by one. Knows nothing about models. Source: arXiv 2503.09573, App. C.5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdlm.generation.params import FinishReason, Params

Decode = Callable[[list[int]], str]
NONE = -1  # pads rows of stop tokens


class Stops:
    """The stop tokens of every row, int64 [R, K] padded with NONE, and the place before which they may not be written, int64 [R]."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tokens = torch.full((rows, 1), NONE, dtype=torch.long, device=device)
        self.floor = torch.zeros(rows, dtype=torch.long, device=device)

    def enter(self, rows: list[int], tokens: list[list[int]], floor: list[int]) -> None:
        width = max(map(len, tokens), default=0)
        if width > self.tokens.shape[1]:
            more = self.tokens.new_full((len(self.tokens), width - self.tokens.shape[1]), NONE)
            self.tokens = torch.cat((self.tokens, more), 1)
        padded = [t + [NONE] * (self.tokens.shape[1] - len(t)) for t in tokens]
        self.tokens[rows], self.floor[rows] = (torch.tensor(x, device=self.tokens.device) for x in (padded, floor))

    def first(self, rows: Tensor, ids: Tensor, position: Tensor, new: Tensor) -> Tensor:
        """Place of the first stop token among the `new` cells, bool [k, n], of some rows; a place beyond all texts where there is none."""
        hit = (ids[:, :, None] == self.tokens[rows][:, None, :]).any(2) & new & (position >= self.floor[rows][:, None])
        return torch.where(hit, position, torch.iinfo(torch.long).max).amin(1)


def looks_at_text(params: Params) -> bool:
    """Whether a row asks for more than stop tokens and length."""
    return bool(params.stop) or params.min_entropy is not None


def entropy(tokens: Sequence[int]) -> float:
    """Plug-in entropy of a token histogram, nats; at most ln(len(tokens))."""
    total = len(tokens)
    return -sum(c / total * math.log(c / total) for c in Counter(tokens).values())


def text_end(tokens: list[int], fresh: int, params: Params, decode: Decode | None) -> tuple[int, FinishReason] | None:
    """How many of a row's new tokens count before a stop string or where its entropy fell, or None to go on.

    tokens: all new tokens of the row. fresh: how many at the end have not been looked at before.
    """
    if params.stop and decode is not None:
        cut = _stop_text(tokens, fresh, params, decode)
        if cut is not None:
            return cut, "stop_text"
    if params.min_entropy is None or len(tokens) < params.entropy_window:
        return None
    low = entropy(tokens[-params.entropy_window :]) < params.min_entropy
    return (len(tokens) - params.entropy_window, "low_entropy") if low else None


def find_stop(text: str, stops: Sequence[str], early: int = 0) -> int | None:
    """Where the first stop string begins that ends behind the first `early` characters, or None."""
    found = [at for s in stops if (at := text.find(s, max(0, early - len(s) + 1))) >= 0]
    return min(found, default=None)


def until_stop(text: str, stops: Sequence[str], early: int) -> str:
    """The text before the first stop string that ends behind its first `early` characters."""
    return text[: find_stop(text, stops, early)]


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many last characters may yet turn out to begin a stop string."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def _stop_text(tokens: list[int], fresh: int, params: Params, decode: Decode) -> int | None:
    """The number of tokens with which the first stop string is complete, or None. Looks at the new part and what could overlap it.

    Stop strings that are complete with the first `min_new_tokens` tokens do not count.
    """
    longest = max(len(s.encode()) for s in params.stop)
    back = max(0, len(tokens) - fresh - longest)
    early = len(decode(tokens[back : max(back, params.min_new_tokens)]))
    if find_stop(decode(tokens[back:]), params.stop, early) is None:
        return None
    for count in range(max(back, params.min_new_tokens) + 1, len(tokens) + 1):
        if find_stop(decode(tokens[back:count]), params.stop, early) is not None:
            return count
    return None
