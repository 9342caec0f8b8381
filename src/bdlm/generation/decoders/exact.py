"""The two samplers of the paper, which run the forward process backwards: first-hitting and
ancestral.

Each cell has a number u ~ U(0, 1): it is masked while the mask probability is above u. As the mask
probability falls from 1, cells are hit from the largest u down. First-hitting makes a forward pass
at every hit (App. C.5, Eq. 25); ancestral makes one at each of T grid steps and fills all cells hit
in between at once (Sec. 6.2). Ancestral with T -> infinity therefore equals first-hitting, token
for token, and the cells to predict are known before the forward pass. Source: arXiv 2503.09573;
first-hitting is due to arXiv 2409.02908."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.schedules import schedule_of
from bdlm.core.types import Commit
from bdlm.generation.decoders.base import Decoder, View
from bdlm.generation.sampling.noise import CellNoise


@dataclass(frozen=True)
class FirstHitting(Decoder):
    """Fills one uniformly random masked cell per forward pass: the exact sampler (paper App. C.5;
    Zheng et al. 2024)."""

    only_draws: ClassVar[bool] = True

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor:
        turn = noise.order().masked_fill(~masked, -1.0)
        return masked & (turn == turn.amax(1, keepdim=True))

    def choose(self, view: View) -> Commit:
        return Commit(view.query_mask, view.drawn(view.query_mask))


@dataclass(frozen=True)
class Ancestral(Decoder):
    """Takes T steps down the schedule; each fills, independently, the cells hit in its interval.
    Steps that hit nothing cost no forward pass.

    steps: T, >= 1. schedule: a noise schedule that bounds the likelihood, such as "linear"."""

    only_draws: ClassVar[bool] = True
    steps: int = 1000
    schedule: str = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"ancestral.steps is {self.steps}; use 1 or more")
        if not schedule_of(self.schedule).bounds:
            raise ConfigError(
                f"ancestral.schedule is '{self.schedule}', a distribution for training only; use an"
                " exact schedule such as 'linear'"
            )

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor:
        time = schedule_of(self.schedule).inverse(noise.order())
        step = (time * self.steps).floor().clamp(max=self.steps - 1).masked_fill(~masked, -1.0)
        return masked & (step == step.amax(1, keepdim=True))

    def choose(self, view: View) -> Commit:
        return Commit(view.query_mask, view.drawn(view.query_mask))

    def slowest(self) -> Decoder:
        return Ancestral(steps=10**9, schedule=self.schedule)

    def reference(self) -> Decoder:
        return FirstHitting()


def hitting_time(masked: Tensor, noise: CellNoise) -> Tensor:
    """Return the mask probability at which the next cell is hit, float64 [R, 1]: the time that a
    time-conditioned model is given."""
    return torch.where(masked, noise.order(), 0).amax(1, keepdim=True)
