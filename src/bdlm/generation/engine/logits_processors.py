"""The sampling parameters of all rows as tensors, and their effect on logits: bans, transformers'
logits processors, temperature and filters.

In: the model's logits of the predicted cells, [M, V]. Out: the logits that decoders rank by (after
bans and processors), and those to draw from (then temperature, top-k, nucleus, min-p). Parameters
change only when a request takes or leaves a row, so nothing here loops over rows in a step. Knows
nothing about decoders or blocks.

Shapes: R rows, n cells, M predicted cells, V vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.generation.sampling.logits_filters import (
    COLD,
    NEVER,
    clamp_temperature,
    forbid,
    min_p,
    nucleus,
    temper,
    top_k,
)
from bdlm.generation.sampling_params import SamplingParams

# the class names of transformers' processors that only reshape the distribution end with this
WARPER = "Warper"


class LogitsProcessors:
    """The parameters of every row.

    temperature, top_p, min_p: float32 [R]. top_k: int64 [R]. reference_nucleus: bool [R], nucleus
    as in the published sampler. banned, early: bool [R, V] or None, tokens that a row may never
    write, and those it may not write among its first `min_new_tokens`.
    custom: logits processors by row; warpers: those of them that come last and are transformers'
    warpers, which count as filters."""

    def __init__(self, num_rows: int, vocab: int, mask_id: int, device: torch.device) -> None:
        self.vocab, self.mask_id, self.device = vocab, mask_id, device
        self.temperature = torch.ones(num_rows, dtype=torch.float32, device=device)
        self.top_p = torch.ones_like(self.temperature)
        self.min_p = torch.zeros_like(self.temperature)
        self.top_k = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.reference_nucleus = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.banned: Tensor | None = None  # made when a row first bans something
        self.early: Tensor | None = None
        self.custom: dict[int, tuple[object, ...]] = {}
        self.warpers: dict[int, tuple[object, ...]] = {}
        self._any_change = self._any_filter = self._any_min_p = self._any_cold = False

    # -- rows come and go --------------------------------------------------------------------------

    def enter(
        self, rows: list[int], params: Sequence[SamplingParams], stops: list[list[int]]
    ) -> None:
        """Set the parameters of requests that took these rows. stops: the stop tokens of each."""
        index = torch.tensor(rows, device=self.device)
        self._set(self.temperature, index, [clamp_temperature(p.temperature) for p in params])
        self._set(self.top_p, index, [p.top_p for p in params])
        self._set(self.min_p, index, [p.min_p for p in params])
        self._set(self.top_k, index, [p.top_k for p in params])
        self._set(self.reference_nucleus, index, [p.nucleus == "reference" for p in params])
        for row, own, ends in zip(rows, params, stops, strict=True):
            if own.banned_token_ids or own.allowed_token_ids:
                self.banned = self._table() if self.banned is None else self.banned
                if own.allowed_token_ids:
                    self.banned[row] = True
                    self.banned[row, list(own.allowed_token_ids)] = False
                self.banned[row, list(own.banned_token_ids)] = True
            if own.min_new_tokens and ends:
                self.early = self._table() if self.early is None else self.early
                self.early[row, ends] = True
            first, last = split_warpers(own.logits_processor)
            if first:
                self.custom[row] = first
            if last:
                self.warpers[row] = last
        self._summarise()

    def _set(self, table: Tensor, index: Tensor, values: Sequence[float]) -> None:
        table[index] = torch.tensor(values, dtype=table.dtype, device=self.device)

    def _table(self) -> Tensor:
        """An empty table of banned tokens, bool [R, V]."""
        return torch.zeros(len(self.top_k), self.vocab, dtype=torch.bool, device=self.device)

    def leave(self, rows: list[int]) -> None:
        """Reset the parameters of some rows."""
        self.temperature[rows] = 1.0
        self.top_p[rows] = 1.0
        self.min_p[rows] = 0.0
        self.top_k[rows] = 0
        self.reference_nucleus[rows] = False
        for table in (self.banned, self.early):
            if table is not None:
                table[rows] = False
        for row in rows:
            self.custom.pop(row, None)
            self.warpers.pop(row, None)
        self._summarise()

    def _summarise(self) -> None:
        """Note what any row asks for, so that a step skips the rest."""
        filters = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        self._any_filter = bool(filters.any())
        self._any_min_p = bool((self.min_p > 0).any())
        self._any_change = self._any_filter or bool((self.temperature != 1).any())
        self._any_cold = bool((self.temperature < COLD).any())
        if self.banned is not None and not bool(self.banned.any()):
            self.banned = None
        if self.early is not None and not bool(self.early.any()):
            self.early = None

    # -- logits ------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether logits are drawn from unchanged."""
        bans = self.banned is not None or self.early is not None
        return not (self._any_change or self.custom or self.warpers or bans)

    @property
    def bounds_suffice(self) -> bool:
        """Whether bounds of the logits are as good as logits: tokens are banned and logits divided,
        and nothing else."""
        return not (self._any_filter or self._any_cold or self.custom or self.warpers)

    def ban(self, logits: Tensor, row: Tensor, early: Tensor | None) -> Tensor:
        """Return the logits with the tokens that a row may not write at -inf.

        row: int64 [M], of each cell. early: bool [M], cells among the row's first
        `min_new_tokens`; None if there are none."""
        if self.banned is not None:
            logits = logits.masked_fill(self.banned[row], NEVER)
        if self.early is not None and early is not None:
            logits = logits.masked_fill(self.early[row] & early[:, None], NEVER)
        return logits

    def ban_again(self, logits: Tensor, row: Tensor, early: Tensor | None) -> Tensor:
        """As `ban`, with the mask token, for the results of processors: a processor cannot make a
        banned token possible."""
        rows = torch.tensor([*self.custom, *self.warpers], device=row.device)
        banned = forbid(self.ban(logits.clone(), row, early), self.mask_id)
        return torch.where(torch.isin(row, rows)[:, None], banned, logits)

    def cut(self, logits: Tensor, row: Tensor) -> Tensor:
        """Apply temperature, top-k, nucleus and min-p, in this order. row: int64 [M]."""
        if not self._any_change:
            return logits
        logits = temper(logits, self.temperature[row])
        if self._any_filter:
            logits = top_k(logits, self.top_k[row])
            logits = nucleus(logits, self.top_p[row], self.reference_nucleus[row])
        if self._any_min_p:
            logits = min_p(logits, self.min_p[row])
        return logits


