"""What a training run is told: frozen dataclasses, YAML recipes, dotted overrides, and messages
that name the field.

In: a recipe (a YAML file or the name of one in `bdlm/recipes`) and overrides such as
`optim.lr=3e-4`. Out: a `TrainConfig`. Every field is checked when it is made; an unknown key is an
error with the nearest name. Loads no torch, so that the command line can show its help at once; the
docstring under a field is its sentence there (`training.fields`). Recipe files are read by
`training.recipes`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bdlm.core.errors import ConfigError, shown
from bdlm.core.validation import validate_fields, validated
from bdlm.training.reading import build
from bdlm.training.recipes import parse_yaml, read_recipe, run_folder
from bdlm.training.recipes import read_yaml as read_yaml
from bdlm.training.recipes import recipe_names as recipe_names

MOST_ROWS, MOST_TOKENS = 1 << 20, 1 << 24


def _need(holds: bool, name: str, value: object, fix: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {shown(value)}; {fix}")


def _check(section: Any, path: str = "") -> None:
    """The kinds of a section's fields, that numbers are finite and fit into 64 bits, and that paths
    can be paths."""
    validate_fields(section, path)
    for f in dataclasses.fields(section):
        _check_value(f"{path}{f.name}", getattr(section, f.name))


PATHS = (
    "out",
    "resume",
    "model.init_from",
    "data.train",
    "data.valid",
    "data.tokenizer",
    "data.cache",
)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, str) and name in PATHS:
        _need(all(c >= " " for c in value), name, value, "use a name without control characters")
        longest = max(len(part.encode("utf-8", "surrogatepass")) for part in value.split("/"))
        _need(longest <= 255, name, value, "use names of at most 255 bytes between slashes")
    elif isinstance(value, float):
        _need(math.isfinite(value), name, value, "use a finite number")
    elif isinstance(value, int):
        _need(-(2**63) <= value < 2**63, name, value, "use a number of at most 64 bits")
    elif isinstance(value, tuple):
        for item in value:
            _check_value(name, item)


@dataclass(frozen=True)
class ModelSection:
    """The transformer. Sizes as in the paper's tables; `block_size` is the one the finished model
    is saved with."""

    algo: Literal["bd3lm", "mdlm", "sedd", "ar"] = "bd3lm"
    """Kind of model: bd3lm (blocks), mdlm (one block), sedd (score entropy, one
    block) or ar; fixed for a run."""
    hidden_dim: int = 256
    """Width of the transformer, 1 or more, a multiple of n_heads; parameters grow with its
    square."""
    n_blocks: int = 8
    """Transformer layers, 1 or more; parameters and time of a step grow in proportion."""
    n_heads: int = 8
    """Attention heads, 1 or more; must divide hidden_dim."""
    cond_dim: int = 64
    """Width of the conditioning vector that scales and shifts each layer, 1 or more;
    larger adds parameters."""
    length: int = 256
    """Tokens of a training window, 2 or more; memory grows in proportion, attention faster."""
    block_size: int = 8
    """Tokens of a block in the finished model, 1 to length; smaller is likelier text, larger
    is more parallel."""
    context: Literal["block", "causal"] = "block"
    """What a clean token sees: its whole block and all earlier ones (block), or earlier
    tokens only (causal)."""
    dropout: float = 0.0
    """Share of activations dropped while training, in [0, 1); more helps where the data is
    seen many times."""
    init_from: str | None = None
    """Model folder or name whose weights training starts from, trained at any block size;
    null starts fresh."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the trunk with torch.compile: faster, but rounding may differ from eager mode."""

    def __post_init__(self) -> None:
        _check(self, "model.")
        for name in ("hidden_dim", "n_blocks", "n_heads", "cond_dim", "block_size"):
            _need(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "use 1 or more")
        _need(
            2 <= self.length <= MOST_TOKENS,
            "model.length",
            self.length,
            f"use 2 to {MOST_TOKENS:,} tokens",
        )
        _need(0 <= self.dropout < 1, "model.dropout", self.dropout, "use a value in [0, 1)")
        _need(
            self.block_size <= self.length,
            "model.block_size",
            self.block_size,
            f"use at most model.length ({self.length})",
        )


