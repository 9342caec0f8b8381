"""Distributions of how many cells of a block are masked, and the distribution under which the
estimate of the bound varies least.

In: losses of blocks with the counts that were masked. Out: a `CountDistribution`, by which
`corruption.corrupt` draws under distribution "importance". With m_r the mean loss of r masked cells
of n, the bound is the sum of E[m_r] over r = 1..n, and m_r / q(r) is unbiased for it under any q >
0; its second moment is least for q(r) proportional to the root of E[m_r^2]. Distributions are
floored: no count is rarer than `floor` times its uniform share, so that weights stay bounded. Knows
nothing about models, evaluation or training. Source: Eq. 8 of arXiv 2503.09573 with the time
integrated out, importance sampling over the count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError

BINS = 16  # masked shares r/n that share a moment; up to 16 cells every count has its own


@dataclass(frozen=True)
class CountDistribution:
    """probs: float64 [N + 1, N + 1], probs[n, r] of masking r of n cells; 0 unless 1 <= r <= n,
    each row n >= 1 sums to 1."""

    probs: Tensor

    @classmethod
    def uniform(cls, widest: int) -> CountDistribution:
        """Every count alike, for blocks of up to `widest` cells: distribution "count"."""
        n, r = _grid(widest)
        return cls(torch.where((r >= 1) & (r <= n), 1 / n.clamp(min=1).double(), 0))

    @property
    def widest(self) -> int:
        return self.probs.shape[0] - 1

    def draw(self, size: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The count at quantile u of blocks of `size` cells, and its probability. int64 and
        float64, as `size`."""
        if int(size.max()) > self.widest:
            raise ConfigError(
                f"counts were fitted for blocks of up to {self.widest} cells, not"
                f" {int(size.max())}; fit them at this block size"
            )
        table = self.probs.to(size.device)
        below = table.cumsum(1)[size]
        count = torch.minimum(
            (below[..., 1:] < u[..., None] * below[..., -1:]).sum(-1) + 1, size.clamp(min=1)
        )
        return count, table[size, count]


@dataclass(frozen=True)
class CountMoments:
    """Second moments of m_r by the masked share r/n, blocks of all sizes together: how the loss
    grows with the share hardly depends on n.

    squares: float64 [BINS], sums of m_r^2. seen: float64 [BINS], how many (fewer where old ones
    have faded)."""

    squares: Tensor
    seen: Tensor

    @classmethod
    def none(cls) -> CountMoments:
        return cls(torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64))

    @classmethod
    def of(cls, size: Tensor, count: Tensor, mean: Tensor) -> CountMoments:
        """Of blocks of `size` cells, `count` of them masked with mean loss `mean`
        (`objectives.count_losses`), each [K]."""
        found = cls.none()
        bin = ((BINS * count - 1) // size).cpu()
        found.squares.index_add_(0, bin, mean.double().square().cpu())
        found.seen.index_add_(0, bin, torch.ones(len(bin), dtype=torch.float64))
        return found

    def __add__(self, other: CountMoments) -> CountMoments:
        return CountMoments(self.squares + other.squares, self.seen + other.seen)

    def faded(self, share: float) -> CountMoments:
        """With the weight of all that was seen lowered to `share`."""
        return CountMoments(self.squares * share, self.seen * share)

    def distribution(self, widest: int, floor: float) -> CountDistribution:
        """The floored distribution of least variance for blocks of up to `widest` cells; uniform
        where nothing was seen."""
        check_floor(floor)
        n, r = _grid(widest)
        uniform = CountDistribution.uniform(widest).probs
        bin = ((BINS * r - 1) // n.clamp(min=1)).clamp(0, BINS - 1)
        q = torch.where(uniform > 0, self._roots()[bin], 0)
        total = q.sum(1, keepdim=True)
        return CountDistribution(
            torch.where(
                total > 0, (1 - floor) * q / total.clamp(min=1e-300) + floor * uniform, uniform
            )
        )

    def _roots(self) -> Tensor:
        """Root mean squares [BINS]; a bin that was not seen lies on the line between its nearest
        neighbours that were."""
        known = self.seen > 0
        if not bool(known.any()):
            return torch.zeros_like(self.seen)
        at, value, bins = (
            known.nonzero()[:, 0],
            (self.squares[known] / self.seen[known]).sqrt(),
            torch.arange(BINS),
        )
        above = torch.searchsorted(at, bins).clamp(max=len(at) - 1)
        below = (above - 1).clamp(min=0)
        share = ((bins - at[below]) / (at[above] - at[below]).clamp(min=1)).clamp(0, 1)
        return value[below] + share * (value[above] - value[below])


def check_floor(floor: float) -> None:
    """Raise ConfigError for a floor that leaves weights unbounded."""
    if not 0 < floor <= 1:
        raise ConfigError(
            f"floor is {floor}; use a share above 0, at most 1, so that no weight is unbounded"
        )


def _grid(widest: int) -> tuple[Tensor, Tensor]:
    """(n, r), int64 [N + 1, N + 1] each."""
    n, r = torch.meshgrid(torch.arange(widest + 1), torch.arange(widest + 1), indexing="ij")
    return n, r
