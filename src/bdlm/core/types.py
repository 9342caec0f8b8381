"""The records that every layer speaks: one call into a model (`Step` -> `Out`), what a model is
(`ModelSpec`), a noised batch.

Shapes: R rows, N cells of one call (not the sequence length), L cells of a window, V vocabulary, M
wanted cells. A *cell* is one place for a token. A *clean* cell holds a known token; a *noisy* cell
belongs to a block being denoised (its token may be the mask, or already revealed). This module
knows nothing about transformers, text or sampling."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from bdlm.core.errors import public_record
from bdlm.core.validation import validate_fields

CLEAN = -1  # the group of every clean cell
# the document of padding: sees and is seen by padding only; also "not written" in Step.write
NOWHERE = -1


@public_record
@dataclass(frozen=True)
class ModelSpec:
    """The conventions of a model, so that nothing about it is guessed.

    noise: "mask" (absorbing), "uniform" (random tokens), or "none" (autoregressive: predicts from
    clean cells alone).
    prediction: "tokens" = logits of the clean token; "log_score" = log-scores as SEDD.
    shift: the raw logits of cell i predict cell i+1 (as in adapted autoregressive models and all
    "none" models).
    context: clean cells see their whole block ("block") or only what is at or before them
    ("causal").
    streams: 2 = clean context beside the noisy cells; 1 = noisy cells only (MDLM, SEDD: one block,
    no context).
    first_token: id that opens every text (BOS), or None. stop_token: id that ends a text, or None.
    other_stop_tokens: further ids that end a text. unused_ids: rows of a padded vocabulary that
        stand for no token; they count in a likelihood's normaliser and are never written.
    supports: extras that `step` honours, of {"cache", "attention", "hidden", "soft", "overwrite",
    "layer_reuse",
        "ragged_batching", "logit_bounds"} (packed: rows at different phases cost no padding where a
        step promises `appends`; rough: `Out.logit_bounds`).
    """

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

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def never_written(self) -> frozenset[int]:
        """Ids that no text may contain: the mask token, if there is one, and unused ids."""
        return self.unused_ids | ({self.mask_id} if self.mask_id >= 0 else frozenset())


@public_record
@dataclass(frozen=True)
class Layout:
    """Where each cell of a window stands: a block map written out. All fields int64 [R, L] (R may
    be 1: the same for all rows).

    position: place in the text, for rotary embeddings. doc: document; NOWHERE (-1) for padding.
    block: which cells share one time (unique within the row). rank, group, limit: who may see whom
    (`core.visibility`)."""

    position: Tensor
    block: Tensor
    rank: Tensor
    group: Tensor
    limit: Tensor
    doc: Tensor

    def expand(self, rows: int) -> Layout:
        """The same layout with a leading size of `rows`; itself if it has that size."""
        if self.position.shape[0] == rows:
            return self
        return Layout(*(getattr(self, name).expand(rows, -1) for name in self.__dataclass_fields__))

    def to(self, device: Any) -> Layout:
        return Layout(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Soft:
    """A mixture of tokens fed in place of one: K candidates a cell. ids int64 [R, N, K]; weight
    float [R, N, K], summing to 1.

    keep_norm: rescale the mixed embedding to the weighted mean of the candidates' norms (DMax).
    """

    ids: Tensor
    weight: Tensor
    keep_norm: bool = False


@public_record
@dataclass(frozen=True)
class Step:
    """One call into a model: cells, and who may see whom. Everything int64 [R, N] unless said.

    ids, position: token and place of each cell. rank, group, limit, doc: visibility; group is CLEAN
    (-1) for clean cells.
    write: cache slot that a clean cell's keys and values go to, NOWHERE (-1) for none; None writes
    nothing. A slot in use is
        overwritten, and its old content is not seen in this call.
    at: bool [R, N], the cells whose logits are wanted; None wants all. The head runs on those
    alone.
    time: float [R, N] in [0, 1], for time-conditioned models. soft: token mixtures fed instead of
    ids.
    leading: only the first `leading` cells need an output (the rest give keys and values); a static
    promise that at agrees with.
    full: a promise that every cell sees every cached cell and every cell of this call, so no mask
    is needed.
    appends: a promise about every row of real cells (document not NOWHERE): clean ones are new and
    go, in order, behind the row's
        cached cells, and see those and each other by rank; noisy ones see their own group and all
        cached and clean cells of their row.
    want: of {"logits", "hidden", "attention", "logit_bounds"}.
    """

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
        """(rows, cells)."""
        return self.ids.shape[0], self.ids.shape[1]


class Head(Protocol):
    """What turns states into logits, token by token."""

    def exact(self, hidden: Tensor, cell: Tensor, token: Tensor) -> Tensor:
        """Logits of pairs of a state of [M, d] and a token, int64 [K] each -> [K]."""
        ...

    def log_probs(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Log-probability of one token each, the mask forbidden, nats: [K, d], int64 [K] -> float32
        [K]."""
        ...


