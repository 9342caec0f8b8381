"""Define the records that every layer uses: one forward pass of a model (`Step` -> `Out`), what a
model is (`ModelSpec`), a noised batch.

Shapes: R rows, N cells of one forward pass (not the sequence length), L cells of a window, V
vocabulary, M queried cells. A *cell* is one place for a token. A *clean* cell holds a known token;
a *noisy* cell belongs to a block being denoised (its token may be the mask, or already revealed).
This module knows nothing about transformers, text or sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from bdlm.core.errors import public_record
from bdlm.core.validation import validate_fields

CLEAN = -1  # the group of every clean cell
# document of padding, which sees and is seen by padding only; in Step.write: not written
NOWHERE = -1


@public_record
@dataclass(frozen=True)
class ModelSpec:
    """State the conventions of a model, so that nothing about it is guessed.

    noise: "mask" (absorbing), "uniform" (random tokens), or "none" (autoregressive: predicts from
    clean cells alone).
    prediction: "tokens" = logits of the clean token; "log_score" = log-scores as in SEDD.
    shift: the raw logits of cell i predict cell i+1 (as in adapted autoregressive models and all
    "none" models).
    context: clean cells see their whole block ("block") or only what is at or before them
    ("causal").
    streams: 2 = noisy cells and a clean context; 1 = noisy cells only (MDLM, SEDD: one block, no
    context).
    first_token: id that opens every text (BOS), or None.
    stop_token: id that ends a text, or None.
    other_stop_tokens: further ids that end a text.
    unused_ids: rows of a padded vocabulary that stand for no token; they count in a likelihood's
    normaliser and are never written.
    max_position: the most cells of a text, where positions come from a learned table (GPT-2);
        None where any length can be computed.
    supports: extras that `step` honours, of {"cache", "attention", "hidden", "soft", "overwrite",
    "layer_reuse", "ragged_batching", "logit_bounds"}. With "ragged_batching", rows at different
    phases cost no padding where a step promises `append_only`; "logit_bounds" fills
    `Out.logit_bounds`."""

    vocab_size: int
    mask_id: int
    block_size: int
    max_length: int
    noise: Literal["mask", "uniform", "none"] = "mask"
    prediction: Literal["tokens", "log_score"] = "tokens"
    time_conditioned: bool = False
    shift: bool = False
    context: Literal["block", "causal"] = "block"
    streams: Literal[1, 2] = 2
    first_token: int | None = None
    stop_token: int | None = None
    supports: frozenset[str] = frozenset({"cache"})
    other_stop_tokens: tuple[int, ...] = ()
    unused_ids: frozenset[int] = frozenset()
    max_position: int | None = None

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def never_written(self) -> frozenset[int]:
        """Return the ids that no text may contain: the mask token, if there is one, and unused
        ids."""
        return self.unused_ids | ({self.mask_id} if self.mask_id >= 0 else frozenset())


@public_record
@dataclass(frozen=True)
class Layout:
    """Place each cell of a window: a block map written out. All fields int64 [R, L] (R may be 1:
    the same for all rows).

    position: place in the text, for rotary embeddings.
    doc: document; NOWHERE (-1) for padding.
    block: which cells share one time (unique within the row).
    rank, group, limit: who may see whom (`core.visibility`)."""

    position: Tensor
    block: Tensor
    rank: Tensor
    group: Tensor
    limit: Tensor
    doc: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Layout:
        """Apply a function to every field: `layout.map(lambda x: x[:, cells])` selects cells."""
        return Layout(
            function(self.position),
            function(self.block),
            function(self.rank),
            function(self.group),
            function(self.limit),
            function(self.doc),
        )

    def expand(self, rows: int) -> Layout:
        """Return the layout with a leading size of `rows`; the same object if it has that size."""
        if self.position.shape[0] == rows:
            return self
        return self.map(lambda x: x.expand(rows, -1))

    def to(self, device: Any) -> Layout:
        """Return the layout with every field on `device`."""
        return self.map(lambda x: x.to(device))


@dataclass(frozen=True)
class Soft:
    """Feed a mixture of tokens in place of one: K candidates a cell.

    ids: int64 [R, N, K]. weight: float [R, N, K], summing to 1.
    keep_norm: rescale the mixed embedding to the weighted mean of the candidates' norms (DMax)."""

    ids: Tensor
    weight: Tensor
    keep_norm: bool = False


