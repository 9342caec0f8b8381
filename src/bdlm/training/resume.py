"""Resuming a run: find its checkpoint, restore what its folder holds, branch off at a checkpoint.

In: a config, the run's folder and the checkpoint that training continues from. Out: that
checkpoint, and files moved or copied so that a folder holds one complete run. Knows nothing about
tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdlm.core.errors import ConfigError
from bdlm.data.files import write_atomically
from bdlm.training import checkpoint
from bdlm.training.checkpoint import Checkpoint
from bdlm.training.config import TrainConfig
from bdlm.training.run_log import print_stderr


def find_checkpoint(config: TrainConfig, main: bool = True) -> Checkpoint | None:
    """Read and verify the checkpoint that `config.resume` asks for; None starts a new run.

    Raises CheckpointError for a damaged one, ConfigError when a new run would overwrite an old
    one."""
    folder = Path(config.out) / "checkpoints"
    if config.resume == "auto":
        damaged: list[str] = []
        saved = checkpoint.load_newest(folder, damaged)
        for message in damaged if main else ():
            print_stderr(
                f"warning: {message.replace('use an earlier checkpoint', 'an earlier one is used')}"
            )
        return saved
    if config.resume == "never":
        if checkpoint.steps(folder):
            raise ConfigError(
                f"resume is 'never' but '{folder}' holds checkpoints; use resume=auto, or another"
                " folder with out=..."
            )
        return None
    path = Path(config.resume)
    if not path.is_dir():
        raise ConfigError(
            f"resume is {config.resume!r}, which is not a folder; use auto, never, or a checkpoint"
            " folder"
        )
    return checkpoint.load(path)


def check_limits(config: TrainConfig, state: Mapping[str, Any]) -> None:
    """Raise ConfigError for a limit that was lowered below what the run has already done."""
    behind = {"steps": state["step"], "tokens": state["tokens"], "minutes": state["seconds"] / 60}
    for name, done in behind.items():
        limit = getattr(config.limits, name)
        if limit is not None and done > limit != state["config"]["limits"][name]:
            raise ConfigError(
                f"limits.{name} is {limit}, but the run in '{config.out}' is past that, at"
                f" {done:.6g} {name}; raise it, or begin another run with out=..."
            )


def kept_config(config: TrainConfig) -> dict[str, Any]:
    """Return the values for a run folder's config.json: those of the run, independent of the
    working directory.

    Paths of existing files are absolute, and `resume` is auto: a run that branched off at a
    checkpoint continues from its newest one next time."""
    values = config.to_dict()
    data, model = values["data"], values["model"]
    for name in ("train", "valid"):
        data[name] = [_absolute(path) for path in data[name]]
    if data["cache"] is not None:
        data["cache"] = os.path.abspath(data["cache"])
    if model["init_from"] is not None:
        model["init_from"] = _absolute(model["init_from"])
    return {**values, "out": os.path.abspath(config.out), "resume": "auto"}


def _absolute(name: str) -> str:
    """Make the path of an existing file absolute; any other name (of a dataset, of a packaged
    model) stays as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def is_own(folder: Path, saved: Checkpoint) -> bool:
    """Return whether a checkpoint lies where the run in `folder` writes its own checkpoint of that
    step."""
    return (
        saved.path.resolve() == checkpoint.folder_of(folder / "checkpoints", saved.step).resolve()
    )


def check_branch(folder: Path, saved: Checkpoint) -> None:
    """Raise ConfigError where a checkpoint of another run would continue in a folder that already
    has checkpoints."""
    if not is_own(folder, saved) and checkpoint.steps(folder / "checkpoints"):
        raise ConfigError(
            f"resume is '{saved.path}' but '{folder}' holds checkpoints of its own; use resume=auto"
            " to go on with those, or another folder with out=..."
        )


def take_tokenizer(folder: Path, saved: Checkpoint) -> None:
    """Copy the tokenizer of another run, to which this checkpoint belongs, into this run's
    folder."""
    theirs, own = saved.path.parent.parent / "tokenizer", folder / "tokenizer"
    if is_own(folder, saved) or not theirs.is_dir():
        return
    part = folder / ".tokenizer.part"
    for old in (part, own):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(theirs, part)
    os.rename(part, own)


def set_newer_aside(folder: Path, saved: Checkpoint) -> str | None:
    """Move what the run wrote after this checkpoint out of the way of the branch that begins here:
    checkpoints, model, metrics.

    Returns a sentence that names the new place, or None where the checkpoint is the newest."""
    newest = checkpoint.folder_of(folder / "checkpoints", saved.step).name
    newer = [p for p in checkpoint.steps(folder / "checkpoints") if p.name > newest]
    if not newer:
        return None
    aside = checkpoint.set_aside(newer)
    if (folder / "model").is_dir():
        os.rename(folder / "model", aside / "model")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        shutil.copy2(metrics, aside / metrics.name)
        lines = metrics.read_bytes().splitlines(keepends=True)
        write_atomically(metrics, b"".join(line for line in lines if _step(line) <= saved.step))
    names = f"{newer[0].name} to {newer[-1].name}" if len(newer) > 1 else newer[0].name
    return (
        f"branching off at step {saved.step}: what came after it ({names}) is set aside in"
        f" '{aside}'"
    )


def _step(line: bytes) -> float:
    """Return the step of a metrics record; infinity for a truncated line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
