"""Decoders that modify another one: stability weighting, attention order, an adaptive block end,
credit.

Source: arXiv 2604.08564 (Attn-Sampler), 2604.17068 (SWD), 2509.26432 (AdaBlock); the code of dInfer
(credit). Shapes as in `base`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.types import Commit, ModelSpec
from bdlm.generation.decoders.base import Decoder, View, in_range
from bdlm.generation.decoders.confidence import (
    FixedK,
    Threshold,
    best,
    candidates,
    confidence,
    divergence,
    known_reading,
)


@dataclass(frozen=True)
class StabilityWeighted(Decoder):
    """Multiplies every score by exp(-lam KL(previous || now)): a cell with a changing distribution
    depends on cells that are still masked (SWD).

    Modifies fixed-k (`tau` None) or threshold decoding. The first forward pass of a block has
    factor 1. lam and the direction of the KL are those of a public re-implementation."""

    lam: float = 5.0
    k: int = 1
    tau: float | None = None
    score: str = "confidence"
    confidence: str = "model"

    def __post_init__(self) -> None:
        in_range("swd", "lam", self.lam, 0, 1e6)
        self._inner()

    def _inner(self) -> Decoder:
        own = (self.score, self.confidence)
        return FixedK(self.k, *own) if self.tau is None else Threshold(self.tau, *own)

    def check(self, block: int, spec: ModelSpec) -> None:
        self._inner().check(block, spec)

    def choose(self, view: View) -> Commit:
        probs = view.dense(view.reading(self.confidence).probs)
        moved = divergence(probs, view.state.get("probs"), "before")
        score_factor = torch.where(moved.isfinite(), (-self.lam * moved).exp(), 1.0).float()
        return replace(
            self._inner().choose(replace(view, score_factor=score_factor)), extra={"probs": probs}
        )

    def slowest(self) -> Decoder:
        return StabilityWeighted(0.0, 1, None, self.score, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, self.score, self.confidence)


@dataclass(frozen=True)
class AttentionOrder(Decoder):
    """Fills the cell that the block attends to most, and all that are confident and receive at
    least the mean attention (Attn-Sampler).

    A cell's weight is the attention that it receives from the block's cells, mean over layers and
    heads. The paper does not give its dynamic threshold; the mean over the cells still masked is
    our reading."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    conf: float = 0.9
    confidence: str = "model"

    def __post_init__(self) -> None:
        in_range("attention", "conf", self.conf, 0, 1)
        known_reading(self.confidence)

    def check(self, block: int, spec: ModelSpec) -> None:
        if "attention" not in spec.supports:
            raise ConfigError(
                "decoder 'attention' needs attention weights, which this model does not give; use"
                " 'threshold'"
            )

    def choose(self, view: View) -> Commit:
        if view.attention is None:
            raise UnsupportedError(
                "decoder 'attention' needs attention weights, but its view holds none; use"
                " 'threshold'"
            )
        weight = view.attention.sum(1)
        count = view.masked.sum(1, keepdim=True).clamp(min=1)
        mean = (weight * view.masked).sum(1, keepdim=True) / count
        ids, view = candidates(view), view.reading(self.confidence)
        sure = view.masked & (confidence(view, ids) > self.conf) & (weight >= mean)
        return Commit(sure | best(weight, view.masked), ids)

    def slowest(self) -> Decoder:
        return AttentionOrder(1.0, self.confidence)

    def reference(self) -> Decoder:
        return AttentionOrder(1.0, self.confidence)


@dataclass(frozen=True)
class AdaptiveBlock(Decoder):
    """Fills as `Threshold`, in blocks that may end early at a confident delimiter (AdaBlock).

    At a block's first decision, the most confident cell with a delimiter as its best token ends the
    block there, if its probability is at least `tau_end`; the remaining cells begin the next block.
    """

    delimiters: tuple[int, ...] = ()
    tau_end: float = 0.3
    tau: float = 0.9
    confidence: str = "model"

    def __post_init__(self) -> None:
        known_reading(self.confidence)
        in_range("adablock", "tau_end", self.tau_end, 0, 1)
        in_range("adablock", "tau", self.tau, 0, 1)

    def check(self, block: int, spec: ModelSpec) -> None:
        if spec.streams == 1:
            raise ConfigError(
                "decoder 'adablock' ends blocks early, but this model writes the whole text as one"
                " block; use 'threshold'"
            )
        wrong = [i for i in self.delimiters if not 0 <= i < spec.vocab_size]
        if wrong:
            raise ConfigError(
                f"adablock.delimiters holds token {wrong[0]}, outside the vocabulary of"
                f" {spec.vocab_size}"
            )

    def choose(self, view: View) -> Commit:
        place = torch.arange(view.masked.shape[1], device=view.masked.device)
        last = view.state.get(
            "last", torch.zeros(view.masked.shape, dtype=torch.long, device=view.masked.device)
        )
        last = torch.where(
            (view.step == 0)[:, None], self._end(view)[:, None].expand_as(last), last
        )
        inner = replace(view, masked=view.masked & (place <= last))
        commit = Threshold(self.tau, confidence=self.confidence).choose(inner)
        left = inner.masked & ~commit.cells
        early = ~left.any(1) & (view.masked & ~commit.cells).any(1)
        return replace(commit, end_block=early, extra={"last": last})

    def _end(self, view: View) -> Tensor:
        """The last cell of the block, int64 [R]."""
        n = view.masked.shape[1]
        if not self.delimiters:
            return torch.full((view.masked.shape[0],), n - 1, device=view.masked.device)
        top, ids = view.reading(self.confidence).best
        ends = torch.isin(ids, torch.tensor(self.delimiters, device=ids.device)) & view.masked
        value = top.masked_fill(~ends, -1.0)
        where = value.argmax(1)
        return torch.where(value.gather(1, where[:, None])[:, 0] >= self.tau_end, where, n - 1)

    def slowest(self) -> Decoder:
        return AdaptiveBlock((), 1.0, 1.0, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)


@dataclass(frozen=True)
class Credit(Decoder):
    """Fills as `Threshold`, with a bonus on the logits of tokens that have long been the best
    (dInfer).

    A block's credit C [n, V] starts at 0; each forward pass, C <- decay C, then C[best token] +=
    p^power. Cells are ranked and drawn from the model's logits + alpha log(1 + C), before
    temperature and filters."""

    tau: float = 0.9
    decay: float = 0.8
    power: float = 0.2
    alpha: float = 0.7
    confidence: str = "model"

    def __post_init__(self) -> None:
        known_reading(self.confidence)
        for name in ("tau", "decay"):
            in_range("credit", name, getattr(self, name), 0, 1)
        for name in ("power", "alpha"):
            in_range("credit", name, getattr(self, name), 0, 1e3)

    def choose(self, view: View) -> Commit:
        top, ids = view.reading(self.confidence).best
        none = torch.zeros(
            *view.masked.shape,
            view.logits.shape[-1],
            dtype=torch.float32,
            device=view.logits.device,
        )
        before = view.state.get("credit", none)
        gain = torch.where(view.masked, top.clamp(min=0) ** self.power, 0.0)
        total = (self.decay * before).scatter_add(-1, ids[..., None], gain[..., None])
        inner = view.raised(self.alpha * torch.log1p(total[view.query_mask]).to(view.raw.dtype))
        return replace(
            Threshold(self.tau, confidence=self.confidence).choose(inner), extra={"credit": total}
        )

    def slowest(self) -> Decoder:
        return Credit(1.0, self.decay, self.power, 0.0, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)
