"""What happens to logits between the model and the decoder: forbid, temper, cut to the likely
tokens, draw.

In: logits of the M planned cells, [M, V]. Out: logits again (removed tokens at -inf), or drawn ids
[M]. Pure functions; knows nothing about rows, blocks or decoders. Every cell is treated alone, so
neighbours never matter."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdlm.core import randomness
from bdlm.core.types import LogitBounds

Logits = Callable[[Tensor, Tensor], Tensor]
NEVER = float("-inf")
BINS = 2048  # bins of the nucleus' histogram; only the tokens of one bin are ever sorted
SORT_BELOW = 4096  # vocabularies up to this size are sorted: cheaper than a histogram
TOKEN = randomness.purpose("token")
FEW = 1 << 14  # scores that are compared in float64 without more ado
RUN = 64  # tokens that are bounded together
TILE = 1 << 16  # bounds that are made at a time: they stay in the processor's cache
SCALE = 63 * math.log(2.0)  # `Rarity` gives 2**63 * x
SLACK = 1e-3  # nats; more than the bounds' rounding
# below this temperature logits are divided after their maximum was taken off: quotients could
# overflow
COLD = 1e-3
# temperatures between which logits are divided
LEAST, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def forbid(logits_MV: Tensor, tokens: Tensor | int) -> Tensor:
    """The same logits with some tokens (int64 [K] or one id) impossible, for every cell. Changes
    `logits_MV` in place."""
    if isinstance(tokens, int):
        logits_MV[:, tokens] = NEVER
        return logits_MV
    return logits_MV.index_fill_(1, tokens, NEVER)


def usable(temperature: float) -> float:
    """The temperature that logits are divided by: 0 (greedy) below what float32 divides by, at most
    the greatest float32 (uniform)."""
    return 0.0 if temperature < LEAST else min(temperature, MOST)


def temper(logits_MV: Tensor, temperature_M: Tensor) -> Tensor:
    """Logits divided by the temperature, at least in float32; 0 leaves them (the draw is then the
    argmax).

    temperature_M: float32 [M], each as `usable` gives it. Where it is small, the greatest logit is
    taken off first, so that it stays finite: the limit is the argmax.
    """
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    top_M = logits_MV.amax(-1)
    cold_M = (temperature_M > 0) & (temperature_M < COLD) & top_M.isfinite()
    divisor_M = torch.where(temperature_M == 0, 1.0, temperature_M).to(logits_MV.dtype)
    return (logits_MV - torch.where(cold_M, top_M, 0.0)[:, None]) / divisor_M[:, None]


def top_k(logits_MV: Tensor, k: int | Tensor) -> Tensor:
    """Only the k most likely tokens; equal ones at the border stay together. k: one value or int64
    [M], 0 = all."""
    k_M = torch.as_tensor(k, device=logits_MV.device).expand(logits_MV.shape[0])
    most = min(int(k_M.max()), logits_MV.shape[1]) if len(k_M) else 0
    if most < 1:
        return logits_MV
    top = logits_MV.topk(most, -1).values
    border = top.gather(1, (k_M.clamp(1, most) - 1)[:, None])
    return logits_MV.masked_fill((logits_MV < border) & (k_M > 0)[:, None], NEVER)


def nucleus(logits_MV: Tensor, p: Tensor | float, reference: Tensor | bool = False) -> Tensor:
    """Only the most likely tokens that together hold probability p (Holtzman et al. 2020).

    p: in (0, 1], one value or float [M]; 1 keeps every token. Standard: the token that crosses p
    stays. `reference` (one value or bool [M]): it goes, as in the published sampler. The most
    likely token always stays; equal ones are taken in the order of ids."""
    share_M = torch.as_tensor(p, dtype=torch.float64, device=logits_MV.device).expand(
        logits_MV.shape[0]
    )
    if bool((share_M >= 1).all()):
        return logits_MV
    probs_MV = logits_MV.float().softmax(-1)
    reference_M = torch.as_tensor(reference, device=logits_MV.device).expand(logits_MV.shape[0])
    if logits_MV.shape[1] <= SORT_BELOW or logits_MV.device.type != "cpu":
        keep = _keep_sorted(probs_MV, share_M, reference_M)
    else:
        keep = _keep_binned(logits_MV, probs_MV, share_M, reference_M)
    keep |= (share_M >= 1)[:, None]
    return logits_MV.masked_fill(~keep, NEVER)


def min_p(logits_MV: Tensor, share: Tensor | float) -> Tensor:
    """Only tokens with at least `share` times the probability of the likeliest one (Nguyen et al.
    2024).

    share: in [0, 1], one value or float [M]; 0 keeps every token. The likeliest token always stays.
    """
    share_M = torch.as_tensor(share, dtype=torch.float32, device=logits_MV.device).expand(
        logits_MV.shape[0]
    )
    wide_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    border_M = wide_MV.amax(-1) + share_M.log()
    return logits_MV.masked_fill(wide_MV < border_M[:, None], NEVER)


def empty(logits_MV: Tensor) -> Tensor:
    """Cells without a token that could be drawn (all are at -inf, or some are not numbers), bool
    [M]."""
    return ~(logits_MV.amax(-1) > NEVER)


def _inside(before: Tensor, own: Tensor, share: Tensor, reference: Tensor) -> Tensor:
    """Whether a token stays, from the mass of the likelier ones and its own."""
    return torch.where(reference, (before + own <= share) | (before == 0), before < share)


def _keep_sorted(probs_MV: Tensor, share_M: Tensor, reference_M: Tensor) -> Tensor:
    sorted_MV, index_MV = probs_MV.double().sort(dim=-1, descending=True, stable=True)
    before = sorted_MV.cumsum(-1) - sorted_MV
    inside = _inside(before, sorted_MV, share_M[:, None], reference_M[:, None])
    inside[:, 0] = True
    return torch.zeros_like(inside).scatter_(1, index_MV, inside)


def _keep_binned(
    logits_MV: Tensor, probs_MV: Tensor, share_M: Tensor, reference_M: Tensor
) -> Tensor:
    """As `_keep_sorted` without a full sort: masses of bins of logits tell in which bin p is
    crossed; that bin alone is sorted."""
    rows = torch.arange(logits_MV.shape[0])
    finite = logits_MV != NEVER
    top_M1 = logits_MV.amax(-1, keepdim=True)
    low_M1 = torch.where(finite, logits_MV, top_M1).amin(-1, keepdim=True)
    span_M1 = (top_M1 - low_M1).clamp(1e-6, 24.0)
    bin_MV = ((top_M1 - logits_MV) * ((BINS - 1) / span_M1)).clamp_(max=BINS - 1).long()
    mass = torch.zeros(len(rows), BINS, dtype=torch.float64).scatter_add_(
        1, bin_MV, probs_MV.double()
    )
    total = mass.cumsum(1)
    crossing_M = (total < share_M[:, None]).sum(1).clamp(max=BINS - 1)
    keep = bin_MV < crossing_M[:, None]
    row, token = (bin_MV == crossing_M[:, None]).nonzero(as_tuple=True)
    own = probs_MV[row, token].double()
    order = own.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, token, own = row[order], token[order], own[order]
    running = own.cumsum(0) - own
    opening = torch.ones_like(row, dtype=torch.bool)
    opening[1:] = row[1:] != row[:-1]
    first_M = torch.zeros(len(rows), dtype=torch.float64).index_add_(
        0, row[opening], running[opening]
    )
    below_M = torch.where(crossing_M > 0, total[rows, (crossing_M - 1).clamp(min=0)], 0.0)
    before = running - first_M[row] + below_M[row]
    keep[row, token] = _inside(before, own, share_M[row], reference_M[row]) | (
        opening & (crossing_M[row] == 0)
    )
    return keep


def draw(
    logits_MV: Tensor,
    seed_M: Tensor,
    position_M: Tensor,
    draw_M: Tensor,
    greedy_M: Tensor | None = None,
) -> Tensor:
    """One token for each cell, int64 [M]: the argmax of logit + Gumbel noise, which is a sample of
    softmax(logits).

    The noise is a hash of (seed, position, draw, token id), float64 (coarser noise acts as a
    lower temperature, arXiv 2409.02908). greedy_M: bool [M], cells that take the likeliest token.
    """
    return draw_hashed(logits_MV, token_state(seed_M, position_M, draw_M), greedy_M)


def token_state(seed: Tensor, position: Tensor, draw: Tensor) -> Tensor:
    """What a cell's token noise is hashed from, int64, the shape of the arguments."""
    return randomness.bits(seed, TOKEN, position, draw)


