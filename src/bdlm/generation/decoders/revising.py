"""Decoders that mask or change again what they filled: ReMDM, editing after the block is full, soft
parallel decoding.

Source: arXiv 2602.08676 (LLaDA2.1), 2604.08302 (DMax), 2503.00307 (ReMDM). Shapes as in `base`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.types import Commit, ModelSpec, Soft
from bdlm.generation.decoders.base import Decoder, View, in_range
from bdlm.generation.decoders.confidence import (
    FixedK,
    Threshold,
    best,
    candidates,
    confidence,
    known_reading,
)


@dataclass(frozen=True)
class ReMDM(Decoder):
    """Samples as ancestral, on a grid of T steps, and masks filled cells again with probability
    sigma_t (linear schedule).

    sigma_t <= (1 - alpha_s) / alpha_t. kind "cap": min(eta, that bound); "rescale": eta times the
    bound; "conf": as "rescale", distributed over the filled cells by the softmax of minus their
    confidence when they were filled. The share of masked cells keeps its distribution."""

    needs: ClassVar[frozenset[str]] = frozenset({"filled"})
    equality: ClassVar[Literal["tokens", "distribution"]] = "distribution"
    steps: int = 32
    eta: float = 0.04
    kind: str = "cap"
    confidence: str = "model"

    def __post_init__(self) -> None:
        known_reading(self.confidence)
        in_range("remdm", "eta", self.eta, 0, 1)
        if self.steps < 1:
            raise ConfigError(f"remdm.steps is {self.steps}; use 1 or more")
        if self.kind not in ("cap", "rescale", "conf"):
            raise ConfigError(f"remdm.kind is '{self.kind}'; use cap, rescale or conf")

    def bound(self, block: int) -> int:
        return self.steps

    def check(self, block: int, spec: ModelSpec) -> None:
        if spec.noise == "none":
            raise ConfigError(
                "decoder 'remdm' masks cells of a block again, but an autoregressive model sees"
                " none; use 'first-hitting'"
            )

    def choose(self, view: View) -> Commit:
        t = (1 - view.step / self.steps)[:, None]
        alpha_t, alpha_s = 1 - t, (1 - t + 1 / self.steps).clamp(max=1)
        most = torch.where(alpha_t > 0, ((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(0, 1), 1.0)
        sigma = (
            torch.minimum(most, torch.full_like(most, self.eta))
            if self.kind == "cap"
            else self.eta * most
        )
        release = ((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)).clamp(0, 1)
        u = view.noise.uniform(view.step[:, None])
        kept = view.state.get("conf", torch.zeros_like(view.masked, dtype=torch.float32))
        cells = view.masked & (u < release)
        reopen = view.filled & (u < self._spread(sigma, kept, view.filled))
        ids = candidates(view)
        kept = torch.where(cells, confidence(view.reading(self.confidence), ids), kept)
        last = (view.step >= self.steps - 1)[:, None]
        reopen = reopen & ~last
        return Commit(
            cells | (view.masked & last), ids, reopen=reopen, hold=~last[:, 0], extra={"conf": kept}
        )

    def _spread(self, sigma: Tensor, kept: Tensor, filled: Tensor) -> Tensor:
        if self.kind != "conf":
            return sigma
        share = (-kept).masked_fill(~filled, float("-inf")).softmax(1).nan_to_num(0.0)
        return (sigma * share * filled.sum(1, keepdim=True)).clamp(max=1)

    def slowest(self) -> Decoder:
        return ReMDM(self.steps, 0.0, "cap", self.confidence)

    def reference(self) -> Decoder:
        from bdlm.generation.decoders.exact import Ancestral

        return Ancestral(self.steps)


@dataclass(frozen=True)
class Edit(Decoder):
    """Fills as `Threshold`, and rewrites filled cells with another best token of a probability
    above tau_edit (LLaDA2.1).

    When the block is full, it continues to rewrite until nothing changes, for at most `passes` more
    forward passes. Prompt cells are never edited."""

    needs: ClassVar[frozenset[str]] = frozenset({"filled"})
    tau_mask: float = 0.95
    tau_edit: float = 0.9
    passes: int = 16
    confidence: str = "model"

    def __post_init__(self) -> None:
        known_reading(self.confidence)
        in_range("edit", "tau_mask", self.tau_mask, 0, 1)
        in_range("edit", "tau_edit", self.tau_edit, 0, 1)
        if self.passes < 0:
            raise ConfigError(f"edit.passes is {self.passes}; use 0 or more")

    def bound(self, block: int) -> int:
        return block + self.passes

    def check(self, block: int, spec: ModelSpec) -> None:
        if spec.noise == "none":
            raise ConfigError(
                "decoder 'edit' rewrites cells of a block, but an autoregressive model sees none;"
                " use 'first-hitting'"
            )

    def choose(self, view: View) -> Commit:
        commit = Threshold(self.tau_mask, confidence=self.confidence).choose(view)
        top, ids = view.reading(self.confidence).best
        change = view.filled & (ids != view.ids) & (top > self.tau_edit)
        full = ~view.masked.any(1)
        spent = view.state.get(
            "spent", torch.zeros(view.masked.shape, dtype=torch.long, device=view.masked.device)
        )
        spent = spent + full.long()[:, None]
        fills = ~(view.masked & ~commit.cells).any(1)
        go_on = (
            torch.where(
                full, change.any(1) & (spent[:, 0] < self.passes), fills & (self.passes > 0)
            )
            if self.tau_edit < 1
            else fills & False
        )
        return Commit(
            commit.cells,
            torch.where(change, ids, commit.ids),
            overwrite=change,
            hold=go_on,
            extra={"spent": spent},
        )

    def slowest(self) -> Decoder:
        return Edit(1.0, 1.0, 0, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)


@dataclass(frozen=True)
class SoftParallel(Decoder):
    """Fills a confident prefix, rewrites every filled cell with its new best token, and feeds
    filled cells as mixtures (DMax).

    The masked cells are filled from the left up to the first with a confidence below `tau` (at
    least the first). A filled cell's input is c E[token] + (1 - c) E[mask], rescaled to the
    mixture's norm. The block ends when all cells reach `done` or nothing changes."""

    needs: ClassVar[frozenset[str]] = frozenset({"filled", "soft"})
    equality: ClassVar[Literal["tokens", "distribution"]] = "tokens"
    tau: float = 0.9
    done: float = 0.9
    passes: int = 8
    mix: bool = True
    confidence: str = "model"

    def __post_init__(self) -> None:
        known_reading(self.confidence)
        in_range("soft", "tau", self.tau, 0, 1)
        in_range("soft", "done", self.done, 0, 1)
        if self.passes < 0:
            raise ConfigError(f"soft.passes is {self.passes}; use 0 or more")

    def bound(self, block: int) -> int:
        return block + self.passes

    def check(self, block: int, spec: ModelSpec) -> None:
        if "soft" not in spec.supports:
            raise ConfigError(
                "decoder 'soft' feeds mixtures of tokens, which this model does not take; use"
                " 'edit'"
            )

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = confidence(view, ids)
        sure = (value >= self.tau) | ~view.masked if self.tau < 1 else ~view.masked
        first = best(
            -torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).float(), view.masked
        )
        cells = view.masked & (sure.long().cumprod(1).bool() | first)
        top, argmax = view.best
        rewrite = view.filled & (argmax != view.ids) & (self.passes > 0)
        tokens = torch.where(rewrite, argmax, torch.where(cells, ids, view.ids))
        conf = torch.where(cells, value, torch.where(view.filled, top.clamp(min=0), 0.0))
        full = ~(view.masked & ~cells).any(1)
        was_full = ~view.masked.any(1)
        spent = (
            view.state.get("spent", torch.zeros(ids.shape, dtype=torch.long, device=ids.device))
            + was_full.long()[:, None]
        )
        written = view.filled | cells
        settled = ((conf >= self.done) | ~written).all(1) | (was_full & ~rewrite.any(1))
        hold = full & ~settled & (spent[:, 0] < self.passes)
        soft = self._mixture(tokens, conf, written, view) if self.mix else None
        return Commit(
            cells, tokens, overwrite=rewrite, hold=hold, soft=soft, extra={"spent": spent}
        )

    def _mixture(self, tokens: Tensor, conf: Tensor, written: Tensor, view: View) -> Soft:
        mask = torch.where(view.masked & ~written, view.ids, tokens)
        other = torch.full_like(tokens, view.mask_id)
        weight = torch.where(written, conf, 1.0)
        return Soft(
            torch.stack((mask, other), -1), torch.stack((weight, 1 - weight), -1), keep_norm=True
        )

    def slowest(self) -> Decoder:
        return replace(self, tau=1.0, done=0.0, passes=0, mix=False)

    def reference(self) -> Decoder:
        return LeftToRight()


@dataclass(frozen=True)
class LeftToRight(Decoder):
    """Fills one cell per decision, from the left: autoregression inside the block. The slow end of
    soft parallel decoding."""

    only_draws: ClassVar[bool] = True

    def plan(self, masked: Tensor, noise: object) -> Tensor:
        return masked & (masked.long().cumsum(1) == 1)

    def choose(self, view: View) -> Commit:
        return Commit(view.query_mask, view.drawn(view.query_mask))
