"""What a training run is told: frozen dataclasses, YAML recipes, dotted overrides, and messages that name the field.

In: a recipe (a YAML file or the name of one in `bdlm/recipes`) and overrides such as `optim.lr=3e-4`. Out: a `TrainConfig`.
Every field is checked when it is made; an unknown key is an error with the nearest name. Loads no torch, so that the command
line can show its help at once. Knows nothing about files other than recipes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bdlm.core.errors import ConfigError, nearest
from bdlm.core.kinds import check_fields, checked
from bdlm.training.reading import build


def _need(holds: bool, name: str, value: object, way_out: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; {way_out}")


@dataclass(frozen=True)
class ModelSection:
    """The transformer. Sizes as in the paper's tables; `block_size` is the one the finished model is saved with."""

    algo: Literal["bd3lm", "mdlm", "sedd", "ar"] = "bd3lm"
    hidden_dim: int = 256
    n_blocks: int = 8
    n_heads: int = 8
    cond_dim: int = 64
    length: int = 256  # tokens of a training window
    block_size: int = 8
    context: Literal["block", "causal"] = "block"
    dropout: float = 0.0
    init_from: str | None = None  # a model folder or name to start from, trained at any block size
    gradient_checkpointing: bool = False
    compile: bool = False  # compile the trunk: faster, but rounding may differ from eager mode

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        for name in ("hidden_dim", "n_blocks", "n_heads", "cond_dim", "block_size"):
            _need(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "use 1 or more")
        _need(self.length >= 2, "model.length", self.length, "use 2 or more tokens")
        _need(0 <= self.dropout < 1, "model.dropout", self.dropout, "use a value in [0, 1)")
        _need(self.block_size <= self.length, "model.block_size", self.block_size, f"use at most model.length ({self.length})")


@dataclass(frozen=True)
class DataSection:
    """Where text comes from and how it becomes windows. Names: files, folders, JSONL, or hf:name[:config][:split][:field]."""

    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()  # empty: the last `held_out` share of the training windows
    held_out: float = 0.05
    field: str = "text"  # what holds the text: a field of records, a column of a CSV or TSV file (name or number; 2+3 joins two)
    split: str = "file"  # how a text file falls into documents: file (not at all), line, paragraph, article (of WikiText), any separator
    limit: int | None = None  # train on the first documents only
    tokenizer: str = "bytes"  # bytes, bpe (trained on the training text), a tokenizer's folder, or a Hugging Face name
    vocab_size: int = 1024  # of a trained BPE, end and mask token included
    detokenizer: str = "none"
    document_eos: bool = True  # append the end token to each document
    document_bos: bool = False  # open each document with the opening token
    window_special: bool = False  # each window is opening token, text, end token
    document_mask: bool = False  # documents of one window do not see each other
    cache: str | None = None  # folder for tokenised text; null keeps it in memory
    bad_records: float = 0.01  # records that may be null, broken or empty, and are left out: below 1 a share, else their number

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        _need(0 < self.held_out < 1, "data.held_out", self.held_out, "use a share between 0 and 1")
        _need(self.vocab_size >= 258, "data.vocab_size", self.vocab_size, "use 258 or more (256 bytes, the end token and the mask)")
        _need(self.limit is None or self.limit >= 1, "data.limit", self.limit, "use 1 or more, or null")
        bad = self.bad_records
        whole = 0 <= bad < math.inf and (bad < 1 or bad == int(bad))
        _need(whole, "data.bad_records", bad, "use a share of the records from 0 to below 1, or a whole number of records")
        for part in ("train", "valid"):
            names = getattr(self, part)
            _need(all(map(str.strip, names)), f"data.{part}", names, "name files, folders or datasets, none of them by an empty text")


