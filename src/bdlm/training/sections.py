"""Sections of a training config: one frozen dataclass each, with the range of every field.

In: values from YAML, Python or the command line. Out: a section, or a `ConfigError` in one line
with the field, the value and a suggested fix. Ranges stand in the annotations
(`bdlm.core.validation`); `__post_init__` adds the conditions between fields. The docstring under a
field is its line in `bdlm train --help` (`training.fields`). Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bdlm.core.errors import ConfigError, shown
from bdlm.core.validation import AtLeast, Between, Count, Positive, validate_fields

MOST_ROWS, MOST_TOKENS = 1 << 20, 1 << 24


def need(holds: bool, name: str, value: object, fix: str) -> None:
    """Raise ConfigError where a condition between fields does not hold."""
    if not holds:
        raise ConfigError(f"{name} is {shown(value)}; {fix}")


# -- kinds of fields -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """A rule of `bdlm.core.validation` that is not a range."""

    test: Callable[[Any], bool]
    suggestion: str

    def holds(self, value: Any) -> bool:
        return self.test(value)


def _printable(name: str) -> bool:
    return all(sign >= " " for sign in name)


def _short_parts(name: str) -> bool:
    return all(len(part.encode("utf-8", "surrogatepass")) <= 255 for part in name.split("/"))


def _share_or_number(value: float) -> bool:
    return 0 <= value < 1 or (1 <= value < math.inf and value == int(value))


def _zero_or_several(value: int) -> bool:
    return value == 0 or value >= 2


PathName = Annotated[
    str,
    Condition(_printable, "use a name without control characters"),
    Condition(_short_parts, "use names of at most 255 bytes between slashes"),
]
SourceName = Annotated[
    PathName,
    Condition(
        lambda name: bool(name.strip()),
        "name files, folders or datasets, none of them by an empty text",
    ),
]
BelowOne = Annotated[float, Between(0, 1, "[)")]
CountOrNull = Annotated[int, AtLeast(1, "use 1 or more, or null")] | None
MinutesOrNull = (
    Annotated[float, Between(0, math.inf, "()", "use a positive number, or null")] | None
)
ShareOrNumber = Annotated[
    float,
    Condition(
        _share_or_number,
        "use a share of the records from 0 to below 1, or a whole number of records",
    ),
]
VocabSize = Annotated[
    int,
    Between(
        258,
        MOST_TOKENS,
        said=f"use 258 (256 bytes, the end token and the mask) to {MOST_TOKENS:,}",
    ),
]


# -- sections --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSection:
    """The transformer. Sizes as in the paper's tables; `block_size` is the one the finished model
    is saved with."""

    algo: Literal["bd3lm", "mdlm", "sedd", "ar"] = "bd3lm"
    """Kind of model: bd3lm (blocks), mdlm (one block), sedd (score entropy, one
    block) or ar; fixed for a run."""
    hidden_dim: Count = 256
    """Width of the transformer, 1 or more, a multiple of n_heads; parameters grow with its
    square."""
    n_blocks: Count = 8
    """Transformer layers, 1 or more; parameters and time of a step grow in proportion."""
    n_heads: Count = 8
    """Attention heads, 1 or more; must divide hidden_dim."""
    cond_dim: Count = 64
    """Width of the conditioning vector that scales and shifts each layer, 1 or more;
    larger adds parameters."""
    length: Annotated[int, Between(2, MOST_TOKENS, said=f"use 2 to {MOST_TOKENS:,} tokens")] = 256
    """Tokens of a training window, 2 or more; memory grows in proportion, attention faster."""
    block_size: Count = 8
    """Tokens of a block in the finished model, 1 to length; smaller is likelier text, larger
    is more parallel."""
    context: Literal["block", "causal"] = "block"
    """What a clean token sees: its whole block and all earlier ones (block), or earlier
    tokens only (causal)."""
    dropout: BelowOne = 0.0
    """Share of activations dropped while training, in [0, 1); more helps where the data is
    seen many times."""
    init_from: PathName | None = None
    """Model folder or name whose weights training starts from, trained at any block size;
    null starts fresh."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the trunk with torch.compile: faster, but rounding may differ from eager mode."""

    def __post_init__(self) -> None:
        validate_fields(self, "model.")
        need(
            self.block_size <= self.length,
            "model.block_size",
            self.block_size,
            f"use at most model.length ({self.length})",
        )