@dataclass(frozen=True)
class DataSection:
    """Where text comes from and how it becomes windows. Names: files, folders, JSONL, or
    hf:name[:config][:split][:field]."""

    train: tuple[str, ...] = ()
    """Training text: files, folders, JSONL, or hf:name[:config][:split][:field]; a name or a
    list of names."""
    valid: tuple[str, ...] = ()
    """Held-out text, named as in train; empty holds out the last held_out share of the
    training windows."""
    held_out: float = 0.05
    """Share of the training windows that is held out where valid is empty, between 0 and 1."""
    field: str = "text"
    """Field of records, or column of a CSV or TSV file (name or number; 2+3 joins two), that
    holds the text."""
    split: str = "file"
    """How a text file falls into documents: file (not at all), line, paragraph, article (of
    WikiText), or any separator."""
    limit: int | None = None
    """Documents to train on, from the first, 1 or more; null takes all."""
    tokenizer: str = "bytes"
    """bytes, bpe (trained on the training text), a tokenizer's folder, or a Hugging Face
    name; fixed for a run."""
    vocab_size: int = 1024
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
    cache: str | None = None
    """Folder for tokenised text, reused by later runs; null keeps it in memory."""
    bad_records: float = 0.01
    """Records that may be null, broken or empty and are skipped: below 1 a share of all records,
    from 1 on their number; beyond it the run is refused."""

    def __post_init__(self) -> None:
        _check(self, "data.")
        _need(0 < self.held_out < 1, "data.held_out", self.held_out, "use a share between 0 and 1")
        _need(
            258 <= self.vocab_size <= MOST_TOKENS,
            "data.vocab_size",
            self.vocab_size,
            f"use 258 (256 bytes, the end token and the mask) to {MOST_TOKENS:,}",
        )
        _need(
            self.limit is None or self.limit >= 1,
            "data.limit",
            self.limit,
            "use 1 or more, or null",
        )
        bad = self.bad_records
        whole = 0 <= bad < math.inf and (bad < 1 or bad == int(bad))
        _need(
            whole,
            "data.bad_records",
            bad,
            "use a share of the records from 0 to below 1, or a whole number of records",
        )
        for part in ("train", "valid"):
            names = getattr(self, part)
            _need(
                all(map(str.strip, names)),
                f"data.{part}",
                names,
                "name files, folders or datasets, none of them by an empty text",
            )


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
    single: Literal["masked", "distribution"] = "masked"
    """Blocks of one cell, and AR: masked masks all of them, distribution as the distribution has it
    (the paper's Table 1)."""
    resample: bool = False
    """Redraw blocks whose masked share falls outside the interval, as published training does."""
    search: bool = False
    """Look at each validation for the interval with the least loss variance, and train on it."""
    search_batches: int = 100
    """Batches that a search measures each interval on, 1 or more; time grows in proportion."""
    refresh_steps: int = 100
    """Steps after which distribution importance is fitted anew, 1 or more."""
    floor: float = 0.1
    """Share of the uniform distribution that is mixed into distribution importance, above 0, at
    most 1."""
    gradient_batches: int = 0
    """Batches on which a search also measures the gradient variance (equation 10), 2 or more; 0
    leaves it out."""

    def __post_init__(self) -> None:
        _check(self, "noise.")
        low, high = self.interval
        _need(
            0 <= low <= high <= 1 and high > 0,
            "noise.interval",
            self.interval,
            "use 0 <= low <= high <= 1",
        )
        whole = self.distribution not in ("complementary", "importance") or (
            self.interval == (0.0, 1.0) and not self.search
        )
        _need(
            whole,
            "noise.distribution",
            self.distribution,
            "it covers every mask rate: leave noise.interval and noise.search out, or use count or"
            " time",
        )
        _need(self.refresh_steps >= 1, "noise.refresh_steps", self.refresh_steps, "use 1 or more")
        _need(0 < self.floor <= 1, "noise.floor", self.floor, "use a share above 0, at most 1")
        _need(
            self.search_batches >= 1, "noise.search_batches", self.search_batches, "use 1 or more"
        )
        _need(
            self.gradient_batches == 0 or self.gradient_batches >= 2,
            "noise.gradient_batches",
            self.gradient_batches,
            "use 0, or 2 or more",
        )


