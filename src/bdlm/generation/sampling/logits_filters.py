"""Filters of logits: forbid tokens, apply the temperature, keep the likely tokens.

In: logits of M cells, [M, V]. Out: logits again (removed tokens at -inf), or a log-probability per
cell. Pure functions. Each cell is treated alone, so a row's result does not depend on the others.
Knows nothing about rows, blocks, decoders or noise."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")  # the logit of a token that cannot be drawn
BINS = 2048  # bins of the histogram that `nucleus` uses; only the tokens of one bin are sorted
SORT_BELOW = 4096  # up to this vocabulary size a full sort is cheaper than the histogram
# below this temperature the greatest logit is subtracted before the division, which could overflow
COLD = 1e-3
# the range of temperatures that logits are divided by
LEAST, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def forbid(logits_MV: Tensor, tokens: Tensor | int) -> Tensor:
    """Set the logits of some tokens (int64 [K] or one id) to -inf for every cell, in place, and
    return them."""
    if isinstance(tokens, int):
        logits_MV[:, tokens] = NEVER
        return logits_MV
    return logits_MV.index_fill_(1, tokens, NEVER)


def clamp_temperature(temperature: float) -> float:
    """Return the temperature that logits can be divided by: 0 (greedy) below the smallest normal
    float32, at most the greatest float32 (uniform)."""
    return 0.0 if temperature < LEAST else min(temperature, MOST)


def temper(logits_MV: Tensor, temperature_M: Tensor) -> Tensor:
    """Divide logits by the temperature, at least in float32; 0 leaves them (the draw is then the
    argmax).

    temperature_M: float32 [M], results of `clamp_temperature`. Where it is small, the greatest
    logit is subtracted first, so that quotients stay finite: the limit is the argmax."""
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    top_M = logits_MV.amax(-1)
    cold_M = (temperature_M > 0) & (temperature_M < COLD) & top_M.isfinite()
    divisor_M = torch.where(temperature_M == 0, 1.0, temperature_M).to(logits_MV.dtype)
    return (logits_MV - torch.where(cold_M, top_M, 0.0)[:, None]) / divisor_M[:, None]


def top_k(logits_MV: Tensor, k: int | Tensor) -> Tensor:
    """Keep only the k most likely tokens; ties at the border are all kept. k: one value or int64
    [M], 0 = all."""
    k_M = torch.as_tensor(k, device=logits_MV.device).expand(logits_MV.shape[0])
    most = min(int(k_M.max()), logits_MV.shape[1]) if len(k_M) else 0
    if most < 1:
        return logits_MV
    top = logits_MV.topk(most, -1).values
    border = top.gather(1, (k_M.clamp(1, most) - 1)[:, None])
    return logits_MV.masked_fill((logits_MV < border) & (k_M > 0)[:, None], NEVER)


def nucleus(logits_MV: Tensor, p: Tensor | float, reference: Tensor | bool = False) -> Tensor:
    """Keep only the most likely tokens that together have probability p (Holtzman et al. 2020).

    p: in (0, 1], one value or float [M]; 1 keeps every token. The token that crosses p is kept;
    with `reference` (one value or bool [M]) it is removed, as in the published sampler. The most
    likely token is always kept; ties are taken in the order of ids."""
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
    """Keep only tokens with at least `share` times the probability of the most likely one (Nguyen
    et al. 2024).

    share: in [0, 1], one value or float [M]; 0 keeps every token. The most likely token is always
    kept."""
    share_M = torch.as_tensor(share, dtype=torch.float32, device=logits_MV.device).expand(
        logits_MV.shape[0]
    )
    float_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    border_M = float_MV.amax(-1) + share_M.log()
    return logits_MV.masked_fill(float_MV < border_M[:, None], NEVER)


def no_token(logits_MV: Tensor) -> Tensor:
    """Return the cells without a token that could be drawn (all are at -inf, or some are NaN), bool
    [M]."""
    return ~(logits_MV.amax(-1) > NEVER)


def _inside(before: Tensor, own: Tensor, share: Tensor, reference: Tensor) -> Tensor:
    """Whether a token is kept, from the mass of the more likely ones and its own."""
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
    """As `_keep_sorted` without a full sort: a histogram of the logits shows in which bin p is
    crossed, and only that bin is sorted."""
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


def log_prob(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """Return the log-probability of one token per cell, nats, float32 [M]."""
    return logits_MV.float().log_softmax(-1).gather(1, ids_M[:, None])[:, 0]
