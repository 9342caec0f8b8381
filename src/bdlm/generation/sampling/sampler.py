"""Draws of tokens: the argmax of logits plus Gumbel noise that is a hash of the cell.

In: logits of M cells, [M, V] (or bounds of them), and the state that each cell's noise is hashed
from. Out: token ids, int64 [M]. Pure functions. Each cell is treated alone, so a row's result does
not depend on the others. Knows nothing about rows, blocks or decoders."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdlm.core import randomness
from bdlm.core.types import LogitBounds
from bdlm.generation.sampling.logits_filters import NEVER

Logits = Callable[[Tensor, Tensor], Tensor]
TOKEN = randomness.purpose("token")
FEW = 1 << 14  # up to so many scores, all are computed in float64
RUN = 64  # tokens that share one bound
TILE = 1 << 16  # bounds that are computed at a time: they stay in the processor's cache
SCALE = 63 * math.log(2.0)  # `Rarity` gives 2**63 * x
SLACK = 1e-3  # nats; more than the rounding of the bounds


def draw(
    logits_MV: Tensor,
    seed_M: Tensor,
    position_M: Tensor,
    draw_M: Tensor,
    greedy_M: Tensor | None = None,
) -> Tensor:
    """Draw one token per cell, int64 [M]: the argmax of logit + Gumbel noise, which is a sample of
    softmax(logits).

    The noise is a hash of (seed, position, draw, token id), float64 (coarser noise acts as a lower
    temperature, arXiv 2409.02908). greedy_M: bool [M], cells that take the most likely token."""
    return draw_hashed(logits_MV, token_state(seed_M, position_M, draw_M), greedy_M)


def token_state(seed: Tensor, position: Tensor, draw: Tensor) -> Tensor:
    """Return the state that a cell's token noise is hashed from, int64, the shape of the
    arguments."""
    return randomness.bits(seed, TOKEN, position, draw)


def draw_hashed(logits_MV: Tensor, state_M: Tensor, greedy_M: Tensor | None = None) -> Tensor:
    """As `draw`, from the `token_state` of each cell.

    A small number of scores is computed in float64. Of many, if most tokens are removed, only the
    others get noise; else all scores are first bounded in float32, and only the few tokens that can
    win are compared in float64. The result is that of float64 throughout."""
    some = greedy_M is not None and bool(greedy_M.any())
    if some and bool(greedy_M.all()):  # type: ignore[union-attr]
        return logits_MV.argmax(-1)
    logits_MV = logits_MV.detach()
    if logits_MV.numel() <= FEW:
        tokens = torch.arange(logits_MV.shape[1], device=logits_MV.device)
        best = (logits_MV + _gumbel(state_M[:, None], tokens)).argmax(-1)
    else:
        # an estimate of whether most are removed; either way gives the same token
        some_MK = logits_MV[:, ::RUN]
        sparse = int((some_MK == NEVER).sum()) * 4 > 3 * some_MK.numel()
        if sparse:
            row, token = (logits_MV != NEVER).nonzero(as_tuple=True)
            best = _among(logits_MV, state_M, row, token)
        else:
            best = _bounded(logits_MV, state_M)
    return (
        torch.where(greedy_M, logits_MV.argmax(-1), best) if some and greedy_M is not None else best
    )


def draw_from_bounds(bounds: LogitBounds, state_M: Tensor) -> Tensor:
    """As `draw_hashed`, from bounds of the logits: exact ones are computed for the few tokens that
    can win."""
    return _bounded(bounds.upper, state_M, bounds.exact)


def _bounded(logits_MV: Tensor, state_M: Tensor, exact: Logits | None = None) -> Tensor:
    """The token with the greatest score: float64 scores are computed only in runs of RUN tokens
    that may hold it.

    exact: computes logits, int64 [K] cells and tokens -> [K], where `logits_MV` only bounds them.
    With x = 1 - u, logit - log x bounds the score of a token. The best exact score in the run with
    the greatest bound is a threshold: only runs with a bound at or above it can hold the winner.
    Cells are processed in tiles that stay in the processor's cache."""
    cells, vocab = logits_MV.shape
    tile, runs = max(1, TILE // vocab), -(-vocab // RUN)
    rarity, bound = _workspace(vocab, tile, logits_MV.device)
    top_MB = torch.empty(cells, runs, dtype=torch.float32, device=logits_MV.device)
    for start in range(0, cells, tile):
        part = slice(start, min(start + tile, cells))
        own = bound[: part.stop - start]
        torch.sub(logits_MV[part], rarity(state_M[part]).log_(), out=own[:, :vocab])
        torch.amax(own.view(len(own), runs, RUN), 2, out=top_MB[part])
    top_MB += SCALE
    token = _run(top_MB.argmax(1), vocab)
    if exact is None:
        own_MB = logits_MV.gather(1, token)
    else:
        cell = torch.arange(cells, device=token.device).repeat_interleave(RUN)
        own_MB = exact(cell, token.flatten()).view(token.shape)
    threshold, place = (own_MB + _gumbel(state_M[:, None], token)).max(1, keepdim=True)
    reached = top_MB >= threshold - SLACK * (1 + 1e-3 * threshold.abs())
    if bool((reached.sum(1) <= 1).all()):  # each cell's best run alone
        return token.gather(1, place)[:, 0]
    row, run = reached.nonzero(as_tuple=True)
    token = run[:, None] * RUN + torch.arange(RUN, device=row.device)
    inside = token < vocab
    row, token = row[:, None].expand_as(token)[inside], token[inside]
    if exact is not None:
        able = (
            logits_MV[row, token] + _gumbel(state_M[row], token)
            >= (threshold - SLACK * (1 + 1e-3 * threshold.abs()))[row, 0]
        )
        row, token = row[able], token[able]
    return _among(logits_MV, state_M, row, token, exact)


def _run(run_M: Tensor, vocab: int) -> Tensor:
    """The tokens of one run per cell, int64 [M, RUN]; the last run is padded with its last
    token."""
    return (run_M[:, None] * RUN + torch.arange(RUN, device=run_M.device)).clamp(max=vocab - 1)


def _gumbel(state: Tensor, token: Tensor) -> Tensor:
    """The Gumbel noise of tokens, float64."""
    return -torch.log(-torch.log(randomness.uniform_of(randomness.extend_hash(state, token))))


_held = threading.local()


def _workspace(vocab: int, tile: int, device: torch.device) -> tuple[randomness.Rarity, Tensor]:
    """Memory for the bounds of a tile of cells, which each thread keeps for its next draws. The
    padding of the last run is -inf."""
    tables: dict[Any, Any] = _held.__dict__
    key = (vocab, tile, device)
    if key not in tables:
        with torch.inference_mode(False):
            bound = torch.full(
                (tile, -(-vocab // RUN) * RUN), NEVER, dtype=torch.float32, device=device
            )
        if len(tables) > 16:
            tables.clear()
        tables[key] = randomness.Rarity(vocab, tile, device), bound
    return tables[key]


def _among(
    logits_MV: Tensor, state_M: Tensor, row: Tensor, token: Tensor, exact: Logits | None = None
) -> Tensor:
    """The token with the greatest score among (row, token) pairs, int64 [M]: the lowest id among
    ties, 0 for a row without a pair."""
    score = (logits_MV[row, token] if exact is None else exact(row, token)) + _gumbel(
        state_M[row], token
    )
    cells = len(logits_MV)
    top = torch.full((cells,), NEVER, dtype=score.dtype, device=score.device).scatter_reduce_(
        0, row, score, "amax"
    )
    winner = score == top[row]
    none = torch.iinfo(torch.long).max
    best = torch.full((cells,), none, device=score.device)
    best.scatter_reduce_(0, row[winner], token[winner], "amin")
    return best.masked_fill_(best == none, 0)
