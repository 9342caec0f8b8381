"""When a row ends: stop tokens, stop strings across block borders, low entropy, length. Row by row, never pooled (spec 4.6).

In: the new tokens of a row so far. Out: how many of them count, and why it ended. Knows nothing about models or canvases.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from bdlm.generation.params import FinishReason, Params

Decode = Callable[[list[int]], str]


def entropy(tokens: Sequence[int]) -> float:
    """Plug-in entropy of a token histogram, nats; at most ln(len(tokens))."""
    total = len(tokens)
    return -sum(c / total * math.log(c / total) for c in Counter(tokens).values())


def finish(
    tokens: list[int], fresh: int, params: Params, stop_tokens: frozenset[int], decode: Decode | None
) -> tuple[int, FinishReason] | None:
    """How many of a row's new tokens count and why it ends, or None to go on.

    tokens: all new tokens of the row. fresh: how many at the end have not been looked at before.
    """
    ends: list[tuple[int, FinishReason]] = []
    first = max(len(tokens) - fresh, params.min_new_tokens)
    hit = next((i for i in range(first, len(tokens)) if tokens[i] in stop_tokens), None)
    if hit is not None:
        ends.append((hit, "stop_token"))
    if params.stop and decode is not None:
        cut = _stop_text(tokens, fresh, params, decode)
        if cut is not None:
            ends.append((cut, "stop_text"))
    if ends:
        return min(ends)
    if params.min_entropy is not None and len(tokens) >= params.entropy_window:
        if entropy(tokens[-params.entropy_window :]) < params.min_entropy:
            return len(tokens) - params.entropy_window, "low_entropy"
    if len(tokens) >= params.max_new_tokens:
        return params.max_new_tokens, "length"
    return None


def _stop_text(tokens: list[int], fresh: int, params: Params, decode: Decode) -> int | None:
    """The number of tokens whose text ends before the first stop string, or None. Looks at the new part and what could overlap it."""
    longest = max(len(s.encode()) for s in params.stop)
    back = max(0, len(tokens) - fresh - longest)
    text = decode(tokens[back:])
    if not any(s in text for s in params.stop):
        return None
    for count in range(max(back, params.min_new_tokens) + 1, len(tokens) + 1):
        part = decode(tokens[back:count])
        if any(s in part for s in params.stop):
            return count
    return None
