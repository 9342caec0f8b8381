"""Methods to score a batch of windows: nats of every scored cell, with or without Monte-Carlo
noise.

In: a `Denoiser`, a batch of `Rows`, their layout, and the index of the noise draw. Out: float64 [R,
L] nats, 0 outside scored cells; the value of a block as a whole is spread evenly over its scored
cells. Knows nothing about files, standard errors or scores. Source: arXiv 2503.09573, Eq. 8
(bound), Eq. 20, 21 (block size 1); arXiv 2502.09992 (counts); arXiv 2406.03736, 2409.02908
(orders)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bdlm.core.corruption import corrupt
from bdlm.core.counts import CountDistribution
from bdlm.core.errors import ConfigError, UnsupportedError, nearest, pick
from bdlm.core.estimators import LARGEST, Grid, enumerate_blocks, k_orders
from bdlm.core.objectives import objective
from bdlm.core.randomness import bits, purpose
from bdlm.core.schedules import SCHEDULES, Schedule, schedule_of
from bdlm.core.types import Denoiser, Layout, ModelSpec, NoisedBatch
from bdlm.likelihood.rows import Rows


@dataclass(frozen=True)
class Draw:
    """Selects the noise: an evaluation's seed, the replicate, and where the batch stands among all
    rows (rows_total, first_row).

    keys: int64 [rows_total], numbers that key the rows' noise instead of their indices, or None."""

    seed: int
    replicate: int
    rows_total: int
    first_row: int
    keys: Tensor | None = None

    def rows(self, count: int) -> Tensor:
        """Return the numbers of the batch's rows, int64 [count]."""
        if self.keys is not None:
            return self.keys[self.first_row : self.first_row + count]
        return self.first_row + torch.arange(count)


class Method(Protocol):
    """How windows are scored.

    name: as reported. random: whether a draw has Monte-Carlo noise. estimator: what it draws, None
    where it draws nothing. passes(n): forward passes of one draw for blocks of n cells."""

    @property
    def name(self) -> str: ...

    @property
    def random(self) -> bool: ...

    @property
    def estimator(self) -> str | None: ...

    def passes(self, n: int) -> int: ...

    def nats(self, model: Denoiser, rows: Rows, layout: Layout, draw: Draw) -> Tensor: ...


@dataclass(frozen=True)
class ChainRule:
    """Computes exact -log p in one pass: autoregressive models, and blocks of one cell, all
    masked."""

    name: str = "nll"
    random: bool = False
    estimator: str | None = None

    def passes(self, n: int) -> int:
        return 1

    def nats(self, model: Denoiser, rows: Rows, layout: Layout, draw: Draw) -> Tensor:
        number = draw.rows(len(rows)).to(rows.ids.device)
        noised = corrupt(
            rows.ids,
            layout,
            rows.scored,
            SCHEDULES["linear"],
            seed=0,
            step=0,
            row=number,
            distribution="all",
            mask_id=model.spec.mask_id,
        )
        return objective(model, noised).double()


@dataclass(frozen=True)
class Nelbo:
    """Estimates the Monte-Carlo bound: one stratified draw of noise over all windows.

    estimator: "time" (the paper's), "count", "complementary" (two passes), or "importance" (counts
    drawn from `counts`). schedule: one whose bound is exact; it changes the variance of "time"
    alone."""

    estimator: str = "count"
    schedule: str = "linear"
    counts: CountDistribution | None = None
    name: str = "nelbo"
    random: bool = True

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigError(
                f"estimator '{self.estimator}' is unknown{nearest(self.estimator, ESTIMATORS)}"
            )
        need_counts(self.estimator, self.counts)
        if not schedule_of(self.schedule).bounds:
            raise ConfigError(
                f"schedule '{self.schedule}' is a training distribution and gives no bound; use one"
                f" of {', '.join(SCHEDULES)}"
            )

    def passes(self, n: int) -> int:
        return 2 if self.estimator == "complementary" else 1

    def nats(self, model: Denoiser, rows: Rows, layout: Layout, draw: Draw) -> Tensor:
        noised = noise(
            model.spec, rows, layout, draw, self.estimator, SCHEDULES[self.schedule], self.counts
        )
        return objective(model, noised).double().view(-1, *rows.ids.shape).sum(0)


def need_counts(estimator: str, counts: CountDistribution | None) -> None:
    """Raise ConfigError for importance sampling without the counts to draw by."""
    if estimator == "importance" and counts is None:
        raise ConfigError(
            "estimator 'importance' needs counts fitted on other data; give counts=fit_counts(...),"
            " or use 'count'"
        )


