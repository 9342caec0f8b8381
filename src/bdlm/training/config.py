"""The config of a training run: sections, YAML recipes and dotted overrides.

In: a recipe (a YAML file or the name of one in `bdlm/recipes`) and overrides such as
`optim.lr=3e-4`. Out: a `TrainConfig`. Every field is checked when it is set; an unknown key raises
ConfigError with the nearest name. Fields and their ranges: `training.sections`. Reading of recipe
files: `training.recipes`. Loads no torch, so that the command line can show its help at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bdlm.core.errors import ConfigError, shown
from bdlm.core.validation import AtLeast, Count, read_record, validate_fields, validated
from bdlm.training.recipes import parse_yaml, read_recipe, run_folder
from bdlm.training.recipes import recipe_names as recipe_names
from bdlm.training.sections import (
    Condition,
    DataSection,
    LimitsSection,
    LogSection,
    ModelSection,
    NoiseSection,
    OptimSection,
    PathName,
    SaveSection,
    ValidSection,
    need,
)


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
    block_sizes: tuple[tuple[float, tuple[Count, ...]], ...] = ()
    """Pairs of a share of the budget, in [0, 1) and rising from 0, and the block size or
    sizes that hold from it; each step takes one of several at random, and empty means
    model.block_size throughout."""
    out: Annotated[PathName, Condition(bool, "name a folder for the run")] = "runs/model"
    """Folder of the run: config, checkpoints, metrics and the finished model; relative to
    the working directory."""
    resume: PathName = "auto"
    """auto goes on from the newest whole checkpoint in out, never refuses to, and a
    checkpoint's folder branches off there."""
    seed: Annotated[int, AtLeast(0, "use 0 to 2^63 - 1")] = 1
    """Seed of the initial weights, the order of windows and all noise, 0 to 2^63 - 1; fixed
    for a run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the passes: fp32, bf16, or auto (bf16 on accelerators that have it, fp32
    on CPU)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the accelerator that there is; cpu leaves it alone."""

    def __post_init__(self) -> None:
        validate_fields(self)
        limits = self.limits
        need(
            any(v is not None for v in (limits.minutes, limits.tokens, limits.steps)),
            "limits",
            None,
            "set limits.minutes, limits.tokens or limits.steps",
        )
        starts = [start for start, _ in self.block_sizes]
        need(
            not starts or (starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1),
            "block_sizes",
            self.block_sizes,
            "give [share, size] pairs with shares from 0.0, rising, below 1",
        )
        for name, sizes in (
            *(("block_sizes", sizes) for _, sizes in self.block_sizes),
            ("valid.block_sizes", self.valid.block_sizes),
        ):
            largest = max(sizes, default=1)
            need(
                largest <= self.model.length,
                name,
                largest,
                f"use sizes up to model.length ({self.model.length})",
            )
        if self.block_sizes:
            need(
                self.model.block_size in self.block_sizes[-1][1],
                "block_sizes",
                self.block_sizes,
                f"end with model.block_size ({self.model.block_size})",
            )
            need(
                self.model.algo == "bd3lm",
                "model.algo",
                self.model.algo,
                "block_sizes belongs to bd3lm; remove it",
            )
        need(
            bool(self.data.train),
            "data.train",
            self.data.train,
            "name at least one text file, folder or dataset",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values (tuples as lists), for JSON and YAML."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; missing keys take their defaults. Raises ConfigError with the
        field's path."""
        return read_record(cls, values)


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