@dataclass(frozen=True)
class OptimSection:
    """The optimiser, its learning rate over the run, and the moving average of the weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimiser: adamw, or muon for the layers' matrices beside AdamW; fixed for a run."""
    lr: float = 3e-4
    """Peak learning rate, above 0; lower it where the loss is not finite."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and square, two values in [0, 1)."""
    eps: float = 1e-8
    """AdamW's term that keeps the division finite, above 0."""
    weight_decay: float = 0.0
    """Decay of the matrices per unit of learning rate, 0 or more; vectors are not decayed."""
    clip: float = 1.0
    """Largest gradient norm, above which the gradient is scaled down; 0 does not clip."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to lr, 0 or more; longer is safer."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after decay_from: constant, linear or cosine."""
    decay_from: float = 0.0
    """Share of the budget after which decay begins, in [0, 1)."""
    decay_to: float = 0.1
    """Share of lr that is left at the end of the budget, in [0, 1]."""
    batch_size: int = 32
    """Windows of one optimiser step over all processes, 1 to 1,048,576."""
    accumulation: int = 1
    """Pieces in which each process computes its share of a step, a divisor of batch_size;
    more use less memory."""
    ema: float = 0.9999
    """Decay of the moving average of the weights that is validated and exported, in [0, 1);
    0 keeps none."""

    def __post_init__(self) -> None:
        _check(self, "optim.")
        _need(self.lr > 0, "optim.lr", self.lr, "use a positive number")
        _need(
            all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            self.betas,
            "use two values in [0, 1)",
        )
        _need(self.eps > 0, "optim.eps", self.eps, "use a positive number")
        _need(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "use 0 or more")
        _need(self.clip >= 0, "optim.clip", self.clip, "use 0 (no clipping) or more")
        _need(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "use 0 or more")
        _need(
            0 <= self.decay_from < 1, "optim.decay_from", self.decay_from, "use a share in [0, 1)"
        )
        _need(0 <= self.decay_to <= 1, "optim.decay_to", self.decay_to, "use a share in [0, 1]")
        _need(
            1 <= self.batch_size <= MOST_ROWS,
            "optim.batch_size",
            self.batch_size,
            f"use 1 to {MOST_ROWS:,}",
        )
        _need(self.accumulation >= 1, "optim.accumulation", self.accumulation, "use 1 or more")
        _need(
            self.batch_size % self.accumulation == 0,
            "optim.accumulation",
            self.accumulation,
            f"use a divisor of optim.batch_size ({self.batch_size})",
        )
        _need(0 <= self.ema < 1, "optim.ema", self.ema, "use a value in [0, 1)")


@dataclass(frozen=True)
class LimitsSection:
    """When a run ends: at whichever comes first. Decay and block-size phases are shares of it."""

    minutes: float | None = None
    """Minutes of training, time before a resume included, above 0; null sets no limit."""
    tokens: int | None = None
    """Tokens of training text over all processes, above 0; null sets no limit."""
    steps: int | None = None
    """Optimiser steps, above 0; null sets no limit."""

    def __post_init__(self) -> None:
        _check(self, "limits.")
        for name in ("minutes", "tokens", "steps"):
            value = getattr(self, name)
            _need(value is None or value > 0, f"limits.{name}", value, "use a positive number")