@public_record
@dataclass(frozen=True)
class Step:
    """Describe one forward pass: cells, and who may see whom. Everything int64 [R, N] unless said.

    ids, position: token and place of each cell.
    rank, group, limit, doc: visibility; group is CLEAN (-1) for clean cells.
    write: cache slot that a clean cell's keys and values go to, NOWHERE (-1) for none; None writes
    nothing. A slot in use is overwritten, and its old content is not seen in this pass.
    query_mask: bool [R, N], the cells that need an output; None queries all. The head runs on those
    alone.
    time: float [R, N] in [0, 1], for time-conditioned models.
    soft: token mixtures fed instead of ids.
    num_queries: only the first `num_queries` cells need an output (the rest give keys and values);
    a static promise that query_mask keeps.
    full_attention: a promise that every cell sees every cached cell and every cell of this pass, so
    no mask is needed.
    append_only: a promise about every row of real cells (document not NOWHERE). Clean cells are
    new, go in order behind the row's cached cells, and see those and each other by rank. Noisy
    cells see their own group and all cached and clean cells of their row.
    outputs: of {"logits", "hidden", "attention", "logit_bounds"}."""

    ids: Tensor
    position: Tensor
    rank: Tensor
    group: Tensor
    limit: Tensor
    doc: Tensor
    write: Tensor | None = None
    query_mask: Tensor | None = None
    time: Tensor | None = None
    soft: Soft | None = None
    num_queries: int | None = None
    full_attention: bool = False
    append_only: bool = False
    outputs: frozenset[str] = frozenset({"logits"})

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, cells)."""
        return self.ids.shape[0], self.ids.shape[1]


class Head(Protocol):
    """Compute logits from states, token by token."""

    def exact(self, hidden: Tensor, cell: Tensor, token: Tensor) -> Tensor:
        """Return the logits of pairs of a state of [M, d] and a token, int64 [K] each -> [K]."""
        ...

    def log_probs(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Return the log-probability of one token each, the mask forbidden, nats: [K, d], int64 [K]
        -> float32 [K]."""
        ...


@dataclass(frozen=True)
class LogitBounds:
    """Bound the logits of M cells from above, for draws that need few of them exactly.

    upper: [M, V], no logit is greater; -inf forbids a token.
    hidden: [M, d], the state before the head.
    head: gives exact logits.
    temperature: [M], all above 0, or None: the bounds are divided by it already, exact logits are
    divided by it here."""

    upper: Tensor
    hidden: Tensor
    head: Head
    temperature: Tensor | None = None

    def exact(self, cell: Tensor, token: Tensor) -> Tensor:
        """Return the logits of pairs of cell and token, int64 [K] each -> [K]."""
        logits = self.head.exact(self.hidden, cell, token)
        logits = logits if self.temperature is None else logits / self.temperature[cell]
        return logits.masked_fill(self.upper[cell, token] == float("-inf"), float("-inf"))

    def select(self, cells: Tensor) -> LogitBounds:
        """Return the bounds of the cells marked in `cells`, bool [M]."""
        temperature = None if self.temperature is None else self.temperature[cells]
        return LogitBounds(self.upper[cells], self.hidden[cells], self.head, temperature)