@dataclass(frozen=True)
class DataSection:
    """Where text comes from and how it becomes windows. Names: files, folders, JSONL, or
    hf:name[:config][:split][:field]."""

    train: tuple[SourceName, ...] = ()
    """Training text: files, folders, JSONL, or hf:name[:config][:split][:field]; a name or a
    list of names."""
    valid: tuple[SourceName, ...] = ()
    """Held-out text, named as in train; empty holds out the last held_out share of the
    training windows."""
    held_out: Annotated[float, Between(0, 1, "()", "use a share between 0 and 1")] = 0.05
    """Share of the training windows that is held out where valid is empty, between 0 and 1."""
    field: str = "text"
    """Field of records, or column of a CSV or TSV file (name or number; 2+3 joins two), that
    holds the text."""
    split: str = "file"
    """How a text file falls into documents: file (not at all), line, paragraph, article (of
    WikiText), or any separator."""
    limit: CountOrNull = None
    """Documents to train on, from the first, 1 or more; null takes all."""
    tokenizer: PathName = "bytes"
    """bytes, bpe (trained on the training text), a tokenizer's folder, or a Hugging Face
    name; fixed for a run."""
    vocab_size: VocabSize = 1024
    """Token ids of a trained BPE, end and mask token included, 258 to 16,777,216; fixed for
    a run."""
    detokenizer: str = "none"
    """Corpus whose tokenisation is undone first, as the paper does (ptb, lm1b, lambada,
    ...), or none."""
    document_eos: bool = True
    """Append the end token to each document, so that the model learns where texts end."""
    document_bos: bool = False
    """Open each document with the opening token."""
    window_special: bool = False
    """Make each window opening token, text, end token, as published training does."""
    document_mask: bool = False
    """Keep documents of one window from seeing each other."""
    cache: PathName | None = None
    """Folder for tokenised text, reused by later runs; null keeps it in memory."""
    bad_records: ShareOrNumber = 0.01
    """Records that may be null, broken or empty and are skipped: below 1 a share of all records,
    from 1 on their number; beyond it the run is refused."""

    def __post_init__(self) -> None:
        validate_fields(self, "data.")


@dataclass(frozen=True)
class NoiseSection:
    """How blocks are noised. `search` looks at validation for the interval of mask rates with the
    least loss variance."""

    schedule: str = "linear"
    """Noise schedule of distribution time over the whole interval (linear, square, cosine, ...);
    other distributions do not use it."""
    distribution: Literal["count", "time", "complementary", "importance"] = "count"
    """How masks are drawn: count (how many cells of a block), time (each cell on its own),
    complementary (a set and its complement) or importance (counts drawn where past losses
    were large, weighted to stay unbiased)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest mask rate that training draws from, 0 <= low <= high <= 1; narrower
    lowers the variance."""
    mask_single_token_blocks: bool = True
    """Mask every token of blocks of one token, and of AR; false draws those masks from the mask
    distribution like all others (the paper's Table 1)."""
    resample: bool = False
    """Redraw blocks whose masked share falls outside the interval, as published training does."""
    search: bool = False
    """Look at each validation for the interval with the least loss variance, and train on it."""
    search_batches: Count = 100
    """Batches that a search measures each interval on, 1 or more; time grows in proportion."""
    refresh_steps: Count = 100
    """Steps after which distribution importance is fitted again, 1 or more."""
    floor: Annotated[float, Between(0, 1, "(]", "use a share above 0, at most 1")] = 0.1
    """Share of the uniform distribution that is mixed into distribution importance, above 0, at
    most 1."""
    gradient_batches: Annotated[int, Condition(_zero_or_several, "use 0, or 2 or more")] = 0
    """Batches on which a search also measures the gradient variance (equation 10), 2 or more; 0
    leaves it out."""

    def __post_init__(self) -> None:
        validate_fields(self, "noise.")
        low, high = self.interval
        need(
            0 <= low <= high <= 1 and high > 0,
            "noise.interval",
            self.interval,
            "use 0 <= low <= high <= 1",
        )
        every_rate = self.interval == (0.0, 1.0) and not self.search
        need(
            every_rate or self.distribution in ("count", "time"),
            "noise.distribution",
            self.distribution,
            "it covers every mask rate: leave noise.interval and noise.search out, or use count or"
            " time",
        )