def split_warpers(processors: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Split processors in two: up to the last that is not a warper, and the warpers behind it."""
    count = len(processors)
    while count and type(processors[count - 1]).__name__.endswith(WARPER):
        count -= 1
    return processors[:count], processors[count:]


def process(
    logits: Tensor,
    cells: Tensor,
    known: list[int],
    processors: Sequence[object],
    steps_left: int = 1,
) -> None:
    """Run transformers' processors over some of the asked cells of one row, in place.

    cells: int64 [m], lines of `logits`. known: the row's tokens so far, in the order of their
    places. steps_left: decisions that the block may still take, for processors with `cur_step`."""
    scores = logits[cells]
    ids = torch.tensor(known, device=logits.device).expand(len(cells), -1)
    for processor in processors:
        if not callable(processor):
            raise ConfigError(
                f"logits_processor holds {type(processor).__name__}, which cannot be called; use"
                " transformers' logits processors"
            )
        scores = with_step(processor, steps_left)(ids, scores)
    logits[cells] = scores


def with_step(processor: Callable[..., Any], steps_left: int) -> Callable[..., Any]:
    """The processor itself, or with its argument `cur_step` given: transformers' processors for
    diffusion take the number of steps that remain."""
    try:
        takes_step = "cur_step" in inspect.signature(processor).parameters
    except (TypeError, ValueError):  # a builtin may have no signature
        takes_step = False
    return partial(processor, cur_step=steps_left) if takes_step else processor
