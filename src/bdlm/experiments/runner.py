"""Running a plan: each run is trained and measured once, resumable after any kill; its record is
written when it is complete.

In: a `Plan`, the folder of the runs and the folder of the records. Out: one JSON per run (values,
seed, commit, versions, wall time). Finished work is found again: a trained model by its folder, a
finished measurement by its file, a finished run by its record. Knows nothing about tables or
figures."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bdlm.api import LM, load
from bdlm.core.errors import ConfigError
from bdlm.data.files import write_json
from bdlm.experiments.measurements import check_measurement, take_measurement
from bdlm.experiments.plan import Plan, Run
from bdlm.training.config import TrainConfig
from bdlm.training.loop import train
from bdlm.training.run_log import read_metrics

PACKAGES = ("bdlm", "torch", "transformers", "tokenizers", "numpy")


class Stopped(Exception):
    """Raised when a signal stopped a training run; it continues at the next start."""


def record_path(results: Path, plan: str, run: str) -> Path:
    """Return the path of a run's record."""
    return results / plan / f"{run}.json"


def run_plan(
    plan: Plan,
    work: Path,
    results: Path,
    only: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Do every run that has no record yet, in order. Returns the paths of all records.

    only: names of the runs to do. Before the first run, raises ConfigError for an unknown name, an
    unknown measurement, a starting model that no run makes, or a record of a run with other
    options; later `Stopped` when a signal stopped a training run."""
    chosen = _chosen(plan, only)
    for run in chosen:
        for options in run.measures.values():
            check_measurement(**options)
        if record_path(results, plan.name, run.name).is_file():
            _same(run, record_path(results, plan.name, run.name))
        else:
            _startable(run, plan, chosen, work)
    for number, run in enumerate(chosen, 1):
        path = record_path(results, plan.name, run.name)
        if path.is_file():
            continue
        say(f"{plan.name} {number}/{len(chosen)}: {run.name}")
        write_json(path, do(run, plan.name, work / plan.name / run.name))
        say(f"{plan.name} {number}/{len(chosen)}: {run.name} is done: {path}")
    return [record_path(results, plan.name, run.name) for run in chosen]


def recipes(plan: Plan, work: Path, results: Path, only: tuple[str, ...] = ()) -> list[Path]:
    """Write the training config of each run without a record as a recipe under `work`, for
    `accelerate launch -m bdlm.training.loop`.

    `run_plan` finds the resulting models and measures them."""
    made = []
    for run in _chosen(plan, only):
        if run.train is not None and not record_path(results, plan.name, run.name).is_file():
            made.append(work / plan.name / f"{run.name}.yaml")
            write_json(made[-1], run.train.to_dict())  # JSON is YAML
    return made


def _chosen(plan: Plan, only: tuple[str, ...]) -> list[Run]:
    unknown = set(only) - {run.name for run in plan.runs}
    if unknown:
        raise ConfigError(
            f"plan '{plan.name}' has no run '{min(unknown)}'; it has"
            f" {', '.join(r.name for r in plan.runs)}"
        )
    return [run for run in plan.runs if not only or run.name in only]


def _same(run: Run, path: Path) -> None:
    """Raise ConfigError where a record belongs to a run with other options than the plan's. Folders
    may differ: see `_placeless`."""
    record = json.loads(path.read_text(encoding="utf-8"))
    recorded = None if record["config"] is None else TrainConfig.from_dict(record["config"])
    pairs = {
        "options": (run.measures, record["options"]),
        "model": (run.model, record["model"]),
        "config": (_bare(run.train), _bare(recorded)),
    }
    for name, both in pairs.items():
        planned, stored = (_placeless(json.loads(json.dumps(value))) for value in both)
        if planned != stored:
            raise ConfigError(
                f"'{path}' is the record of a run with another '{name}'; delete it to run again, or"
                " use another --results"
            )


def _bare(config: TrainConfig | None) -> dict[str, Any] | None:
    """Drop the fields of a training config that only name places."""
    if config is None:
        return None
    values = config.to_dict()
    return {**values, "log": None, "out": None, "data": {**values["data"], "cache": None}}


def _placeless(value: Any) -> Any:
    """Keep only the last two parts of each path, so that --data and --out may be anywhere."""
    if isinstance(value, str):
        return "/".join(Path(value).parts[-2:]) if "/" in value else value
    if isinstance(value, dict):
        return {key: _placeless(v) for key, v in value.items()}
    return [_placeless(v) for v in value] if isinstance(value, list) else value


def _startable(run: Run, plan: Plan, chosen: list[Run], work: Path) -> None:
    """Raise ConfigError if a run starts from the model of another run, under `work`, that does not
    exist and will not be made."""
    source = run.model or (None if run.train is None else run.train.model.init_from)
    path = Path(source or "")
    if source is None or path.exists() or work not in path.parents or path.name != "model":
        return
    maker, name = path.parent.parent.name, path.parent.name
    if maker != plan.name or name not in [r.name for r in chosen]:
        raise ConfigError(
            f"run '{run.name}' starts from '{source}', which is not there; first: bdlm experiment"
            f" run {maker} --only {name}"
        )


def do(run: Run, plan: str, folder: Path) -> dict[str, Any]:
    """Train and measure one run. Returns its record."""
    trained = None if run.train is None else _trained(run.train)
    lm: LM | None = None
    measured: dict[str, Any] = {}
    for name, options in run.measures.items():
        kept = folder / "measures" / f"{name}.json"
        source = run.model or (None if trained is None else trained["model"])
        if not kept.is_file():
            lm = lm or (None if source is None else load(source))
            start = time.perf_counter()
            rest = {key: value for key, value in options.items() if key != "kind"}
            values = take_measurement(str(options.get("kind")), lm, rest)
            write_json(
                kept,
                {
                    "options": options,
                    "model": source,
                    "values": values,
                    "seconds": time.perf_counter() - start,
                },
            )
        measured[name] = json.loads(kept.read_text(encoding="utf-8"))
        if (
            measured[name]["options"] != json.loads(json.dumps(options))
            or measured[name].get("model", source) != source
        ):
            raise ConfigError(
                f"'{kept}' was measured with other options or of another model; delete it, or use"
                " another folder with --out"
            )
    return {
        "experiment": plan,
        "run": run.name,
        "seed": None if run.train is None else run.train.seed,
        "model": run.model,
        "training": trained,
        "measures": {name: m["values"] for name, m in measured.items()},
        "seconds": {
            **({} if trained is None else {"training": trained["seconds"]}),
            **{n: m["seconds"] for n, m in measured.items()},
        },
        "options": {name: m["options"] for name, m in measured.items()},
        "config": None if run.train is None else run.train.to_dict(),
        **_circumstances(),
    }


def _trained(config: TrainConfig) -> dict[str, Any]:
    """Return the result of a training run, from its folder or after (resumed) training."""
    folder = Path(config.out)
    facts = folder / "model" / "training.json"
    if not facts.is_file():
        result = train(config)
        if result.reason != "done":
            raise Stopped(f"stopped by {result.reason}; start again to go on")
    values = json.loads(facts.read_text(encoding="utf-8"))
    there = replace(TrainConfig.from_dict(values.pop("config")), log=config.log)
    if there != config:
        raise ConfigError(
            f"'{facts}' belongs to a run with another config; delete that folder, or use another"
            " one with --out"
        )
    seconds = max(float(line["seconds"]) for line in read_metrics(folder) if "seconds" in line)
    return {**values, "model": str(folder / "model"), "seconds": seconds}


def _circumstances() -> dict[str, Any]:
    """Return commit, versions and machine."""
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }


def _commit() -> str | None:
    """Return the commit of the running source, with a + if it has changed since; None outside a
    checkout."""
    here = Path(__file__).parent
    try:
        found = _git(here, "rev-parse", "--short", "HEAD")
    except OSError:
        return None
    if found.returncode:
        return None
    changed = _git(here, "status", "--porcelain", "--", str(here.parent)).stdout.strip()
    return found.stdout.strip() + ("+" if changed else "")


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder."""
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
    )