@public_record
@dataclass(frozen=True)
class Out:
    """Hold what a forward pass returns; None where it was not requested.

    logits: [M, V] for the M cells of `Step.query_mask` in row-major order, or [R, N, V] (N =
    `num_queries` if given) when `query_mask` is None. Raw: the mask token is not yet forbidden. For
    "log_score" models: log-scores.
    hidden: the state before the head, same leading shape as logits.
    attention: [R, N, N], mean over layers and heads of the attention among the cells of this pass.
    logit_bounds: upper bounds of the logits."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None
    logit_bounds: LogitBounds | None = None


@runtime_checkable
class Cache(Protocol):
    """Hold keys and values of committed clean cells; owned by the caller, changed only where a step
    says `write`.

    slots: a `core.cache_slots.CacheSlots`, which places the cells (rank, doc, position of each
    slot)."""

    slots: Any

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Denoiser(Protocol):
    """Predict clean tokens. `step` is the only way to run the model."""

    @property
    def spec(self) -> ModelSpec: ...

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Return an empty cache of `capacity` committed cells a row."""
        ...

    def step(self, step: Step, cache: Any = None) -> Out:
        """Run one forward pass.

        cache: what this model's `new_cache` returned (each model has a class of its own), or None.
        """
        ...


@dataclass(frozen=True)
class NoisedBatch:
    """Hold clean tokens, their noised copy, and what each prediction counts for. [R, L] throughout.

    clean, noisy: int64 ids.
    masked: bool, cells that are noised and scored.
    time: float32, time of each cell's block.
    weight: float32, the factor on -log p (1/p for the bound with linear noise); 0 where not masked.
    scored: bool, cells that the likelihood counts (not padding, not given first tokens): the loss's
    denominator.
    layout: visibility of clean and noisy copies."""

    clean: Tensor
    noisy: Tensor
    masked: Tensor
    time: Tensor
    weight: Tensor
    scored: Tensor
    layout: Layout

    def rows(self, index: slice) -> NoisedBatch:
        """Return the batch of some of the rows."""
        shared = self.layout.rank.shape[0] == 1
        layout = self.layout if shared else self.layout.map(lambda x: x[index])
        tensors = {
            n: getattr(self, n)[index]
            for n in ("clean", "noisy", "masked", "time", "weight", "scored")
        }
        return NoisedBatch(**tensors, layout=layout)


@public_record
@dataclass(frozen=True)
class Canvas:
    """Hold the block being written in each row. [R, n]; rows whose block is shorter than n pad with
    doc = NOWHERE.

    ids: current tokens.
    masked: bool, cells still to be filled. Always ask this, never `ids == mask_id`.
    layout: positions and visibility of the cells.
    previous: int64 [R], the committed token just before the block (needed by shifted and
    autoregressive models), or NOWHERE.
    time: float [R, n] in [0, 1], or None.
    soft: token mixtures fed instead of ids, or None."""

    ids: Tensor
    masked: Tensor
    layout: Layout
    previous: Tensor | None = None
    time: Tensor | None = None
    soft: Soft | None = None

    def with_(self, **changes: Any) -> Canvas:
        return replace(self, **changes)


@public_record
@dataclass(frozen=True)
class Commit:
    """Hold what a decoder decided for the active blocks. Masks bool [R, n], ids int64 [R, n].

    cells: cells to fill now with `ids`.
    reopen: filled cells to mask again.
    overwrite: filled cells to replace by `ids`.
    soft: mixture to feed for the filled cells in the next forward pass.
    end_block: bool [R], close the block after its filled prefix.
    hold: bool [R], keep the block open for another decision although it is full.
    extra: tensors [R, n, ...] that the decoder gets back at its next decision in this block (zeros
    at a block's first).
    log_prob: float [R, n], the model's own log-probability of what is written, where it does not
    come from the predictions for the canvas itself."""

    cells: Tensor
    ids: Tensor
    reopen: Tensor | None = None
    overwrite: Tensor | None = None
    soft: Soft | None = None
    end_block: Tensor | None = None
    hold: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    log_prob: Tensor | None = None
