"""Plans of experiments: runs (a training, measurements of the model, or both), tables and figures,
read from one YAML file.

In: a plan's file or name, and values for its placeholders. Out: a `Plan` whose runs are expanded
over their grids. Loads no torch. Knows nothing about how a run is done.

    runs:
      - name: "bd{size}-s{seed}"               # one run for each point of the grid
        each: {size: [4, 16], seed: [1, 2, 3]}
        train: {model: {block_size: "{size}"}, seed: "{seed}"}      # laid over the plan's `common`
        measures: {test: {kind: likelihood, data: "{test}"}}

A text that is one placeholder takes its value; inside a longer text the value is inserted as text.
Placeholders from outside the file: {work}, the folder of all runs, and those of `places`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bdlm.core.errors import ConfigError, nearest
from bdlm.core.validation import read_record
from bdlm.training.config import TrainConfig
from bdlm.training.recipes import read_yaml

PLANS = Path(__file__).resolve().parent / "plans"
_HOLE = re.compile(r"\{(\w+)\}")
_NAME = re.compile(r"\w[\w.-]*")  # of a run: a file's name
PARTS = ("common", "runs", "tables", "figures")
FIELDS = ("title", "claim", "needs", "minutes", "found", "source", *PARTS)


@dataclass(frozen=True)
class Grid:
    """A run of the file before its grid is expanded."""

    name: str
    each: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] | None = None
    model: str | None = None
    measures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run. train: the config of its training, or None. model: the model to measure, where it is
    not the run's own.

    measures: name -> kind and options (`experiments.measurements.MEASUREMENTS`)."""

    name: str
    train: TrainConfig | None
    model: str | None
    measures: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """A table of the report. rows: label -> pattern of run names ("ar-s*"), averaged over the runs.
    columns: heading -> "measure.value".

    against: label of the row with which the others are compared, run by run (runs pair by the last
    part of their names, the seed), in the columns that `compare` names (none named: all). show:
    "value", or "perplexity" for exp of the mean of nats. published: label -> heading -> a value of
    the paper, shown next to ours."""

    title: str
    rows: dict[str, str]
    columns: dict[str, str]
    against: str | None = None
    compare: tuple[str, ...] = ()
    show: Literal["value", "perplexity"] = "value"
    note: str = ""
    published: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A figure of the report: kind "points" (one value per row with its error) or "lines" (a list
    of {x, y} for each row)."""

    name: str
    kind: Literal["points", "lines"]
    title: str
    rows: dict[str, str]
    value: str
    x: str
    y: str
    caption: str
    log: bool = False


@dataclass(frozen=True)
class Plan:
    """An experiment. minutes: approximate time on two CPU cores, 0 = unknown. claim: what the paper
    says, or the question. needs: texts that --data must hold (`experiments.corpora`)."""

    name: str
    title: str
    claim: str
    runs: tuple[Run, ...] = ()
    needs: tuple[str, ...] = ()
    minutes: float = 0.0
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    found: str = ""
    source: str = ""


def plan_names() -> list[str]:
    """List the plans that come with the package."""
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def load_plan(
    name: str, work: str = "runs/experiments", places: Mapping[str, str] | None = None
) -> Plan:
    """Load a plan by its name or file. places: values of the placeholders that the plan `needs`;
    missing ones stay unfilled.

    Raises ConfigError: no such plan, an unknown field, two runs of one name, an invalid config."""
    path = Path(name) if Path(name).is_file() else PLANS / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"plan '{name}' is neither a file nor a known plan{nearest(name, plan_names())}"
        )
    values = read_yaml(path, f"plan '{name}'")
    for key in values:
        if key not in FIELDS:
            raise ConfigError(f"plan '{name}' has no field '{key}'{nearest(key, FIELDS)}")
    outside = {"work": work, "plan": path.stem, **(places or {})}
    about = read_record(
        Plan,
        {"name": path.stem, **{key: v for key, v in values.items() if key not in PARTS}},
        f"plan '{name}'",
    )
    common = values.get("common", {})
    if not isinstance(common, Mapping):
        raise ConfigError(f"plan '{name}': common is {common!r}; use a mapping of fields")
    runs = [
        run
        for grid in _parts(Grid, values, "runs", name)
        for run in _expanded(grid, common, outside, name)
    ]
    names = [run.name for run in runs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(
            f"plan '{name}' has two runs named '{twice[0]}'; put every key of `each` into the name"
        )
    tables = _parts(Table, values, "tables", name)
    for table in tables:
        if table.against is not None and table.against not in table.rows:
            raise ConfigError(
                f"plan '{name}': against is '{table.against}', not a row of"
                f" '{table.title}'{nearest(table.against, table.rows)}"
            )
    return replace(
        about, runs=tuple(runs), tables=tables, figures=_parts(Figure, values, "figures", name)
    )


def _parts(kind: Any, values: Mapping[str, Any], key: str, plan: str) -> tuple[Any, ...]:
    """Read the runs, tables or figures of a file."""
    found = values.get(key) or []
    if not isinstance(found, list):
        raise ConfigError(f"plan '{plan}': {key} is {found!r}; use a list")
    return tuple(read_record(kind, part, f"{plan}.{key}[{i}]") for i, part in enumerate(found))


def _expanded(
    grid: Grid, common: Mapping[str, Any], outside: Mapping[str, str], plan: str
) -> list[Run]:
    """Make a run for each point of the grid."""
    made = []
    for section, inside, kind, wanted in (
        ("each", grid.each, list, "a list"),
        ("measures", grid.measures, Mapping, "a mapping with a kind"),
    ):
        for key, value in inside.items():
            if not isinstance(value, kind):
                raise ConfigError(
                    f"plan '{plan}', run '{grid.name}': {section}.{key} is {value!r}; use {wanted}"
                )
    for point in itertools.product(*grid.each.values()):
        holes = {**outside, **dict(zip(grid.each, point, strict=True))}
        name = str(filled(grid.name, holes))
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"plan '{plan}': a run is named '{name}'; use letters, digits, -, _ and ."
            )
        config = None
        if grid.train is not None:
            own = {"out": f"{{work}}/{{plan}}/{name}", "log": {"trackers": [], "progress": False}}
            config = TrainConfig.from_dict(filled(merged(merged(own, common), grid.train), holes))
        made.append(Run(name, config, filled(grid.model, holes), filled(grid.measures, holes)))
    return made


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, the second over the first; null resets a key's whole section to its
    default."""
    out = dict(under)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = (
            merged(inner, value)
            if isinstance(inner, Mapping) and isinstance(value, Mapping)
            else value
        )
    return out


def filled(value: Any, holes: Mapping[str, Any]) -> Any:
    """Replace placeholders in texts, lists and mappings; unknown ones stay."""
    if isinstance(value, str):
        whole = _HOLE.fullmatch(value)
        if whole and whole[1] in holes:
            return holes[whole[1]]
        return _HOLE.sub(lambda hole: str(holes.get(hole[1], hole[0])), value)
    if isinstance(value, Mapping):
        return {key: filled(v, holes) for key, v in value.items()}
    return [filled(v, holes) for v in value] if isinstance(value, Sequence) else value
