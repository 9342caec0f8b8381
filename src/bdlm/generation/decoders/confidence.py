"""Decoders that rank the masked cells by a score and fill the best ones: fixed-k, threshold,
factor, entropy-bounded, KLASS, LocalLeap.

Each fills at least one cell per decision, and at its slow end exactly the one with the best score:
`fixed-k` with k = 1. A cell's candidate is drawn first (the most probable token at temperature 0);
its confidence is the probability of that token under the model, before temperature and filters
("model", as LLaDA), or under the distribution that it was drawn from ("sampling", as Dream): see
`View.reading`.
Source: arXiv 2502.09992 (LLaDA), 2508.15487 (Dream), 2505.22618 (Fast-dLLM), 2505.24857 (EB),
2511.05664 (KLASS), 2510.07081 (LocalLeap). Shapes as in `base`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, pick
from bdlm.core.types import Commit, ModelSpec
from bdlm.generation.decoders.base import READINGS, Decoder, View, in_range


def candidates(view: View) -> Tensor:
    """Draw a token for every masked cell, int64 [R, n]."""
    return view.drawn(view.masked & view.query_mask)


def confidence(view: View, ids: Tensor) -> Tensor:
    """Return the probability of each masked cell's candidate, float32 [R, n], 0 elsewhere."""
    chosen = view.probs.gather(-1, ids[view.query_mask][:, None])[:, 0]
    return torch.where(view.masked, view.spread(chosen, 0.0), 0.0)


def margin(view: View, ids: Tensor) -> Tensor:
    """Return the probability of the best token minus that of the second, float32 [R, n] (Dream)."""
    top = view.probs.topk(2, -1).values
    return torch.where(view.masked, view.spread(top[:, 0] - top[:, 1], 0.0), 0.0)


def entropies(view: View) -> Tensor:
    """Return the entropy of each masked cell's distribution, nats, float32 [R, n], 0 elsewhere."""
    h = -torch.special.xlogy(view.probs, view.probs).sum(-1)
    return torch.where(view.masked, view.spread(h, 0.0), 0.0)


def certainty(view: View, ids: Tensor) -> Tensor:
    """Return exp(-entropy), float32 [R, n], in (0, 1]."""
    return torch.where(view.masked, (-entropies(view)).exp(), 0.0)


def chance(view: View, ids: Tensor) -> Tensor:
    """Return the order of the forward process run backwards, float64 [R, n]: uniform, and known
    from the seed."""
    return torch.where(view.masked, view.noise.order(), 0.0)


SCORES: dict[str, Callable[[View, Tensor], Tensor]] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": certainty,
    "random": chance,
}


def known_reading(name: str) -> None:
    """Raise ConfigError unless `name` is one of `READINGS`."""
    pick("confidence", name, dict.fromkeys(READINGS))


def score(view: View, ids: Tensor, name: str) -> Tensor:
    """Return the named score of each masked cell (higher is safer), times `View.score_factor`,
    float [R, n]; -1 at other cells."""
    value = SCORES[name](view, ids)
    if view.score_factor is not None:
        value = value * view.score_factor
    return value.masked_fill(~view.masked, -1.0)


