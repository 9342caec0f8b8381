"""The interface of decoders: a decoder plans which cells to predict, and chooses which to fill.

In: which cells are masked, the noise of the cells, and after the forward pass the logits of the
predicted cells. Out: a `Commit`. A decoder never sees the model, the cache, the tokenizer or the
text; it can be tested with a random tensor.

Shapes: R rows, n cells of the active block, K draft canvases of a row, M predicted cells
(row-major), V vocabulary, d width of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, DecoderError
from bdlm.core.types import Commit, LogitBounds, ModelSpec
from bdlm.core.validation import coerce
from bdlm.generation.sampling.logits_filters import NEVER
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling.sampler import draw_from_bounds, draw_hashed

# distributions that a decoder can rank cells by, see `View.reading`
READINGS = ("model", "sampling")


@dataclass(frozen=True)
class DraftCanvases:
    """Other canvases of the active blocks, at most K per row, to predict in the same forward pass.

    ids: int64 [R, K, n], tokens of the cells that are not masked. masked: bool [R, K, n].
    query_mask: bool [R, K, n], masked cells to predict; a canvas without any is left out. Canvases
    do not see each other; all see the committed cells."""

    ids: Tensor
    masked: Tensor
    query_mask: Tensor


@dataclass(frozen=True)
class View:
    """What a decoder sees of a forward pass.

    masked, filled: bool [R, n], cells still to be filled, and cells that the decoder has filled
        (given cells are neither).
    query_mask: bool [R, n], the cells that were predicted. ids: int64 [R, n].
    logits: [M, V], to draw from: after bans, processors, temperature and filters, -inf where
        removed. raw: [M, V], the model's own, with the mask token at -inf.
    temperature: float32 [R]. step: int64 [R], decisions made in this block before this one.
    noise: the noise of the cells.
    attention: [R, n, n], mean over layers and heads, row = query; None unless needed.
    state: tensors [R, n, ...] that this decoder returned in `Commit.extra` at its last decision in
        this block; zeros in rows at their first decision, empty at the first of a run.
    score_factor: float [R, n], a factor on every score (stability weighting), or None.
    mask_id: the mask token, for mixtures. hidden: [M, d], the state before the head; None unless
        needed.
    logit_bounds: for decoders that only draw, bounds of the logits; `logits` and `raw` are then
        these bounds.
    drafts: the view of the draft canvases, concatenated: [R, K n] where this has [R, n]; or None.
    model: [M, V], the logits that `probs` and `best` are computed from: after bans and processors,
        before temperature and filters; None stands for `logits`.
    cut: applies temperature and filters: from such logits, [M, V], of some cells, bool [R, n], to
        `logits` of these; None changes nothing."""

    masked: Tensor
    filled: Tensor
    query_mask: Tensor
    ids: Tensor
    logits: Tensor
    raw: Tensor
    temperature: Tensor
    step: Tensor
    noise: CellNoise
    attention: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    score_factor: Tensor | None = None
    mask_id: int = -1
    hidden: Tensor | None = None
    logit_bounds: LogitBounds | None = None
    drafts: View | None = None
    model: Tensor | None = None
    cut: Callable[[Tensor, Tensor], Tensor] | None = None

    def reading(self, confidence: str) -> View:
        """Return the view with `probs` and `best` of the model's distribution ("model") or of the
        distribution that is drawn from ("sampling")."""
        if confidence == "model" or self.model is None:
            return self
        return replace(
            self,
            model=None,
            drafts=None if self.drafts is None else self.drafts.reading(confidence),
        )

    def raised(self, bonus: Tensor) -> View:
        """Return the view with `bonus`, [M, V], added to the model's logits, before temperature
        and filters."""
        model = (self.logits if self.model is None else self.model) + bonus
        return replace(
            self,
            model=model,
            logits=model if self.cut is None else self.cut(model, self.query_mask),
        )

    def select_logits(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `logits`, `raw` and `model` of some predicted cells, bool [M]; fields that share a
        tensor still do."""
        at = cells.nonzero()[:, 0]  # once for all three: this waits for the device
        logits = self.logits[at]
        raw = logits if self.raw is self.logits else self.raw[at]
        if self.model is None:
            return logits, raw, None
        if self.model is self.logits:
            return logits, raw, logits
        return logits, raw, raw if self.model is self.raw else self.model[at]

    def impossible(self, commit: Commit, changed: Tensor) -> Tensor:
        """Return the cells of `changed`, bool [R, n], that get a token that is banned or has
        a score that is not a number.

        If no token can be drawn, the draw gives such a token."""
        cells = changed & self.query_mask
        if self.model is None or self.model is self.raw or not len(self.model):
            return torch.zeros_like(cells)
        # indices, not masks, select the lines: this does not wait for the device
        line = (self.query_mask.flatten().cumsum(0) - 1).clamp(min=0).view(cells.shape)
        ids = commit.ids.clamp(0, self.model.shape[1] - 1)
        own = self.model[line, ids]
        never = own == NEVER
        # then it was drawn from another canvas, where the token may be possible
        if commit.log_prob is not None:
            never = never & (self.raw[line, ids] != NEVER)
        return cells & (never | own.isnan())

    def spread(self, values: Tensor, fill: float | int) -> Tensor:
        """Place values of the predicted cells, [M], in a [R, n] that holds `fill` elsewhere."""
        out = torch.full(self.query_mask.shape, fill, dtype=values.dtype, device=values.device)
        return out.masked_scatter_(self.query_mask, values)

    def dense(self, values: Tensor) -> Tensor:
        """Place values of the predicted cells, [M, V], in a [R, n, V] of zeros."""
        out = values.new_zeros(*self.query_mask.shape, values.shape[-1])
        out[self.query_mask] = values
        return out

    def drawn(self, cells: Tensor) -> Tensor:
        """Draw a token for each of `cells`, bool [R, n], a subset of `query_mask`. Returns int64
        [R, n], 0 elsewhere.

        Gumbel-max with the noise of the cells; at temperature 0 the most probable token. Raises
        DecoderError where only bounds of the logits are known and `cells` is not `query_mask`."""
        row, cell = cells.nonzero(as_tuple=True)
        if self.logit_bounds is not None:
            if cells is not self.query_mask:
                raise DecoderError(
                    "a decoder with `only_draws` drew other cells than it planned; draw"
                    " `view.query_mask`"
                )
            best = draw_from_bounds(self.logit_bounds, self.noise.token_state[row, cell])
            return torch.zeros_like(self.ids).masked_scatter_(cells, best)
        logits = (
            self.logits
            if row.numel() == self.logits.shape[0]
            else self.logits[cells[self.query_mask]]
        )
        best = draw_hashed(logits, self.noise.token_state[row, cell], self.temperature[row] == 0)
        return torch.zeros_like(self.ids).masked_scatter_(cells, best)

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities of the predicted cells, float32 [M, V]: the model's, before temperature and
        filters (but see `reading`)."""
        return (self.logits if self.model is None else self.model).float().softmax(-1)

    @cached_property
    def best(self) -> tuple[Tensor, Tensor]:
        """The greatest probability of each cell, float32 [R, n] (-1 where not predicted), and its
        token, int64 [R, n], among the tokens that may be drawn."""
        probs = self.probs
        if self.model is not None and self.model is not self.logits:
            probs = probs.masked_fill(self.logits == NEVER, -1.0)
        top, ids = probs.max(-1)
        return self.spread(top, -1.0), self.spread(ids, 0)


@dataclass(frozen=True)
class Decoder:
    """Base class of decoders: frozen dataclasses with their parameters as fields.

    A decoder defines `choose`, and `plan` if it knows the cells before the forward pass.

    needs: of {"attention", "hidden", "filled", "soft", "draft_canvases"}; "filled" predicts filled
        cells too, "draft_canvases" calls `draft_canvases`.
    only_draws: True if `choose` fills exactly the planned cells, each by `View.drawn`, and reads
        nothing else of the predictions. Not inherited by a class that defines another `choose`.
    equality: whether `slowest()` equals `reference()` in "tokens" or in "distribution"."""

    needs: ClassVar[frozenset[str]] = frozenset()
    only_draws: ClassVar[bool] = False
    equality: ClassVar[Literal["tokens", "distribution"]] = "tokens"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # a statement about `choose`, so another `choose` does not inherit it
        if "choose" in cls.__dict__ and "only_draws" not in cls.__dict__:
            cls.only_draws = False

    def check(self, block: int, spec: ModelSpec) -> None:
        """Raise ConfigError where the parameters do not fit a block of so many cells, or the
        model."""

    def bound(self, block: int) -> int:
        """Return the most decisions that a block of so many cells can take; a request that takes
        more ends with a DecoderError."""
        return block

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor | None:
        """Return the cells that this decision will fill, bool [R, n], if known before the forward
        pass; None predicts every masked cell. masked: bool [R, n]."""
        return None

    def draft_canvases(
        self,
        masked: Tensor,
        filled: Tensor,
        ids: Tensor,
        noise: CellNoise,
        state: dict[str, Tensor],
    ) -> DraftCanvases | None:
        """Return other canvases to predict in this forward pass, or None. masked, filled: bool [R,
        n]. ids: int64 [R, n]. state: as `View.state`."""
        return None

    def choose(self, view: View) -> Commit:
        """Return which cells to fill, and with which tokens."""
        raise ConfigError(f"decoder {type(self).__name__} does not choose")

    def slowest(self) -> Decoder:
        """Return this decoder with its speed parameter at the slow end."""
        return self

    def reference(self) -> Decoder:
        """Return the decoder that `slowest()` equals."""
        return self


def in_range(decoder: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless value is a number with low <= value <= high."""
    if not low <= coerce(f"{decoder}.{name}", value, float) <= high:
        raise ConfigError(f"{decoder}.{name} is {value}; use a value in [{low:g}, {high:g}]")
