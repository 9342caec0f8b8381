"""Noise schedules: how likely a cell is masked at time t, and what a masked cell's -log p counts
for.

In: times or mask probabilities, any shape, in [0, 1]. Out: tensors of the same shape and dtype. The
five exact schedules have mask_prob(0) = 0 and mask_prob(1) = 1; `Clipped` is a training
distribution only. Knows nothing about blocks, tokens or models.
Source: arXiv 2503.09573, Sec. 5.2, App. C.4 (clipped), Table 8; our forms have no floors and no
eps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, pick


@dataclass(frozen=True)
class Schedule(ABC):
    """Mask probability p(t) = 1 - alpha_t, increasing in t. A leaf needs `mask_prob` alone; closed
    forms replace the defaults.

    bounds: whether the weight p'/p makes the loss a bound on -log p (False for distributions that
    are for training only)."""

    bounds: ClassVar[bool] = True

    @abstractmethod
    def mask_prob(self, t: Tensor) -> Tensor:
        """Probability in [0, 1] that a cell is masked at time t in [0, 1]."""

    def slope(self, t: Tensor) -> Tensor:
        """dp/dt, by automatic differentiation."""
        with torch.enable_grad():
            time = t.detach().requires_grad_()
            return torch.autograd.grad(self.mask_prob(time).sum(), time)[0]

    def weight(self, t: Tensor) -> Tensor:
        """p'(t) / p(t) >= 0: the factor on -log p of a masked cell in the bound (Eq. 8). Infinite
        at t = 0."""
        return self.slope(t) / self.mask_prob(t)

    def inverse(self, p: Tensor) -> Tensor:
        """The time at which the mask probability is p, by bisection."""
        low, high = torch.zeros_like(p), torch.ones_like(p)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.mask_prob(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class Linear(Schedule):
    """p = t: the paper's schedule ("loglinear" in the reference)."""

    def mask_prob(self, t: Tensor) -> Tensor:
        return t

    def slope(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def inverse(self, p: Tensor) -> Tensor:
        return p


@dataclass(frozen=True)
class Square(Schedule):
    """p = t^2: light masking."""

    def mask_prob(self, t: Tensor) -> Tensor:
        return t * t

    def weight(self, t: Tensor) -> Tensor:
        return 2 / t

    def inverse(self, p: Tensor) -> Tensor:
        return p.sqrt()


@dataclass(frozen=True)
class SquareRoot(Schedule):
    """p = t^0.5: heavy masking."""

    def mask_prob(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def weight(self, t: Tensor) -> Tensor:
        return 0.5 / t

    def inverse(self, p: Tensor) -> Tensor:
        return p * p


@dataclass(frozen=True)
class Logarithmic(Schedule):
    """p = ln(1 + t) / ln 2: slightly heavy masking."""

    def mask_prob(self, t: Tensor) -> Tensor:
        return torch.log1p(t) / math.log(2)

    def slope(self, t: Tensor) -> Tensor:
        return 1 / ((1 + t) * math.log(2))

    def inverse(self, p: Tensor) -> Tensor:
        return torch.expm1(p * math.log(2))


@dataclass(frozen=True)
class Cosine(Schedule):
    """p = 1 - cos(pi t / 2), written 2 sin^2(pi t / 4) so that small times keep their digits."""

    def mask_prob(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(t * (math.pi / 4)).square()

    def slope(self, t: Tensor) -> Tensor:
        return (math.pi / 2) * torch.sin(t * (math.pi / 2))

    def weight(self, t: Tensor) -> Tensor:
        return (math.pi / 2) / torch.tan(t * (math.pi / 4))

    def inverse(self, p: Tensor) -> Tensor:
        return torch.asin((p / 2).sqrt()) * (4 / math.pi)


@dataclass(frozen=True)
class Clipped(Schedule):
    """Mask rate uniform in [low, high], weight 1/p without the width's factor (Sec. 5.2). A biased
    training distribution, never for reports."""

    low: float = 0.0
    high: float = 1.0
    bounds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1 or self.high == 0:
            raise ConfigError(
                f"schedule clipped:{self.low},{self.high} is out of range; use 0 <= low <= high <="
                " 1, high above 0"
            )

    def mask_prob(self, t: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * t

    def slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.high - self.low)

    def weight(self, t: Tensor) -> Tensor:
        return 1 / self.mask_prob(t)

    def inverse(self, p: Tensor) -> Tensor:
        """The time of mask rate p; 0 below `low`, 1 above `high`. An interval of width 0 has no
        clock: 0."""
        width = self.high - self.low
        return ((p - self.low) / width).clamp(0, 1) if width else torch.zeros_like(p)


def schedule_of(name: str) -> Schedule:
    """The schedule of a registry name, or of "clipped:LOW,HIGH". Raises ConfigError for anything
    else."""
    kind, _, values = name.partition(":")
    if kind != "clipped":
        return pick("schedule", name, SCHEDULES)
    try:
        low, high = (float(v) for v in values.split(","))
    except ValueError:
        raise ConfigError(
            f"schedule '{name}' is not readable; write clipped:LOW,HIGH, for instance"
            " clipped:0.3,0.8"
        ) from None
    return Clipped(low, high)


SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "square": Square(),
    "square_root": SquareRoot(),
    "logarithmic": Logarithmic(),
    "cosine": Cosine(),
}
