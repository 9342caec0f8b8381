"""Exact numbers of small blocks: the bound without Monte-Carlo noise, and the likelihood of the
model as first-hitting samples it.

In: a `Denoiser`, clean windows, a layout and the scored cells. Out: nats of each block, float64 [R,
B] (B counts `where.block`; 0 for blocks without scored cells). Every pass scores one masked set of
every block at once; ragged blocks take part in the sets they have. Knows nothing about schedules'
sampling, documents or reports. Source: arXiv 2503.09573, Eq. 8.

With revealed sets S of a block's n cells:
    bound  = sum over masked sets M of size r of (r-1)! (n-r)! / n! * sum over M of -log p(x_i | rest, context)
    F(empty) = 1,  F(S) = 1/|S| sum over i in S of F(S - i) p(x_i | x_{S - i}, context),  exact = -log F(all) <= bound
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.corruption import Blocks, ranks
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.objectives import token_nll
from bdlm.core.randomness import purpose, uniform
from bdlm.core.types import Denoiser, Layout, NoisedBatch

LARGEST = 12  # cells of a block whose 2^n - 1 sets are still enumerated
ROWS = 32  # rows of one pass, at least the batch's own


def masked_nll(
    model: Denoiser, ids: Tensor, layout: Layout, masked: Tensor, query_mask: Tensor | None = None
) -> Tensor:
    """One denoising step of every block in one pass: -log p of the true tokens, [R, L], 0 outside
    `at` (default `masked`).

    masked: bool [R, L], any cells of any blocks; the other cells are shown. Differentiable.
    Raises UnsupportedError for models without a token likelihood or conditioned on time.
    """
    spec, query_mask = model.spec, masked if query_mask is None else query_mask
    if spec.noise == "uniform" or spec.time_conditioned:
        raise UnsupportedError(
            "a model conditioned on time or under uniform noise has no likelihood of a masked set;"
            " use method nelbo"
        )
    noisy = torch.where(masked, spec.mask_id, ids)
    blank = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    nll = token_nll(
        model, NoisedBatch(ids, noisy, masked, blank, blank, masked, layout), query_mask
    )
    return torch.zeros(ids.shape, dtype=nll.dtype, device=ids.device).masked_scatter(
        query_mask, nll
    )


@dataclass(frozen=True)
class Grid:
    """Where the scored cells stand within their blocks. column: int64 [R, L], number of each within
    its block. sizes: int64 [R, B]."""

    block: Tensor
    column: Tensor
    sizes: Tensor
    cells: Tensor

    @classmethod
    def of(cls, layout: Layout, cells: Tensor) -> Grid:
        blocks, block = Blocks.of(layout, cells), layout.block.expand_as(cells)
        order = torch.arange(cells.shape[1], dtype=torch.float64, device=cells.device).expand_as(
            cells
        )
        sizes = torch.zeros(
            cells.shape[0], int(block.max()) + 1, dtype=torch.long, device=cells.device
        )
        sizes.scatter_add_(1, block, cells.long())
        return cls(block, torch.where(cells, ranks(order, blocks, cells), 0), sizes, cells)

    @property
    def widest(self) -> int:
        return int(self.sizes.max())

    def by_column(self, values: Tensor) -> Tensor:
        """Per-cell values [R, L] (0 outside scored cells) -> [R, B, n]."""
        rows, blocks = self.sizes.shape
        out = torch.zeros(
            rows, blocks * max(self.widest, 1), dtype=values.dtype, device=values.device
        )
        return out.scatter_add_(1, self.block * max(self.widest, 1) + self.column, values).view(
            rows, blocks, -1
        )

    def size_of(self) -> Tensor:
        """n_b of each cell's block, int64 [R, L]."""
        return self.sizes.gather(1, self.block)