@dataclass(frozen=True)
class NoiseSection:
    """How blocks are noised. `search` looks at validation for the interval of mask rates with the least loss variance."""

    schedule: str = "linear"  # of law "time" over the whole interval; the other laws do not depend on it
    # count: how many cells of a block; time: each cell on its own; complementary: a set and its complement; importance: counts drawn where
    # the losses of past steps were large, weighted so that the loss stays unbiased
    law: Literal["count", "time", "complementary", "importance"] = "count"
    interval: tuple[float, float] = (0.0, 1.0)  # mask rates that training draws from
    single: Literal["masked", "law"] = "masked"  # blocks of one cell, and AR: all of them, or as the law has it (the paper's Table 1)
    resample: bool = False  # redraw blocks whose masked share falls outside the interval (published training)
    search: bool = False
    search_batches: int = 100
    refresh_steps: int = 100  # of importance: steps after which its law is fitted anew
    floor: float = 0.1  # of importance: share of the uniform law that is mixed in
    gradient_batches: int = 0  # also measure the gradient variance (Eq. 10) over this many batches at a search

    def __post_init__(self) -> None:
        check_fields(self, "noise.")
        low, high = self.interval
        _need(0 <= low <= high <= 1 and high > 0, "noise.interval", self.interval, "use 0 <= low <= high <= 1")
        whole = self.law not in ("complementary", "importance") or (self.interval == (0.0, 1.0) and not self.search)
        _need(whole, "noise.law", self.law, "it covers every mask rate: leave noise.interval and noise.search out, or use count or time")
        _need(self.refresh_steps >= 1, "noise.refresh_steps", self.refresh_steps, "use 1 or more")
        _need(0 < self.floor <= 1, "noise.floor", self.floor, "use a share above 0, at most 1")
        _need(self.search_batches >= 1, "noise.search_batches", self.search_batches, "use 1 or more")
        _need(
            self.gradient_batches == 0 or self.gradient_batches >= 2, "noise.gradient_batches", self.gradient_batches, "use 0, or 2 or more"
        )


@dataclass(frozen=True)
class OptimSection:
    """The optimiser, its learning rate over the run, and the moving average of the weights."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, beside AdamW (`training.muon`)
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip: float = 1.0  # largest gradient norm; 0 = no clipping
    warmup_steps: int = 100
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    decay_from: float = 0.0  # share of the budget after which decay begins
    decay_to: float = 0.1  # share of lr that is left at the end
    batch_rows: int = 32  # windows of one optimiser step, over all processes
    accumulation: int = 1  # pieces that each process computes its share in
    ema: float = 0.9999  # 0 = no moving average

    def __post_init__(self) -> None:
        check_fields(self, "optim.")
        _need(0 < self.lr < math.inf, "optim.lr", self.lr, "use a positive number")
        _need(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "use two values in [0, 1)")
        _need(self.eps > 0, "optim.eps", self.eps, "use a positive number")
        _need(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "use 0 or more")
        _need(self.clip >= 0, "optim.clip", self.clip, "use 0 (no clipping) or more")
        _need(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "use 0 or more")
        _need(0 <= self.decay_from < 1, "optim.decay_from", self.decay_from, "use a share in [0, 1)")
        _need(0 <= self.decay_to <= 1, "optim.decay_to", self.decay_to, "use a share in [0, 1]")
        _need(self.batch_rows >= 1, "optim.batch_rows", self.batch_rows, "use 1 or more")
        _need(self.accumulation >= 1, "optim.accumulation", self.accumulation, "use 1 or more")
        _need(
            self.batch_rows % self.accumulation == 0,
            "optim.accumulation",
            self.accumulation,
            f"use a divisor of optim.batch_rows ({self.batch_rows})",
        )
        _need(0 <= self.ema < 1, "optim.ema", self.ema, "use a value in [0, 1)")


@dataclass(frozen=True)
class LimitsSection:
    """When a run ends: at whichever comes first. Decay and block-size phases are shares of it."""

    minutes: float | None = None
    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "limits.")
        for name in ("minutes", "tokens", "steps"):
            value = getattr(self, name)
            _need(value is None or value > 0, f"limits.{name}", value, "use a positive number")


@dataclass(frozen=True)
class ValidSection:
    """Validation with the averaged weights: the bound with its standard error, sample texts, and the schedule search."""

    every_steps: int | None = 500
    every_minutes: float | None = None
    rows: int = 128  # windows scored each time; all that there are if fewer
    batch_rows: int = 32
    block_sizes: tuple[int, ...] = ()  # scored each time; empty: the current one
    replicates: int = 1  # independent draws of the noise

    def __post_init__(self) -> None:
        check_fields(self, "valid.")
        _need(self.every_steps is None or self.every_steps >= 1, "valid.every_steps", self.every_steps, "use 1 or more, or null")
        _need(
            self.every_minutes is None or self.every_minutes > 0,
            "valid.every_minutes",
            self.every_minutes,
            "use a positive number, or null",
        )
        for name in ("rows", "batch_rows", "replicates"):
            _need(getattr(self, name) >= 1, f"valid.{name}", getattr(self, name), "use 1 or more")
        _need(all(n >= 1 for n in self.block_sizes), "valid.block_sizes", self.block_sizes, "use 1 or more")


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints: how often, and how many are kept."""

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        check_fields(self, "save.")
        _need(self.every_steps is None or self.every_steps >= 1, "save.every_steps", self.every_steps, "use 1 or more, or null")
        _need(
            self.every_minutes is None or self.every_minutes > 0, "save.every_minutes", self.every_minutes, "use a positive number, or null"
        )
        _need(self.keep >= 1, "save.keep", self.keep, "use 1 or more")


