"""What a decoder is: it says before the call which cells it will fill, or chooses after it.

In: the masked set, the noise keys, and after the call log-probabilities of the asked cells. Out: a
`Commit`. A decoder never sees the model, the cache, the tokenizer or the text; it can be tested
with a random tensor.

Shapes: R rows, n cells of the active block, M asked cells (row-major), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

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
    """Other canvases of the active blocks, at most K a row, whose predictions a decoder wants from
    the same call.

    ids: int64 [R, K, n], tokens of the cells that are not masked. masked: bool [R, K, n]. asked:
    bool [R, K, n], masked cells to predict; a canvas that asks nothing is not there. Canvases do
    not see each other; all see what is committed."""

    ids: Tensor
    masked: Tensor
    query_mask: Tensor


@dataclass(frozen=True)
class View:
    """What a decoder sees after a call.

    masked, filled: bool [R, n]; cells that are still to be filled / are filled by the sampler
    (given cells are neither).
    asked: bool [R, n], the cells whose predictions came. ids: int64 [R, n]. logits: [M, V], to draw
    from (after bans, processors, temperature and filters: -inf where removed). raw: [M, V], the
    model's own with the mask token at -inf. temperature: [R]. step: int64 [R], decisions made in
    this block before this one. attention: [R, n, n], mean over layers and heads, row = query, or
    None.
    state: tensors [R, n, ...] that this decoder returned in `Commit.extra` at its last decision in
    this block; zeros in rows at their first, empty at a run's first. score_factor: float [R, n], a factor
    on every score (SWD). mask_id: the mask token, for mixtures.
    hidden: [M, d], the model's state before the head, or None. rough: for decoders that only draw,
    bounds of the logits; `logits` and `raw` are then these bounds.
    tried: the same for the draft canvases, side by side: [R, K n] where this has [R, n]; None if
    there are none.
    model: [M, V], what `probs` and `best` are of: the model's logits after bans and processors,
    before temperature and filters; None stands for `logits`. cut: temperature and filters, from
    such logits [M, V] of some asked cells, bool [R, n], to `logits` of them; None changes nothing.
    """

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
        """The view whose `probs` and `best` are of the model's distribution ("model") or of the one
        that is drawn from ("sampling")."""
        if confidence == "model" or self.model is None:
            return self
        return replace(
            self,
            model=None,
            drafts=None if self.drafts is None else self.drafts.reading(confidence),
        )

    def raised(self, bonus: Tensor) -> View:
        """The view, had the model's logits been greater by `bonus`, [M, V]: temperature and filters
        come after it."""
        model = (self.logits if self.model is None else self.model) + bonus
        return replace(
            self,
            model=model,
            logits=model if self.cut is None else self.cut(model, self.query_mask),
        )

    def select_logits(self, cells: Tensor) -> dict[str, Any]:
        """`logits`, `raw` and `model` of some asked cells, bool [M]; what was one tensor stays
        one."""
        at = cells.nonzero()[:, 0]  # once for all: the device is waited for here
        found = {
            id(x): x[at]
            for x in {
                id(x): x for x in (self.logits, self.raw, self.model) if x is not None
            }.values()
        }
        return {name: found.get(id(getattr(self, name))) for name in ("logits", "raw", "model")}

    def impossible(self, commit: Commit, changed: Tensor) -> Tensor:
        """Cells of `changed`, bool [R, n], that get a token which bans or processors forbid, or of
        a score that is not a number.

        Where none could be drawn, the draw is such a token.
        """
        cells = changed & self.query_mask
        if self.model is None or self.model is self.raw or not len(self.model):
            return torch.zeros_like(cells)
        # numbers, not masks, pick the lines: the device is not waited for
        line, ids = (
            (self.query_mask.flatten().cumsum(0) - 1).clamp(min=0).view(cells.shape),
            commit.ids.clamp(0, self.model.shape[1] - 1),
        )
        own = self.model[line, ids]
        never = own == NEVER
        # then it was drawn given more than this canvas shows, where it need not be impossible
        if commit.log_prob is not None:
            never = never & (self.raw[line, ids] != NEVER)
        return cells & (never | own.isnan())

    def spread(self, values: Tensor, fill: float | int) -> Tensor:
        """Values of the asked cells, [M], laid out as [R, n] with `fill` elsewhere."""
        out = torch.full(self.query_mask.shape, fill, dtype=values.dtype, device=values.device)
        return out.masked_scatter_(self.query_mask, values)

    def dense(self, values: Tensor) -> Tensor:
        """[M, V] as [R, n, V], zeros where not asked."""
        out = values.new_zeros(*self.query_mask.shape, values.shape[-1])
        out[self.query_mask] = values
        return out

    def drawn(self, cells: Tensor) -> Tensor:
        """A token for each of `cells` (a subset of asked), int64 [R, n], 0 elsewhere.

        Gumbel-max over the noise of the keys; in greedy rows the most probable token.
        """
        row, cell = cells.nonzero(as_tuple=True)
        if self.logit_bounds is not None:
            if cells is not self.query_mask:
                raise DecoderError(
                    "a decoder that says `only_draws` drew other cells than it planned; draw"
                    " `view.asked`"
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
        """Probabilities of the asked cells, float32 [M, V]: the model's, before temperature and
        filters (but see `reading`)."""
        return (self.logits if self.model is None else self.model).float().softmax(-1)

    @cached_property
    def best(self) -> tuple[Tensor, Tensor]:
        """The greatest probability of each cell, float32 [R, n] (-1 where not asked), and its
        token, int64 [R, n].

        Among the tokens that may be drawn.
        """
        probs = self.probs
        if self.model is not None and self.model is not self.logits:
            probs = probs.masked_fill(self.logits == NEVER, -1.0)
        top, ids = probs.max(-1)
        return self.spread(top, -1.0), self.spread(ids, 0)


@dataclass(frozen=True)
class Decoder:
    """Interface of decoders: frozen dataclasses whose fields are their parameters.

    needs: of {"attention", "hidden", "filled", "soft", "draft_canvases"}; "filled" asks for
    predictions at filled cells too, "draft_canvases" for a call of `tries`.
    only_draws: whether it fills just the cells that it planned, each by `View.drawn`, and looks at
    nothing else of the predictions; said in the class that defines `choose`.
    equality: whether `slowest()` equals `reference()` "in tokens" or "in distribution"."""

    needs: ClassVar[frozenset[str]] = frozenset()
    only_draws: ClassVar[bool] = False
    equality: ClassVar[Literal["tokens", "distribution"]] = "tokens"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # said of the choice, so not inherited by another one
        if "choose" in cls.__dict__ and "only_draws" not in cls.__dict__:
            cls.only_draws = False

    def check(self, block: int, spec: ModelSpec) -> None:
        """Raise ConfigError where the parameters do not fit the block or the model."""

    def bound(self, block: int) -> int:
        """The most decisions a block of so many cells can take."""
        return block

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor | None:
        """The cells that this decision will fill, bool [R, n], if known before the call; None asks
        for every masked cell."""
        return None

    def draft_canvases(
        self,
        masked: Tensor,
        filled: Tensor,
        ids: Tensor,
        noise: CellNoise,
        state: dict[str, Tensor],
    ) -> DraftCanvases | None:
        """Other canvases to predict in this call. masked, filled: bool [R, n]. ids: int64 [R, n].
        state: as `View.state`."""
        return None

    def choose(self, view: View) -> Commit:
        raise ConfigError(f"decoder {type(self).__name__} does not choose")

    def slowest(self) -> Decoder:
        """This decoder with its speed knob at the slow end."""
        return self

    def reference(self) -> Decoder:
        """The decoder that `slowest()` equals."""
        return self


def in_range(decoder: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless value is a number with low <= value <= high."""
    if not low <= coerce(f"{decoder}.{name}", value, float) <= high:
        raise ConfigError(f"{decoder}.{name} is {value}; use a value in [{low:g}, {high:g}]")