def noise(
    spec: ModelSpec,
    rows: Rows,
    layout: Layout,
    draw: Draw,
    estimator: str,
    schedule: Schedule,
    counts: CountDistribution | None = None,
) -> NoisedBatch:
    """Noise windows for an estimator of the bound; "complementary" gives 2R rows, see
    `core.corruption.corrupt`."""
    keys: dict[str, Any] = {
        "seed": draw.seed,
        "step": draw.replicate,
        "row": draw.rows(len(rows)).to(rows.ids.device),
    }
    keys |= {
        "rows_total": draw.rows_total,
        "first_row": draw.first_row,
        "independent_rows": draw.keys is not None,
        "mask_id": spec.mask_id,
    }
    return corrupt(
        rows.ids, layout, rows.scored, schedule, distribution=estimator, counts=counts, **keys
    )


@dataclass(frozen=True)
class Enumeration:
    """Enumerates all 2^n - 1 masked sets of every block: the bound (`nelbo-exact`) or the
    likelihood under first-hitting (`exact`)."""

    name: str
    largest: int = LARGEST
    random: bool = False
    estimator: str | None = None

    def passes(self, n: int) -> int:
        return (1 << n) - 1

    def nats(self, model: Denoiser, rows: Rows, layout: Layout, draw: Draw) -> Tensor:
        self._refuse_large(layout, rows)
        found = enumerate_blocks(model, rows.ids, layout, rows.scored, largest=self.largest)
        return spread(
            found.bound if self.name == "nelbo-exact" else found.exact, layout, rows.scored
        )

    def _refuse_large(self, layout: Layout, rows: Rows) -> None:
        widest = Grid.of(layout, rows.scored).widest
        if widest > self.largest:
            instead = "nelbo" if self.name == "nelbo-exact" else "k-orders"
            raise ConfigError(
                f"a block holds {widest} scored cells, too large to enumerate (at most"
                f" {self.largest}); use method '{instead}', or block_size {self.largest} or less"
            )


@dataclass(frozen=True)
class Orders:
    """Averages the probability over `orders` random orders of filling each block; -log of the mean
    is an upper bound in expectation, for any block size."""

    orders: int = 16
    name: str = "k-orders"
    random: bool = True

    @property
    def estimator(self) -> str:
        return f"{self.orders} orders"

    def passes(self, n: int) -> int:
        return self.orders * n

    def nats(self, model: Denoiser, rows: Rows, layout: Layout, draw: Draw) -> Tensor:
        seed = int(bits(draw.seed, purpose("replicate of orders"), draw.replicate))
        number = draw.rows(len(rows)).to(rows.ids.device)
        return spread(
            k_orders(model, rows.ids, layout, rows.scored, self.orders, seed, number),
            layout,
            rows.scored,
        )


def spread(values: Tensor, layout: Layout, scored: Tensor) -> Tensor:
    """Spread per-block values [R, B] evenly over each block's scored cells, [R, L]."""
    grid = Grid.of(layout, scored)
    share = values / grid.sizes.clamp(min=1)
    return torch.where(scored, share.gather(1, grid.block), 0)


def method_for(
    spec: ModelSpec,
    name: str,
    block_size: int,
    estimator: str,
    schedule: str,
    orders: int,
    counts: CountDistribution | None,
    largest: int,
) -> Method:
    """Choose the method that scores such a model under a name of `METHODS`. The chain rule is used
    where it is exact in one pass.

    Raises ConfigError for an unknown name, UnsupportedError for what such a model does not have."""
    make = pick("method", name, METHODS)
    if spec.noise == "uniform":
        raise UnsupportedError(
            "models of uniform noise have no likelihood bound here; use a model of mask noise"
        )
    plain = spec.prediction == "tokens" and not spec.time_conditioned
    if not plain and name != "nelbo":
        raise UnsupportedError(
            f"method '{name}' needs predictions that do not depend on time; use method 'nelbo' for"
            " this model"
        )
    if spec.noise == "none" or (plain and block_size == 1):
        return ChainRule()
    return make(estimator, schedule, orders, counts, largest)


ESTIMATORS = ("count", "time", "complementary", "importance")

METHODS: dict[str, Callable[[str, str, int, CountDistribution | None, int], Method]] = {
    "nelbo": lambda estimator, schedule, orders, counts, largest: Nelbo(
        estimator, schedule, counts
    ),
    "nelbo-exact": lambda estimator, schedule, orders, counts, largest: Enumeration(
        "nelbo-exact", largest
    ),
    "exact": lambda estimator, schedule, orders, counts, largest: Enumeration("exact", largest),
    "k-orders": lambda estimator, schedule, orders, counts, largest: Orders(orders),
}