@dataclass(frozen=True)
class LogitBounds:
    """Logits of M cells known up to a bound, for draws that need few of them exactly.

    upper: [M, V], no logit is greater; -inf forbids a token. hidden: [M, d], the state before the
    head. head: gives exact ones.
    temperature: [M], all above 0, what the logits that are bounded and given are divided by, or
    None."""

    upper: Tensor
    hidden: Tensor
    head: Head
    temperature: Tensor | None = None

    def exact(self, cell: Tensor, token: Tensor) -> Tensor:
        """The logits of pairs of cell and token, int64 [K] each -> [K]."""
        logits = self.head.exact(self.hidden, cell, token)
        logits = logits if self.temperature is None else logits / self.temperature[cell]
        return logits.masked_fill(self.upper[cell, token] == float("-inf"), float("-inf"))

    def select(self, cells: Tensor) -> LogitBounds:
        """The same of some cells, bool [M]."""
        temperature = None if self.temperature is None else self.temperature[cells]
        return LogitBounds(self.upper[cells], self.hidden[cells], self.head, temperature)


@public_record
@dataclass(frozen=True)
class Out:
    """What a call returns.

    logits: [M, V] for the M cells of `Step.at` in row-major order, or [R, N, V] (N = `leading` if
    given) when `at` is None.
        Raw: the mask token is not yet forbidden. For "log_score" models: log-scores.
    hidden: the state before the head, same leading shape as logits. attention: [R, N, N], mean over
    layers and heads of the
        attention among the cells of this call. rough: bounds of the logits. None where not wanted.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None
    logit_bounds: LogitBounds | None = None


@runtime_checkable
class Cache(Protocol):
    """Keys and values of committed clean cells, owned by the caller, changed only where a step says
    `write`.

    Slots are placed by `core.cache_slots.Slots`, which a cache carries as `slots` (rank, doc,
    position of each slot)."""

    slots: Any

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Denoiser(Protocol):
    """Whatever predicts clean tokens. `step` is the only call into a model."""

    @property
    def spec(self) -> ModelSpec: ...

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache of `capacity` committed cells a row."""
        ...

    def step(self, step: Step, cache: Any = None) -> Out:
        """cache: what this model's `new_cache` returned (each model has a class of its own), or
        None."""
        ...


@dataclass(frozen=True)
class NoisedBatch:
    """Clean tokens, their noised copy, and what each prediction counts for. [R, L] throughout.

    clean, noisy: int64 ids. masked: bool, cells that are noised and scored. time: float32, time of
    each cell's block.
    weight: float32, the factor on -log p (1/p for the bound with linear noise); 0 where not masked.
    scored: bool, cells that the likelihood counts (padding and given first tokens are out): the
    loss's denominator.
    layout: visibility of clean and noisy copies."""

    clean: Tensor
    noisy: Tensor
    masked: Tensor
    time: Tensor
    weight: Tensor
    scored: Tensor
    layout: Layout

    def rows(self, index: slice) -> NoisedBatch:
        """A subset of the rows."""
        layout = (
            self.layout
            if self.layout.rank.shape[0] == 1
            else Layout(
                *(getattr(self.layout, name)[index] for name in self.layout.__dataclass_fields__)
            )
        )
        tensors = {
            n: getattr(self, n)[index]
            for n in ("clean", "noisy", "masked", "time", "weight", "scored")
        }
        return NoisedBatch(**tensors, layout=layout)


@public_record
@dataclass(frozen=True)
class Canvas:
    """The block being written in each row. [R, n]; rows whose block is shorter than n pad with doc
    = NOWHERE.

    ids: current tokens. masked: bool, cells still to be filled: the only truth about that (never
    `ids == mask_id`).
    layout: where the cells stand. previous: int64 [R], the committed token just before the block
    (needed by shifted and autoregressive models), or NOWHERE."""

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
    """What a decoder decided for the active blocks. Masks bool [R, n], ids int64 [R, n].

    cells: cells to fill now with `ids`. reopen: filled cells to mask again. overwrite: filled cells
    to replace by `ids`.
    soft: mixture to feed for the filled cells in the next call. end_block: bool [R], close the
    block after its filled prefix.
    hold: bool [R], keep the block open for another decision although it is full. extra: tensors [R,
    n, ...] that the decoder wants to see again at its next decision in this block (zeros at a
    block's first). log_prob: float [R, n], the model's own log-probability of what is written,
    where it does not come from the predictions for the canvas itself."""

    cells: Tensor
    ids: Tensor
    reopen: Tensor | None = None
    overwrite: Tensor | None = None
    soft: Soft | None = None
    end_block: Tensor | None = None
    hold: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    log_prob: Tensor | None = None