@dataclass(frozen=True)
class LogSection:
    """What is reported while training."""

    every_steps: int = 10
    trackers: tuple[str, ...] = ("tensorboard",)  # names that accelerate knows; empty for none
    progress: bool = True  # a progress bar, where the output is a terminal

    def __post_init__(self) -> None:
        check_fields(self, "log.")
        _need(self.every_steps >= 1, "log.every_steps", self.every_steps, "use 1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """All of a run.

    block_sizes: (share of the budget from which it holds, block size or sizes); empty = model.block_size throughout. Of several sizes
    each step takes one at random, a size that is named twice twice as often.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    noise: NoiseSection = field(default_factory=NoiseSection)
    optim: OptimSection = field(default_factory=OptimSection)
    limits: LimitsSection = field(default_factory=LimitsSection)
    valid: ValidSection = field(default_factory=ValidSection)
    save: SaveSection = field(default_factory=SaveSection)
    log: LogSection = field(default_factory=LogSection)
    block_sizes: tuple[tuple[float, tuple[int, ...]], ...] = ()
    out: str = "runs/model"
    resume: str = "auto"  # "auto": go on from the newest whole checkpoint in `out`; "never"; or a checkpoint folder
    seed: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on accelerators that have it, fp32 on CPU
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
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
            _need(1 <= size <= self.model.length, "block_sizes", size, f"use sizes from 1 to model.length ({self.model.length})")
        if self.block_sizes:
            _need(
                self.model.block_size in self.block_sizes[-1][1],
                "block_sizes",
                self.block_sizes,
                f"end with model.block_size ({self.model.block_size})",
            )
            _need(self.model.algo == "bd3lm", "model.algo", self.model.algo, "block_sizes belongs to bd3lm; remove it")
        for size in self.valid.block_sizes:
            _need(size <= self.model.length, "valid.block_sizes", size, f"use sizes up to model.length ({self.model.length})")
        _need(bool(self.data.train), "data.train", self.data.train, "name at least one text file, folder or dataset")
        _need(bool(self.out), "out", self.out, "name a folder for the run")
        _need(0 <= self.seed < 2**63, "seed", self.seed, "use 0 to 2^63 - 1")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values (tuples as lists), for JSON and YAML."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; missing keys take their defaults. Raises ConfigError with the field's path."""
        return build(cls, values, "")


@checked()
def load_config(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A config from a recipe and overrides.

    recipe: a YAML file, or the name of a recipe that comes with the package (`recipe_names()`), or None for the defaults.
    overrides: `path.to.field=value` with YAML values, e.g. `optim.lr=3e-4`, `data.train=[a.txt, b.txt]`; later ones win.
    Raises ConfigError: no such recipe, unknown key (with the nearest name), a value out of range.
    """
    values = {} if recipe is None else read_recipe(recipe)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override '{override}' has no '='; write it as field=value, for example optim.lr=3e-4")
        _set(values, path.strip(), _yaml(text, f"override '{override}'"))
    return TrainConfig.from_dict(values)


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file or a packaged recipe."""
    path = Path(recipe)
    if not path.is_file():
        packaged = RECIPES / f"{recipe}.yaml"
        if not packaged.is_file():
            raise ConfigError(f"recipe '{recipe}' is neither a file nor a known recipe{nearest(str(recipe), recipe_names())}")
        path = packaged
    return read_yaml(path, f"recipe '{path}'")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. what: how messages name it. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is not UTF-8 text; save it as UTF-8") from None
    values = _yaml(text, what)
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is not a mapping of fields; write lines such as 'seed: 1'")
    return values


RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


# -- from plain values to dataclasses ----------------------------------------------------------------------------------


def _yaml(text: str, what: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    here = values
    for parent in parents:
        inner = here.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{path}' does not name a field: '{parent}' has no fields of its own")
        here = inner
    here[last] = value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