def draw_hashed(logits_MV: Tensor, state_M: Tensor, greedy_M: Tensor | None = None) -> Tensor:
    """As `draw`, from `token_state` of each cell.

    Few tokens are compared in float64. Of many, where most are removed, noise is made for the rest
    only; else it is first bounded for all tokens in single precision, and the few that can win are
    compared in float64: the result is that of float64 throughout."""
    some = greedy_M is not None and bool(greedy_M.any())
    if some and bool(greedy_M.all()):  # type: ignore[union-attr]
        return logits_MV.argmax(-1)
    logits_MV = logits_MV.detach()
    if logits_MV.numel() <= FEW:
        tokens = torch.arange(logits_MV.shape[1], device=logits_MV.device)
        best = (logits_MV + _gumbel(state_M[:, None], tokens)).argmax(-1)
    else:
        # tells whether most are removed; either way gives the same token
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
    """As `draw_hashed`, from bounds of the logits: exact ones are asked for the few tokens that can
    win."""
    return _bounded(bounds.upper, state_M, bounds.exact)


def _bounded(logits_MV: Tensor, state_M: Tensor, exact: Logits | None = None) -> Tensor:
    """The winner among all tokens: only runs of RUN tokens that may hold it are looked at in
    float64.

    exact: what gives the logits themselves, int64 [K] cells and tokens -> [K], where `logits_MV`
    only bounds them. x = 1 - u bounds the score of a token by logit - log x. The exact scores in
    the run with the greatest bound give a mark; only runs whose bound reaches it can hold the
    winner. Cells are taken in tiles that stay in the processor's cache."""
    cells, vocab = logits_MV.shape
    tile, runs = max(1, TILE // vocab), -(-vocab // RUN)
    rarity, bound = _workspace(vocab, tile, logits_MV.device)
    top_MB = torch.empty(cells, runs, dtype=torch.float32, device=logits_MV.device)
    for start in range(0, cells, tile):
        mine = slice(start, min(start + tile, cells))
        own = bound[: mine.stop - start]
        torch.sub(logits_MV[mine], rarity(state_M[mine]).log_(), out=own[:, :vocab])
        torch.amax(own.view(len(own), runs, RUN), 2, out=top_MB[mine])
    top_MB += SCALE
    token = _run(top_MB.argmax(1), vocab)
    if exact is None:
        own_MB = logits_MV.gather(1, token)
    else:
        cell = torch.arange(cells, device=token.device).repeat_interleave(RUN)
        own_MB = exact(cell, token.flatten()).view(token.shape)
    mark, place = (own_MB + _gumbel(state_M[:, None], token)).max(1, keepdim=True)
    reached = top_MB >= mark - SLACK * (1 + 1e-3 * mark.abs())
    if bool((reached.sum(1) <= 1).all()):  # each cell's best run alone
        return token.gather(1, place)[:, 0]
    row, run = reached.nonzero(as_tuple=True)
    token = run[:, None] * RUN + torch.arange(RUN, device=row.device)
    inside = token < vocab
    row, token = row[:, None].expand_as(token)[inside], token[inside]
    if exact is not None:
        able = (
            logits_MV[row, token] + _gumbel(state_M[row], token)
            >= (mark - SLACK * (1 + 1e-3 * mark.abs()))[row, 0]
        )
        row, token = row[able], token[able]
    return _among(logits_MV, state_M, row, token, exact)


def _run(run_M: Tensor, vocab: int) -> Tensor:
    """The tokens of one run a cell, int64 [M, RUN]; the last run is filled up with its last
    token."""
    return (run_M[:, None] * RUN + torch.arange(RUN, device=run_M.device)).clamp(max=vocab - 1)


def _gumbel(state: Tensor, token: Tensor) -> Tensor:
    """The noise of tokens, float64."""
    return -torch.log(-torch.log(randomness.uniform_of(randomness.follow(state, token))))


_held = threading.local()


def _workspace(vocab: int, tile: int, device: torch.device) -> tuple[randomness.Rarity, Tensor]:
    """Memory for the bounds of a tile of cells, kept from call to call (each thread has its own).
    The last run's spare places are never."""
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
    """The winner among (row, token) pairs (the lowest id among equals; 0 for a row without one),
    int64 [M]."""
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


def log_prob(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """Log-probability of one token a cell, nats, float32 [M]."""
    return logits_MV.float().log_softmax(-1).gather(1, ids_M[:, None])[:, 0]
