"""Going on with a run: what its folder remembers, and branching off from one of its checkpoints.

In: a config, the run's folder and the checkpoint that training goes on from. Out: files moved or
copied, so that a folder holds one run, whole. Knows nothing about tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bdlm.core.errors import ConfigError
from bdlm.data.files import write_atomically
from bdlm.training import checkpoint
from bdlm.training.checkpoint import Checkpoint
from bdlm.training.config import TrainConfig


def kept_config(config: TrainConfig) -> dict[str, Any]:
    """The values of a run folder's config.json: those of the run, made independent of the working
    directory.

    Paths of what is there are absolute, and `resume` is auto: who branched off at a checkpoint goes
    on from the newest one next time.
    """
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
    """A path that exists from the root on; any other name (of a dataset, of a packaged model) as it
    is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def is_own(folder: Path, saved: Checkpoint) -> bool:
    """Whether a checkpoint lies where the run in `folder` writes its own of that step."""
    return (
        saved.path.resolve() == checkpoint.folder_of(folder / "checkpoints", saved.step).resolve()
    )


def check_branch(folder: Path, saved: Checkpoint) -> None:
    """Raise ConfigError where a checkpoint of another run would go on in a folder that has
    checkpoints already."""
    if not is_own(folder, saved) and checkpoint.steps(folder / "checkpoints"):
        raise ConfigError(
            f"resume is '{saved.path}' but '{folder}' holds checkpoints of its own; use resume=auto"
            " to go on with those, or another folder with out=..."
        )


def take_tokenizer(folder: Path, saved: Checkpoint) -> None:
    """Copy the tokenizer of another run, whose checkpoint this is, into this run's folder."""
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

    Returns a sentence that says where to, or None where the checkpoint is the newest.
    """
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
    """The step of a record of the metrics; infinite for a line cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