@dataclass(frozen=True)
class OptimSection:
    """The optimiser, its learning rate over the run, and the moving average of the weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimiser: adamw, or muon for the layers' matrices with AdamW for the rest; fixed for a
    run."""
    lr: Positive = 3e-4
    """Peak learning rate, above 0; lower it where the loss is not finite."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and square, two values in [0, 1)."""
    eps: Positive = 1e-8
    """AdamW's term that keeps the division finite, above 0."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """Decay of the matrices per unit of learning rate, 0 or more; vectors are not decayed."""
    clip: Annotated[float, AtLeast(0, "use 0 (no clipping) or more")] = 1.0
    """Largest gradient norm, above which the gradient is scaled down; 0 does not clip."""
    warmup_steps: Annotated[int, AtLeast(0)] = 100
    """Steps over which the learning rate rises from 0 to lr, 0 or more; longer is safer."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after decay_from: constant, linear or cosine."""
    decay_from: Annotated[float, Between(0, 1, "[)", "use a share in [0, 1)")] = 0.0
    """Share of the budget after which decay begins, in [0, 1)."""
    decay_to: Annotated[float, Between(0, 1, said="use a share in [0, 1]")] = 0.1
    """Share of lr that is left at the end of the budget, in [0, 1]."""
    batch_size: Annotated[int, Between(1, MOST_ROWS, said=f"use 1 to {MOST_ROWS:,}")] = 32
    """Windows of one optimiser step over all processes, 1 to 1,048,576."""
    accumulation: Count = 1
    """Pieces in which each process computes its share of a step, a divisor of batch_size;
    more use less memory."""
    ema: BelowOne = 0.9999
    """Decay of the moving average of the weights that is validated and exported, in [0, 1);
    0 keeps none."""

    def __post_init__(self) -> None:
        validate_fields(self, "optim.")
        need(
            self.batch_size % self.accumulation == 0,
            "optim.accumulation",
            self.accumulation,
            f"use a divisor of optim.batch_size ({self.batch_size})",
        )


@dataclass(frozen=True)
class LimitsSection:
    """When a run ends: at whichever comes first. Decay and block-size phases are shares of it."""

    minutes: Positive | None = None
    """Minutes of training, time before a resume included, above 0; null sets no limit."""
    tokens: Annotated[int, AtLeast(1, "use a positive number")] | None = None
    """Tokens of training text over all processes, above 0; null sets no limit."""
    steps: Annotated[int, AtLeast(1, "use a positive number")] | None = None
    """Optimiser steps, above 0; null sets no limit."""

    def __post_init__(self) -> None:
        validate_fields(self, "limits.")


@dataclass(frozen=True)
class ValidSection:
    """Validation with the averaged weights: the bound with its standard error, sample texts, and
    the schedule search."""

    every_steps: CountOrNull = 500
    """Steps between validations, 1 or more; null goes by every_minutes alone."""
    every_minutes: MinutesOrNull = None
    """Minutes between validations, above 0; null goes by every_steps alone."""
    rows: Count = 128
    """Windows scored each time, 1 or more, all that there are if fewer; more lower the
    standard error."""
    batch_size: Count = 32
    """Windows of one forward pass while validating, 1 or more; memory grows in proportion."""
    block_sizes: tuple[Count, ...] = ()
    """Block sizes scored each time, 1 to model.length each; empty scores the current one."""
    replicates: Count = 1
    """Independent draws of the noise for each window, 1 or more; more lower the standard error."""

    def __post_init__(self) -> None:
        validate_fields(self, "valid.")


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints: how often, and how many are kept."""

    every_steps: CountOrNull = None
    """Steps between checkpoints, 1 or more; null goes by every_minutes alone."""
    every_minutes: MinutesOrNull = 10.0
    """Minutes between checkpoints, above 0; null goes by every_steps alone."""
    keep: Count = 2
    """Whole checkpoints that are kept, 1 or more; while training, also the last one that a
    sound step followed."""

    def __post_init__(self) -> None:
        validate_fields(self, "save.")


@dataclass(frozen=True)
class LogSection:
    """What is reported while training."""

    every_steps: Count = 10
    """Steps between records of the metrics, 1 or more."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers to log to, by the names that accelerate knows (tensorboard, wandb, ...);
    empty for none."""
    progress: bool = True
    """Show progress: a bar where the output is a terminal, else a line at each record."""

    def __post_init__(self) -> None:
        validate_fields(self, "log.")