@dataclass(frozen=True)
class ValidSection:
    """Validation with the averaged weights: the bound with its standard error, sample texts, and
    the schedule search."""

    every_steps: int | None = 500
    """Steps between validations, 1 or more; null goes by every_minutes alone."""
    every_minutes: float | None = None
    """Minutes between validations, above 0; null goes by every_steps alone."""
    rows: int = 128
    """Windows scored each time, 1 or more, all that there are if fewer; more lower the
    standard error."""
    batch_size: int = 32
    """Windows of one forward pass while validating, 1 or more; memory grows in proportion."""
    block_sizes: tuple[int, ...] = ()
    """Block sizes scored each time, 1 to model.length each; empty scores the current one."""
    replicates: int = 1
    """Independent draws of the noise for each window, 1 or more; more lower the standard error."""

    def __post_init__(self) -> None:
        _check(self, "valid.")
        _need(
            self.every_steps is None or self.every_steps >= 1,
            "valid.every_steps",
            self.every_steps,
            "use 1 or more, or null",
        )
        _need(
            self.every_minutes is None or self.every_minutes > 0,
            "valid.every_minutes",
            self.every_minutes,
            "use a positive number, or null",
        )
        for name in ("rows", "batch_size", "replicates"):
            _need(getattr(self, name) >= 1, f"valid.{name}", getattr(self, name), "use 1 or more")
        _need(
            all(n >= 1 for n in self.block_sizes),
            "valid.block_sizes",
            self.block_sizes,
            "use 1 or more",
        )


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints: how often, and how many are kept."""

    every_steps: int | None = None
    """Steps between checkpoints, 1 or more; null goes by every_minutes alone."""
    every_minutes: float | None = 10.0
    """Minutes between checkpoints, above 0; null goes by every_steps alone."""
    keep: int = 2
    """Whole checkpoints that are kept, 1 or more; while training, also the last one that a
    sound step followed."""

    def __post_init__(self) -> None:
        _check(self, "save.")
        _need(
            self.every_steps is None or self.every_steps >= 1,
            "save.every_steps",
            self.every_steps,
            "use 1 or more, or null",
        )
        _need(
            self.every_minutes is None or self.every_minutes > 0,
            "save.every_minutes",
            self.every_minutes,
            "use a positive number, or null",
        )
        _need(self.keep >= 1, "save.keep", self.keep, "use 1 or more")


@dataclass(frozen=True)
class LogSection:
    """What is reported while training."""

    every_steps: int = 10
    """Steps between records of the metrics, 1 or more."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers to log to, by the names that accelerate knows (tensorboard, wandb, ...);
    empty for none."""
    progress: bool = True
    """Show progress: a bar where the output is a terminal, else a line at each record."""

    def __post_init__(self) -> None:
        _check(self, "log.")
        _need(self.every_steps >= 1, "log.every_steps", self.every_steps, "use 1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """All of a run. In `block_sizes`, a size that is named twice is taken twice as often."""

    model: ModelSection = field(default_factory=ModelSection)
    """The transformer: its kind, sizes and starting weights."""
    data: DataSection = field(default_factory=DataSection)
    """Where text comes from and how it becomes windows."""
    noise: NoiseSection = field(default_factory=NoiseSection)
    """How blocks are masked while training."""
    optim: OptimSection = field(default_factory=OptimSection)
    """The optimiser, its learning rate over the run, and the averaged weights."""
    limits: LimitsSection = field(default_factory=LimitsSection)
    """When the run ends."""
    valid: ValidSection = field(default_factory=ValidSection)
    """When and on how much text the model is validated."""
    save: SaveSection = field(default_factory=SaveSection)
    """When checkpoints are written and how many are kept."""
    log: LogSection = field(default_factory=LogSection)
    """What is reported while training."""
    block_sizes: tuple[tuple[float, tuple[int, ...]], ...] = ()
    """Pairs of a share of the budget, in [0, 1) and rising from 0, and the block size or
    sizes that hold from it; each step takes one of several at random, and empty means
    model.block_size throughout."""
    out: str = "runs/model"
    """Folder of the run: config, checkpoints, metrics and the finished model; relative to
    the working directory."""
    resume: str = "auto"
    """auto goes on from the newest whole checkpoint in out, never refuses to, and a
    checkpoint's folder branches off there."""
    seed: int = 1
    """Seed of the initial weights, the order of windows and all noise, 0 to 2^63 - 1; fixed
    for a run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the passes: fp32, bf16, or auto (bf16 on accelerators that have it, fp32
    on CPU)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the accelerator that there is; cpu leaves it alone."""

    def __post_init__(self) -> None:
        _check(self)
        limits = self.limits
        _need(
            any(v is not None for v in (limits.minutes, limits.tokens, limits.steps)),
            "limits",
            None,
            "set limits.minutes, limits.tokens or limits.steps",
        )
        starts = [start for start, _ in self.block_sizes]
        _need(
            not starts or (starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1),
            "block_sizes",
            self.block_sizes,
            "give [share, size] pairs with shares from 0.0, rising, below 1",
        )
        for size in [size for _, sizes in self.block_sizes for size in sizes]:
            _need(
                1 <= size <= self.model.length,
                "block_sizes",
                size,
                f"use sizes from 1 to model.length ({self.model.length})",
            )
        if self.block_sizes:
            _need(
                self.model.block_size in self.block_sizes[-1][1],
                "block_sizes",
                self.block_sizes,
                f"end with model.block_size ({self.model.block_size})",
            )
            _need(
                self.model.algo == "bd3lm",
                "model.algo",
                self.model.algo,
                "block_sizes belongs to bd3lm; remove it",
            )
        for size in self.valid.block_sizes:
            _need(
                size <= self.model.length,
                "valid.block_sizes",
                size,
                f"use sizes up to model.length ({self.model.length})",
            )
        _need(
            bool(self.data.train),
            "data.train",
            self.data.train,
            "name at least one text file, folder or dataset",
        )
        _need(bool(self.out), "out", self.out, "name a folder for the run")
        _need(0 <= self.seed < 2**63, "seed", self.seed, "use 0 to 2^63 - 1")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values (tuples as lists), for JSON and YAML."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; missing keys take their defaults. Raises ConfigError with the
        field's path."""
        return build(cls, values, "")


@validated()
def load_config(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A config from a recipe and overrides.

    recipe: a YAML or JSON file, or the name of a recipe that comes with the package
    (`recipe_names()`), or None for the defaults.
    The config.json of a run folder means that folder, wherever it has been moved or copied to:
    `out` is the folder, and `resume` is
    auto. overrides: `path.to.field=value` with YAML values, e.g. `optim.lr=3e-4`,
    `data.train=[a.txt, b.txt]`; later ones win.
    Raises ConfigError: no such recipe, unknown key (with the nearest name), a value out of range.
    """
    values = {} if recipe is None else read_recipe(recipe)
    folder = None if recipe is None else run_folder(recipe)
    if folder is not None:
        values |= {"out": str(folder), "resume": "auto"}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(
                f"override {shown(override)} has no '='; write it as field=value, for example"
                " optim.lr=3e-4"
            )
        _set(values, path.strip(), parse_yaml(text, f"override {shown(override)}"))
    return TrainConfig.from_dict(values)


# -- from plain values to dataclasses --------------------------------------------------------------


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    here = values
    for parent in parents:
        inner = here.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{shown(path)} does not name a field: {shown(parent)} has no fields of its own"
            )
        here = inner
    here[last] = value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