def best(value: Tensor, masked: Tensor, count: Tensor | int = 1) -> Tensor:
    """Return the `count` masked cells of each row with the highest value (ties: the leftmost), bool
    [R, n]. count: one value or int64 [R]."""
    order = value.masked_fill(~masked, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    limit = count[:, None] if isinstance(count, Tensor) else count
    return masked & (rank < limit)


@dataclass(frozen=True)
class FixedK(Decoder):
    """Fills the k cells with the best scores per decision (LLaDA's low-confidence remasking;
    Dream's maskgit_plus, topk_margin and entropy)."""

    k: int = 1
    score: str = "confidence"
    confidence: str = "model"

    def __post_init__(self) -> None:
        pick("score", self.score, SCORES)
        known_reading(self.confidence)
        if self.k < 1:
            raise ConfigError(f"fixed-k.k is {self.k}; use 1 or more")

    def check(self, block: int, spec: ModelSpec) -> None:
        if self.k > block:
            raise ConfigError(
                f"fixed-k.k is {self.k}, more than the {block} cells of a block; use 1 to {block}"
            )

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        return Commit(best(score(view, ids, self.score), view.masked, self.k), ids)

    def slowest(self) -> Decoder:
        return FixedK(1, self.score, self.confidence)

    def reference(self) -> Decoder:
        from bdlm.generation.decoders.exact import FirstHitting

        return FirstHitting() if self.score == "random" else FixedK(1, self.score, self.confidence)


@dataclass(frozen=True)
class Threshold(Decoder):
    """Fills all cells with a score above tau, and always the best one (Fast-dLLM; LLaDA2)."""

    tau: float = 0.9
    score: str = "confidence"
    confidence: str = "model"

    def __post_init__(self) -> None:
        in_range("threshold", "tau", self.tau, 0, 1)
        pick("score", self.score, SCORES)
        known_reading(self.confidence)

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = score(view, ids, self.score)
        return Commit(view.masked & (value > self.tau) | best(value, view.masked), ids)

    def slowest(self) -> Decoder:
        return Threshold(1.0, self.score, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, self.score, self.confidence)


@dataclass(frozen=True)
class Factor(Decoder):
    """Fills the longest prefix of cells, sorted by confidence c, with (n + 1)(1 - c_n) < f
    throughout, and at least one (Fast-dLLM).

    Filling greedily in parallel equals the greedy joint choice while (n + 1) eps <= 1 for
    confidences of 1 - eps."""

    f: float = 1.0
    confidence: str = "model"

    def __post_init__(self) -> None:
        in_range("factor", "f", self.f, 0, 1e6)
        known_reading(self.confidence)

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = score(view, ids, "confidence")
        top = value.sort(1, descending=True).values
        place = torch.arange(1, top.shape[1] + 1, device=top.device)
        good = ((place + 1) * (1 - top) < self.f) & (top >= 0)
        count = good.long().cumprod(1).sum(1).clamp(min=1)
        return Commit(best(value, view.masked, count), ids)

    def slowest(self) -> Decoder:
        return Factor(0.0, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)


@dataclass(frozen=True)
class EntropyBounded(Decoder):
    """Fills the longest prefix of cells, sorted by score, for which the entropies minus the
    greatest of them sum to at most gamma nats (EB-sampler).

    The sum bounds the error of drawing these cells independently (at temperature 1 and without
    filters; otherwise that of the model's own distribution). A single cell has bound 0."""

    gamma: float = 0.1
    score: str = "entropy"
    confidence: str = "model"

    def __post_init__(self) -> None:
        in_range("eb", "gamma", self.gamma, 0, 1e6)
        pick("score", self.score, SCORES)
        known_reading(self.confidence)

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = score(view, ids, self.score)
        order = value.argsort(dim=1, descending=True, stable=True)
        h = entropies(view).gather(1, order)
        bound = h.cumsum(1) - h.cummax(1).values
        open_ = view.masked.gather(1, order)
        first = torch.zeros_like(open_)
        first[:, 0] = True
        # gamma 0 fills one cell even where others have an entropy of exactly 0
        good = open_ & (first | (bound <= self.gamma)) if self.gamma else open_ & first
        count = good.long().cumprod(1).sum(1).clamp(min=1)
        return Commit(best(value, view.masked, count), ids)

    def slowest(self) -> Decoder:
        return EntropyBounded(0.0, self.score, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, self.score, self.confidence)


@dataclass(frozen=True)
class Klass(Decoder):
    """Fills the cells that are confident and have been stable for `history` forward passes; if
    there are none, the best one (KLASS).

    Stable: KL(now || previous) below `kl`; the first forward pass of a block has no previous one.
    """

    conf: float = 0.9
    kl: float = 0.01
    history: int = 2
    confidence: str = "model"

    def __post_init__(self) -> None:
        in_range("klass", "conf", self.conf, 0, 1)
        in_range("klass", "kl", self.kl, 0, 1e6)
        known_reading(self.confidence)
        if self.history < 1:
            raise ConfigError(f"klass.history is {self.history}; use 1 or more")

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = score(view, ids, "confidence")
        probs = view.dense(view.probs)
        moved = divergence(probs, view.state.get("probs"), "now")
        calm = torch.where(
            moved < self.kl, view.state.get("calm", torch.zeros_like(moved)) + 1, 0.0
        )
        stable = view.masked & (calm >= self.history) & (value > self.conf)
        none = ~stable.any(1, keepdim=True)
        return Commit(
            stable | (best(value, view.masked) & none), ids, extra={"probs": probs, "calm": calm}
        )

    def slowest(self) -> Decoder:
        return Klass(1.0, self.kl, self.history, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)


def divergence(now: Tensor, before: Tensor | None, under: Literal["now", "before"]) -> Tensor:
    """Return the KL divergence between a cell's distributions in two forward passes, nats, float64
    [R, n]; infinite where there is no earlier one.

    now, before: [R, n, V]. under: the distribution that the mean is taken under, KL(under ||
    other)."""
    if before is None:
        return torch.full(now.shape[:2], float("inf"), dtype=torch.float64, device=now.device)
    p, q = (now.double(), before.double()) if under == "now" else (before.double(), now.double())
    kl = (
        (torch.special.xlogy(p, p) - torch.special.xlogy(p, q.clamp(min=1e-12)))
        .sum(-1)
        .clamp(min=0)
    )
    return torch.where(before.sum(-1) > 0.5, kl, float("inf"))


@dataclass(frozen=True)
class LocalLeap(Decoder):
    """Fills as `Threshold`, with the lower threshold `relaxed` within `radius` cells of a confident
    one (LocalLeap)."""

    tau: float = 0.9
    relaxed: float = 0.75
    radius: int = 4
    confidence: str = "model"

    def __post_init__(self) -> None:
        in_range("localleap", "tau", self.tau, 0, 1)
        in_range("localleap", "relaxed", self.relaxed, 0, 1)
        known_reading(self.confidence)
        if self.radius < 0:
            raise ConfigError(f"localleap.radius is {self.radius}; use 0 or more")

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = score(view, ids, "confidence")
        anchor = (view.masked & (value > self.tau)).float()[:, None]
        near = torch.nn.functional.max_pool1d(anchor, 2 * self.radius + 1, 1, self.radius)[:, 0] > 0
        limit = torch.where(near, min(self.relaxed, self.tau), self.tau)
        return Commit(view.masked & (value > limit) | best(value, view.masked), ids)

    def slowest(self) -> Decoder:
        return LocalLeap(1.0, 1.0, self.radius, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)