def revealed_sets(
    model: Denoiser, ids: Tensor, layout: Layout, cells: Tensor, largest: int = LARGEST
) -> Iterator[tuple[int, Tensor]]:
    """Every way to reveal part of each block: (set S as bits, nll [R, B, n] float64 of the cells
    still masked, 0 elsewhere).

    S counts up, so a set comes after its subsets. A block takes part in the sets of its own cells
    short of all of them. Raises ConfigError for a block of more than `largest` scored cells."""
    grid = Grid.of(layout, cells)
    _refuse_large(grid.widest, largest)
    if not grid.widest:
        return
    rows, full = ids.shape[0], (1 << grid.size_of()) - 1
    sets = torch.arange((1 << grid.widest) - 1, device=ids.device)
    for chunk in sets.split(max(1, ROWS // rows)):
        s = chunk[:, None, None]
        masked = cells & ((s >> grid.column) & 1 == 0) & (s & ~full == 0) & (s != full)
        nll = masked_nll(
            model, ids.repeat(len(chunk), 1), _repeat(layout, len(chunk)), masked.flatten(0, 1)
        )
        for bits, values in zip(chunk.tolist(), nll.double().view(masked.shape), strict=True):
            yield bits, grid.by_column(values)


def _refuse_large(widest: int, largest: int) -> None:
    if widest > largest:
        raise ConfigError(
            f"a block holds {widest} scored cells, more than {largest}: its sets are too many to"
            " enumerate; use the Monte-Carlo bound, or random orders (k_orders) for a bound closer"
            " to the exact likelihood"
        )


def _repeat(layout: Layout, times: int) -> Layout:
    if layout.rank.shape[0] == 1:
        return layout
    return Layout(*(getattr(layout, name).repeat(times, 1) for name in layout.__dataclass_fields__))


@dataclass(frozen=True)
class Enumerated:
    """bound, exact: nats of each block, float64 [R, B]. tokens: scored cells of each, int64 [R,
    B]."""

    bound: Tensor
    exact: Tensor
    tokens: Tensor


@torch.no_grad()
def enumerate_blocks(
    model: Denoiser,
    ids: Tensor,
    layout: Layout,
    cells: Tensor,
    weights: Tensor | None = None,
    largest: int = LARGEST,
) -> Enumerated:
    """The bound and the exact likelihood of every block from the same 2^n - 1 passes.

    ids: int64 [R, L]. cells: bool [R, L], scored cells; the others of a block are given (a prompt
    that ends inside it).
    weights: float64 [n+1, n+1], weights[n, r] of one masked set of r among n cells; default the
    continuous-time bound's."""
    return summed_sets(
        revealed_sets(model, ids, layout, cells, largest),
        Grid.of(layout, cells).sizes,
        weights,
        largest,
    )


def summed_sets(
    sets: Iterable[tuple[int, Tensor]],
    sizes: Tensor,
    weights: Tensor | None = None,
    largest: int = LARGEST,
) -> Enumerated:
    """`enumerate_blocks` from the losses of `revealed_sets`. sizes: scored cells of each block,
    int64 [R, B]."""
    widest = int(sizes.max())
    _refuse_large(widest, largest)
    weights = (set_weights(widest) if weights is None else weights).to(sizes.device)
    bound = torch.zeros(sizes.shape, dtype=torch.float64, device=sizes.device)
    log_f = torch.full(
        (*sizes.shape, 1 << widest), float("-inf"), dtype=torch.float64, device=sizes.device
    )
    log_f[..., 0] = 0
    for s, nll in sets:
        shown = s.bit_count()
        takes_part = (sizes > 0) & (sizes > s.bit_length() - 1) & (s != (1 << sizes) - 1)
        left = (sizes - shown).clamp(min=0)
        bound += torch.where(takes_part, weights[sizes, left] * nll.sum(-1), 0)
        for i in range(widest):
            if not s >> i & 1:
                grown = s | 1 << i
                path = (
                    log_f[..., s]
                    - nll[..., i]
                    - torch.log(torch.tensor(shown + 1.0, dtype=torch.float64))
                )
                reach = takes_part & (sizes > i)
                log_f[..., grown] = torch.where(
                    reach, torch.logaddexp(log_f[..., grown], path), log_f[..., grown]
                )
    exact = -log_f.gather(2, ((1 << sizes) - 1)[..., None])[..., 0]
    return Enumerated(bound, exact, sizes)


def set_weights(widest: int) -> Tensor:
    """Weight (r-1)! (n-r)! / n! of each masked set of r among n cells: the noise level integrated
    out. float64 [n+1, n+1]."""
    n, r = torch.meshgrid(*(torch.arange(widest + 1, dtype=torch.float64),) * 2, indexing="ij")
    log = (
        torch.lgamma(r.clamp(min=1)) + torch.lgamma((n - r).clamp(min=0) + 1) - torch.lgamma(n + 1)
    )
    return torch.where((r >= 1) & (r <= n), log.exp(), 0)


@torch.no_grad()
def k_orders(
    model: Denoiser,
    ids: Tensor,
    layout: Layout,
    cells: Tensor,
    K: int,
    seed: int,
    row: Tensor | None = None,
) -> Tensor:
    """-log of the mean probability over K random orders of writing each block, nats, float64 [R,
    B].

    An upper bound of the exact likelihood in expectation, closer as K grows, for blocks of any
    size: K n passes of one cell a block.
    row: int64 [R], numbers that key the orders (default 0, 1, ...)."""
    if K < 1:
        raise ConfigError(f"orders is {K}; use 1 or more")
    rows = ids.shape[0]
    row = torch.arange(rows, device=ids.device) if row is None else row
    blocks, grid = Blocks.of(layout, cells), Grid.of(layout, cells)
    place = torch.arange(ids.shape[1], device=ids.device)
    paths = []
    for orders in torch.arange(K, device=ids.device).split(max(1, ROWS // rows)):
        times = len(orders)
        keys = uniform(seed, purpose("orders"), orders[:, None, None], row[:, None], place)
        rank = torch.stack([ranks(k, blocks, cells) for k in keys]).flatten(0, 1)
        many, scored = ids.repeat(times, 1), cells.repeat(times, 1)
        total = torch.zeros(many.shape, dtype=torch.float64, device=ids.device)
        for i in range(grid.widest):
            total += masked_nll(
                model, many, _repeat(layout, times), scored & (rank >= i), scored & (rank == i)
            ).double()
        nll = total.view(times, rows, -1)
        paths.append(
            torch.stack(
                [
                    torch.zeros_like(grid.sizes, dtype=torch.float64).scatter_add_(1, grid.block, n)
                    for n in nll
                ]
            )
        )
    return -(
        torch.cat(paths).neg().logsumexp(0) - torch.log(torch.tensor(float(K), dtype=torch.float64))
    )
