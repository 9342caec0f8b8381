"""Enumerated numbers that only tests compare with: the bound, the likelihood, and the bound in
discrete time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.estimators import Grid, enumerate_blocks
from bdlm.core.schedules import Schedule
from bdlm.core.statistics import mean_estimate, ratio_estimate
from bdlm.core.types import Denoiser, Layout


def nelbo_exact(model: Denoiser, ids: Tensor, layout: Layout, cells: Tensor) -> Tensor:
    """The continuous-time bound without Monte-Carlo noise, nats of each block, float64 [R, B]."""
    return enumerate_blocks(model, ids, layout, cells).bound


def exact_likelihood(model: Denoiser, ids: Tensor, layout: Layout, cells: Tensor) -> Tensor:
    """-log of the probability that first-hitting sampling (temperature 1) writes each block, nats,
    float64 [R, B]."""
    return enumerate_blocks(model, ids, layout, cells).exact


def discrete_nelbo(
    model: Denoiser, ids: Tensor, layout: Layout, cells: Tensor, schedule: Schedule, steps: int
) -> Tensor:
    """The bound of T steps (Eq. 11, 16, as an exact sum), no Monte-Carlo noise, nats of each block,
    float64 [R, B]."""
    widest = int(Grid.of(layout, cells).sizes.max())
    n, r = torch.meshgrid(*(torch.arange(widest + 1, dtype=torch.float64),) * 2, indexing="ij")
    p = schedule.mask_prob(torch.arange(1, steps + 1, dtype=torch.float64) / steps)[:, None, None]
    distribution = torch.where((r >= 1) & (r <= n), p**r * (1 - p) ** (n - r).clamp(min=0), 0)
    weights = (discrete_weights(schedule, steps)[:, None, None] * distribution).sum(0)
    return enumerate_blocks(model, ids, layout, cells, weights).bound


def discrete_weights(schedule: Schedule, steps: int) -> Tensor:
    """Weights (p_t - p_s) / p_t of the discrete-time bound at t = 1/T, 2/T, ..., 1 (s = t - 1/T).
    float64 [T] (Eq. 11, 16).

    The bound is the sum over i of weight_i * E[masked cross-entropy at mask probability p(i/T)];
    for the linear schedule 1/i."""
    if steps < 1:
        raise ConfigError(f"steps is {steps}; use 1 or more")
    p = schedule.mask_prob(torch.arange(steps + 1, dtype=torch.float64) / steps)
    return (p[1:] - p[:-1]) / p[1:]


@dataclass(frozen=True)
class Likelihood:
    """Nats per token. stderr: over documents, Monte-Carlo noise included. monte_carlo: that noise
    alone (0 for exact methods)."""

    mean: float
    stderr: float
    monte_carlo: float
    tokens: int
    documents: int


def likelihood_estimate(totals: Tensor, counts: Tensor) -> Likelihood:
    """From independent replicates of each document's nats. totals: [K, D] or [D] (exact). counts:
    scored tokens [D].

    The Monte-Carlo part comes from the spread of the K corpus means: use four or more replicates,
    each its own randomised draw."""
    replicates = totals.double().reshape(-1, totals.shape[-1])
    over_documents = ratio_estimate(replicates.mean(0), counts)
    size = counts.double().sum()
    noise = 0.0 if totals.dim() == 1 else mean_estimate(replicates.sum(1) / size).stderr
    return Likelihood(
        over_documents.mean, over_documents.stderr, noise, int(size), over_documents.count
    )
