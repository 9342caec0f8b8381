"""Reverse kernels, which tests hold the samplers against: from predictions of clean tokens to the
distribution of the next, less noisy state.

In: probabilities or log-scores of cells, and noise levels. Out: probabilities, next times, cells.
Absorbing noise: the ancestral posterior, the first-hitting distribution, and SEDD's analytic
(Tweedie) step. Draws nothing itself: uniforms are arguments. Knows nothing about models, canvases
or caches. Source: arXiv 2503.09573, Eq. 15, Sec. 6.2, Eq. 25; arXiv 2310.16834 (SEDD)."""

from __future__ import annotations

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.schedules import Schedule


def reveal_prob(p_t: Tensor, p_s: Tensor) -> Tensor:
    """Probability that a cell masked at noise p_t is revealed by p_s < p_t: 1 - p_s / p_t, 0 where
    p_t is 0."""
    return torch.where(p_t > 0, 1 - p_s / p_t, 0).clamp(0, 1)


def posterior(
    probs: Tensor, ids: Tensor, masked: Tensor, p_t: Tensor, p_s: Tensor, mask_id: int
) -> Tensor:
    """Distribution of x_s given x_t under predicted clean tokens (Eq. 15). [..., V], sums to 1.

    probs: [..., V], prediction of x_0, 0 at the mask. ids, masked: [...], the state x_t. p_t, p_s:
    mask probabilities, alike."""
    reveal = reveal_prob(p_t, p_s)[..., None].to(probs.dtype).expand(*ids.shape, 1)
    moved = probs * reveal
    moved[..., mask_id : mask_id + 1] += 1 - reveal
    kept = torch.nn.functional.one_hot(ids, probs.shape[-1]).to(probs.dtype)
    return torch.where(masked[..., None], moved, kept)


def ancestral_times(steps: int) -> Tensor:
    """Times 1, 1 - 1/T, ..., 0 of T ancestral steps; the last one reveals all that is left. float64
    [T + 1]."""
    if steps < 1:
        raise ConfigError(f"steps is {steps}; use 1 or more")
    return 1 - torch.arange(steps + 1, dtype=torch.float64) / steps


def first_hitting_time(schedule: Schedule, t: Tensor, masked: Tensor, u: Tensor) -> Tensor:
    """Time at which the first of `masked` (int64 [R] >= 1) cells is revealed, from time t: p_new =
    p u^(1/n). float64 [R] (Eq. 25)."""
    p = schedule.mask_prob(t.double()) * u.double() ** (1 / masked.double())
    return schedule.inverse(p)


def first_hitting_cell(masked: Tensor, keys: Tensor) -> Tensor:
    """A uniformly random masked cell of each row: the one with the largest key. bool [R, n], all
    False in rows without masks.

    masked: bool [R, n]. keys: float64 [R, n], independent uniforms.
    """
    chosen = torch.where(masked, keys, -1.0).argmax(1, keepdim=True)
    return torch.zeros_like(masked).scatter_(1, chosen, True) & masked


def analytic_times(steps: int, last: float = 1e-5) -> Tensor:
    """Times 1 .. last of SEDD's analytic sampler, float64 [T + 1]; a step with mask probability 0
    follows."""
    if steps < 1:
        raise ConfigError(f"steps is {steps}; use 1 or more")
    return torch.linspace(1, last, steps + 1, dtype=torch.float64)


def total_noise(mask_prob: Tensor, most: float = 1 - 1e-3) -> Tensor:
    """sigma = -log(1 - p), with p held below 1 so that it stays finite."""
    return -torch.log1p(-mask_prob.clamp(max=most))


def analytic_probs(
    log_score: Tensor, ids: Tensor, dsigma: Tensor, mask_id: int, last: bool = False
) -> Tensor:
    """Unnormalised distribution of the state after SEDD's analytic step of size dsigma. [..., V]
    (Lou et al. 2024).

    log_score: [..., V], 0 at the current token. ids: int64 [...], current tokens. dsigma: sigma_t -
    sigma_s, broadcast over [...].
    last: the final step, which leaves no mask."""
    score, grow = log_score.exp(), dsigma[..., None].exp()
    staggered = score * grow
    staggered[..., mask_id] += ((1 - grow) * score.sum(-1, keepdim=True))[..., 0]
    stay = torch.nn.functional.one_hot(ids, score.shape[-1]).to(score.dtype) / grow
    into = torch.where((ids == mask_id)[..., None], 1 - 1 / grow, 0)
    probs = staggered * (stay + into)
    if last:
        probs[..., mask_id] = 0
    return probs
