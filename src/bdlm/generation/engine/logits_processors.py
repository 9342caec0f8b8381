"""The sampling parameters of all rows as tensors, and what they make of a call's logits: bans,
processors, temperature and filters.

In: the model's logits of the asked cells, [M, V]. Out: the logits that decoders rank by (bans and
processors), and those to draw from (then temperature, top-k, nucleus, min-p). Parameters change
only when a request takes or leaves a slot, so that nothing here loops over rows at a call. Knows
nothing about decoders or blocks.

Shapes: R rows, n cells, M asked cells, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.generation.sampling.sampler import (
    COLD,
    NEVER,
    forbid,
    min_p,
    nucleus,
    temper,
    top_k,
    usable,
)
from bdlm.generation.sampling_params import SamplingParams

# ends the class names of transformers' processors that make a sampler's distribution of the model's
WARPER = "Warper"


class LogitsProcessors:
    """Per-row parameters. temperature, top_p, min_p: float32 [R]. top_k: int64 [R]. reference: bool
    [R], the reference's nucleus.

    processors: of the rows that have some, and warpers: those of them that stand last and are
    transformers' warpers, which count as filters.
    """

    def __init__(self, rows: int, vocab: int, mask_id: int, device: torch.device) -> None:
        self.vocab, self.mask_id, self.device = vocab, mask_id, device
        self.temperature, self.top_p = (
            torch.ones(rows, dtype=torch.float32, device=device) for _ in range(2)
        )
        self.min_p = torch.zeros(rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.long, device=device)
        self.reference = torch.zeros(rows, dtype=torch.bool, device=device)
        self.banned: Tensor | None = None  # bool [R, V], made when a row first bans something
        self.early: Tensor | None = None  # bool [R, V], banned before the row's floor
        self.custom: dict[int, tuple[object, ...]] = {}
        self.warpers: dict[int, tuple[object, ...]] = {}
        self._shapes = self._cuts = self._cold = self._rare = False

    def enter(
        self, rows: list[int], params: Sequence[SamplingParams], stops: list[list[int]]
    ) -> None:
        """Take over the parameters of requests that took these slots. stops: stop tokens of
        each."""
        index = torch.tensor(rows, device=self.device)
        self.temperature[index] = torch.tensor(
            [usable(p.temperature) for p in params], dtype=torch.float32, device=self.device
        )
        self.top_p[index] = torch.tensor(
            [p.top_p for p in params], dtype=torch.float32, device=self.device
        )
        self.min_p[index] = torch.tensor(
            [p.min_p for p in params], dtype=torch.float32, device=self.device
        )
        self.top_k[index] = torch.tensor([p.top_k for p in params], device=self.device)
        self.reference[index] = torch.tensor(
            [p.nucleus == "reference" for p in params], device=self.device
        )
        for i, own, ends in zip(rows, params, stops, strict=True):
            if own.banned_token_ids or own.allowed_token_ids:
                self._ban(i, own)
            if own.min_new_tokens and ends:
                if self.early is None:
                    self.early = torch.zeros(
                        len(self.top_k), self.vocab, dtype=torch.bool, device=self.device
                    )
                self.early[i, ends] = True
            first, last = warpers_of(own.logits_processor)
            if first:
                self.custom[i] = first
            if last:
                self.warpers[i] = last
        self._note()

    def _ban(self, row: int, params: SamplingParams) -> None:
        if self.banned is None:
            self.banned = torch.zeros(
                len(self.top_k), self.vocab, dtype=torch.bool, device=self.device
            )
        if params.allowed_token_ids:
            self.banned[row] = True
            self.banned[row, list(params.allowed_token_ids)] = False
        self.banned[row, list(params.banned_token_ids)] = True

    def leave(self, rows: list[int]) -> None:
        """Rows without a request."""
        self.temperature[rows], self.top_p[rows], self.top_k[rows], self.reference[rows] = (
            1.0,
            1.0,
            0,
            False,
        )
        self.min_p[rows] = 0.0
        for table in (self.banned, self.early):
            if table is not None:
                table[rows] = False
        for row in rows:
            self.custom.pop(row, None)
            self.warpers.pop(row, None)
        self._note()

    def _note(self) -> None:
        self._cuts = bool(((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)).any())
        self._rare = bool((self.min_p > 0).any())
        self._shapes = self._cuts or bool((self.temperature != 1).any())
        self._cold = bool((self.temperature < COLD).any())
        if self.banned is not None and not bool(self.banned.any()):
            self.banned = None
        if self.early is not None and not bool(self.early.any()):
            self.early = None

    @property
    def idle(self) -> bool:
        """Whether logits are drawn from as they are."""
        return not (
            self._shapes
            or self.custom
            or self.warpers
            or self.banned is not None
            or self.early is not None
        )

    @property
    def bounds(self) -> bool:
        """Whether bounds of the logits are as good as logits: tokens are forbidden and logits
        divided, and nothing else."""
        return not (self._cuts or self._cold or self.custom or self.warpers)

    def shape(self, logits: Tensor, row: Tensor, before: Tensor) -> Tensor:
        """Tokens that a row may not write made impossible, in a copy.

        row: int64 [M], of each asked cell. before: bool [M], cells that stand before their row's
        floor for stop tokens."""
        if self.banned is not None:
            logits = logits.masked_fill(self.banned[row], NEVER)
        if self.early is not None:
            logits = logits.masked_fill(self.early[row] & before[:, None], NEVER)
        return logits

    def after(self, logits: Tensor, row: Tensor, before: Tensor) -> Tensor:
        """As `shape` for what processors made of logits, the mask token included: a processor makes
        nothing possible again."""
        row_mask = torch.isin(row, torch.tensor([*self.custom, *self.warpers], device=row.device))
        return torch.where(
            row_mask[:, None], forbid(self.shape(logits.clone(), row, before), self.mask_id), logits
        )

    def cut(self, logits: Tensor, row: Tensor) -> Tensor:
        """Temperature, top-k, nucleus and min-p, in this order."""
        if not self._shapes:
            return logits
        logits = temper(logits, self.temperature[row])
        if self._cuts:
            logits = nucleus(top_k(logits, self.top_k[row]), self.top_p[row], self.reference[row])
        if self._rare:
            logits = min_p(logits, self.min_p[row])
        return logits


def warpers_of(processors: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Processors in two parts: all up to the last that is not a warper, and the warpers behind
    it."""
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
                f"processors holds {type(processor).__name__}, which cannot be called; use"
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
