"""What happens to logits between the model and the policy: forbid, temper, cut to the nucleus, draw.

In: logits of the M planned cells, [M, V]. Out: logits again (removed tokens at -inf), or drawn ids [M].
Pure functions; knows nothing about rows, blocks or policies. Every cell is treated alone, so neighbours never matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core import randomness

NEVER = float("-inf")
BINS = 2048  # bins of the nucleus' histogram; only the tokens of one bin are ever sorted
SORT_BELOW = 4096  # vocabularies up to this size are sorted: cheaper than a histogram
TOKEN = randomness.purpose("token")
MARGIN = 1.0  # nats; how far below the best float32 score a token may stand and still be drawn in float64
ALMOST_ONE = 1 - 2.0**-24


def forbid(logits_MV: Tensor, tokens: Tensor | int) -> Tensor:
    """The same logits with some tokens (int64 [K] or one id) impossible, for every cell. Changes `logits_MV` in place."""
    if isinstance(tokens, int):
        logits_MV[:, tokens] = NEVER
        return logits_MV
    return logits_MV.index_fill_(1, tokens, NEVER)


def temper(logits_MV: Tensor, temperature_M: Tensor | float) -> Tensor:
    """Logits divided by the temperature; 0 leaves them (the draw is then the argmax)."""
    if isinstance(temperature_M, float):
        return logits_MV if temperature_M in (0.0, 1.0) else logits_MV / temperature_M
    return logits_MV / torch.where(temperature_M == 0, 1.0, temperature_M).to(logits_MV.dtype)[:, None]


def top_k(logits_MV: Tensor, k: int) -> Tensor:
    """Only the k most likely tokens; equal ones at the border stay together."""
    if k >= logits_MV.shape[1]:
        return logits_MV
    border = logits_MV.topk(k, -1).values[:, -1:]
    return logits_MV.masked_fill(logits_MV < border, NEVER)


def nucleus(logits_MV: Tensor, p: Tensor | float, reference: bool = False) -> Tensor:
    """Only the most likely tokens that together hold probability p (Holtzman et al. 2020).

    p: in (0, 1], one value or float [M]; 1 keeps every token. Standard: the token that crosses p stays. `reference`: it goes, as in
    the published sampler (spec 4.4). The most likely token always stays; equal ones are taken in the order of their ids.
    """
    share_M = torch.as_tensor(p, dtype=torch.float64, device=logits_MV.device).expand(logits_MV.shape[0])
    if bool((share_M >= 1).all()):
        return logits_MV
    probs_MV = logits_MV.float().softmax(-1)
    if logits_MV.shape[1] <= SORT_BELOW or logits_MV.device.type != "cpu":
        keep = _keep_sorted(probs_MV, share_M, reference)
    else:
        keep = _keep_binned(logits_MV, probs_MV, share_M, reference)
    keep |= (share_M >= 1)[:, None]
    return logits_MV.masked_fill(~keep, NEVER)


def _inside(before: Tensor, own: Tensor, share: Tensor, reference: bool) -> Tensor:
    """Whether a token stays, from the mass of the likelier ones and its own."""
    return ((before + own <= share) | (before == 0)) if reference else before < share


def _keep_sorted(probs_MV: Tensor, share_M: Tensor, reference: bool) -> Tensor:
    sorted_MV, index_MV = probs_MV.double().sort(dim=-1, descending=True, stable=True)
    before = sorted_MV.cumsum(-1) - sorted_MV
    inside = _inside(before, sorted_MV, share_M[:, None], reference)
    inside[:, 0] = True
    return torch.zeros_like(inside).scatter_(1, index_MV, inside)


def _keep_binned(logits_MV: Tensor, probs_MV: Tensor, share_M: Tensor, reference: bool) -> Tensor:
    """As `_keep_sorted` without a full sort: masses of bins of logits tell in which bin p is crossed; that bin alone is sorted."""
    rows = torch.arange(logits_MV.shape[0])
    finite = logits_MV != NEVER
    top_M1 = logits_MV.amax(-1, keepdim=True)
    low_M1 = torch.where(finite, logits_MV, top_M1).amin(-1, keepdim=True)
    span_M1 = (top_M1 - low_M1).clamp(1e-6, 24.0)
    bin_MV = ((top_M1 - logits_MV) * ((BINS - 1) / span_M1)).clamp_(max=BINS - 1).long()
    mass = torch.zeros(len(rows), BINS, dtype=torch.float64).scatter_add_(1, bin_MV, probs_MV.double())
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
    first_M = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row[opening], running[opening])
    below_M = torch.where(crossing_M > 0, total[rows, (crossing_M - 1).clamp(min=0)], 0.0)
    before = running - first_M[row] + below_M[row]
    keep[row, token] = _inside(before, own, share_M[row], reference) | (opening & (crossing_M[row] == 0))
    return keep


def draw(logits_MV: Tensor, seed_M: Tensor, position_M: Tensor, draw_M: Tensor, greedy_M: Tensor | None = None) -> Tensor:
    """One token for each cell, int64 [M]: the argmax of logit + Gumbel noise, which is a sample of softmax(logits).

    The noise is a hash of (seed, position, draw, token id), float64 (spec 4.4). It is first bounded in float32 for all tokens; the
    few that can win are compared in float64, so the result is that of float64 throughout. Where most tokens are removed, noise
    is made for the rest only. greedy_M: bool [M], cells that take the likeliest token without noise.
    """
    if greedy_M is not None and bool(greedy_M.all()):
        return logits_MV.argmax(-1)
    cells, vocab = logits_MV.shape
    keys = [k[:, None] for k in (seed_M, position_M, draw_M)]
    tokens = torch.arange(vocab, device=logits_MV.device)
    finite = logits_MV != NEVER
    if int(finite.sum()) * 4 < cells * vocab:
        row, token = finite.nonzero(as_tuple=True)
    else:
        u = randomness.uniform(keys[0], TOKEN, keys[1], keys[2], tokens)
        late = (1 - u).float().clamp_(max=ALMOST_ONE)
        bound = logits_MV.float() - torch.log(-torch.log1p(-late))
        row, token = (bound >= bound.amax(-1, keepdim=True) - MARGIN).nonzero(as_tuple=True)
    noise = randomness.gumbel(seed_M[row], TOKEN, position_M[row], draw_M[row], token)
    best = _segment_argmax(logits_MV[row, token].double() + noise, row, token, cells)
    return best if greedy_M is None else torch.where(greedy_M, logits_MV.argmax(-1), best)


def _segment_argmax(score: Tensor, row: Tensor, token: Tensor, cells: int) -> Tensor:
    """Token of the highest score of each row of a flat list (the lowest id among equals), int64 [cells]."""
    top = torch.full((cells,), NEVER, dtype=score.dtype, device=score.device).scatter_reduce_(0, row, score, "amax")
    winner = score == top[row]
    none = torch.iinfo(torch.long).max
    best = torch.full((cells,), none, device=score.device)
    return best.scatter_reduce_(0, row[winner], token[winner], "amin")


def log_prob(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """Log-probability of one token a cell, nats, float32 [M]."""
    logits = logits_MV.float()
    return logits.gather(1, ids_M[:, None])[:, 0] - logits.logsumexp(-1)
