"""Importance-sampled counts: masked counts drawn where the loss is large, weighted so that the bound stays unbiased.

In: a model and windows to fit on (other ones than are scored, else the estimate leans on its own noise). Out: a `CountLaw`, and
`NoisedBatch`es drawn by it. The law is floored: no count is rarer than `floor` times its uniform share, so weights stay bounded.
Knows nothing about reports or training. Source: spec 1.7; design.md (schedule search).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.corruption import Blocks, corrupt, ranks, strata
from bdlm.core.errors import ConfigError
from bdlm.core.objectives import objective
from bdlm.core.randomness import purpose, uniform
from bdlm.core.schedules import SCHEDULES
from bdlm.core.types import Denoiser, Layout, NoisedBatch
from bdlm.likelihood.rows import Rows

BINS = 16  # counts of large blocks share a probability within a bin


@dataclass(frozen=True)
class CountLaw:
    """probs: float64 [N + 1, N + 1], probs[n, r] of masking r of n cells; 0 unless 1 <= r <= n, each row n >= 1 sums to 1."""

    probs: Tensor

    @classmethod
    def uniform(cls, widest: int) -> CountLaw:
        """Every count alike: the estimator `count`."""
        n, r = torch.meshgrid(*(torch.arange(widest + 1, dtype=torch.float64),) * 2, indexing="ij")
        return cls(torch.where((r >= 1) & (r <= n), 1 / n.clamp(min=1), 0))

    @property
    def widest(self) -> int:
        return self.probs.shape[0] - 1

    def draw(self, size: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The count at quantile u of blocks of `size` cells, and its probability. int64 and float64, as `size`."""
        if int(size.max()) > self.widest:
            raise ConfigError(
                f"counts were fitted for blocks of up to {self.widest} cells, not {int(size.max())}; fit them at this block size"
            )
        table = self.probs.to(size.device)
        below = table.cumsum(1)[size]
        count = torch.minimum((below[..., 1:] < u[..., None] * below[..., -1:]).sum(-1) + 1, size.clamp(min=1))
        return count, table[size, count]


def corrupt_counts(
    clean: Tensor,
    where: Layout,
    cells: Tensor,
    law: CountLaw,
    *,
    seed: int,
    step: int,
    row: Tensor,
    rows_total: int | None = None,
    first_row: int = 0,
    mask_id: int,
) -> NoisedBatch:
    """As `corruption.corrupt`, the number of masks of each block being drawn by `law`, from the same strata; weight 1 / (r q(r))."""
    blocks = Blocks.of(where, cells)
    u = strata(blocks, seed=seed, step=step, row=row, rows_total=rows_total or len(clean), first_row=first_row)
    count, prob = law.draw(blocks.size, u)
    place = torch.arange(clean.shape[1], device=clean.device)
    keys = uniform(seed, step, purpose("masks"), row[:, None], place)
    masked = cells & (ranks(keys, blocks, cells) < blocks.spread(count))
    weight = torch.where(masked, blocks.spread(1 / (count * prob.clamp(min=1e-300))), 0).float()
    last = torch.zeros(blocks.size.shape, dtype=keys.dtype, device=keys.device)
    last.scatter_reduce_(1, blocks.index, torch.where(masked, keys, 0), "amax")
    return NoisedBatch(clean, torch.where(masked, mask_id, clean), masked, blocks.spread(last).float(), weight, cells, where)


@torch.no_grad()
def fit_counts(
    model: Denoiser, rows: Rows, where: Layout, *, seed: int = 0, draws: int = 4, batch_rows: int = 16, floor: float = 0.1
) -> CountLaw:
    """The law of least variance for such a model: q(r) proportional to the root mean square of a block's term at count r.

    rows, where: the windows to fit on and their layout, on the model's device. draws: passes over them. floor: share of the uniform
    law mixed in. Sizes that do not occur stay uniform.
    """
    if not 0 < floor <= 1:
        raise ConfigError(f"floor is {floor}; use a share above 0, at most 1, so that no weight is unbounded")
    widest = int(Blocks.of(where, rows.scored).size.max())
    squares, seen = torch.zeros(2, widest + 1, widest + 1, dtype=torch.float64)
    for draw in range(draws):
        for first, part in rows.batches(batch_rows):
            here = where if where.rank.shape[0] == 1 else _rows_of(where, slice(first, first + batch_rows))
            number = first + torch.arange(len(part), device=part.ids.device)
            noised = corrupt(
                part.ids, here, part.scored, SCHEDULES["linear"], seed=seed, step=draw, row=number, rows_total=len(rows), first_row=first,
                law="count", mask_id=model.spec.mask_id,
            )  # fmt: skip
            size, count, term = _terms(objective(model, noised), noised)
            squares.index_put_((size, count), term.square(), accumulate=True)
            seen.index_put_((size, count), torch.ones_like(term), accumulate=True)
    return CountLaw(torch.stack([_fitted(n, squares[n], seen[n], floor) for n in range(widest + 1)]))


def _rows_of(where: Layout, index: slice) -> Layout:
    return Layout(*(getattr(where, name)[index] for name in where.__dataclass_fields__))


def _terms(nats: Tensor, noised: NoisedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(n, r, term) of each block with scored cells, on CPU."""
    blocks = Blocks.of(noised.layout, noised.scored)
    total = torch.zeros(blocks.size.shape, dtype=torch.float64, device=nats.device).scatter_add_(1, blocks.index, nats.double())
    count = torch.zeros_like(blocks.size).scatter_add_(1, blocks.index, noised.masked.long())
    real = blocks.size > 0
    return blocks.size[real].cpu(), count[real].cpu(), total[real].cpu()


def _fitted(n: int, squares: Tensor, seen: Tensor, floor: float) -> Tensor:
    """q(. | n) from sums of squared terms by count, [N + 1]."""
    out = torch.zeros_like(squares)
    if n == 0:
        return out
    bins = min(n, BINS)
    of = torch.arange(n) * bins // n
    total, times = (torch.zeros(bins, dtype=torch.float64).index_add_(0, of, x[1 : n + 1]) for x in (squares, seen))
    root = (total / times.clamp(min=1)).sqrt()
    known = times > 0
    root[~known] = root[known].mean() if bool(known.any()) else 1.0
    q = root[of]
    q = q / q.sum() if float(q.sum()) > 0 else torch.full_like(q, 1 / n)
    out[1 : n + 1] = (1 - floor) * q + floor / n
    return out
