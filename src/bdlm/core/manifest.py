"""Checksums of a model folder: `manifest.json` holds the size and SHA-256 of each file of the
model.

A flipped bit in a weight, a config or a tokenizer seldom breaks a file's format; it gives a model
that loads and answers wrongly. Whoever writes such a file records it here (`record`), and whoever
loads the folder checks it first (`verify`). The manifest carries its own checksum.
Uses the standard library only; knows nothing about what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bdlm.core.errors import CheckpointError

MANIFEST, FORMAT = "manifest.json", 1

# what a load reads besides the weights, whichever tokenizer there is
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "bdlm_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


def record(folder: Path, names: Iterable[str] | None = None) -> None:
    """Note the present content of some files of a folder, and of model files not yet listed.

    names: files that were written; None lists all files of the model anew. The manifest is written
    beside its place and renamed."""
    held = {} if names is None else _read_or_empty(folder)
    present = [*FILES, *(path.name for path in folder.glob("*.safetensors"))]
    wanted = {*(names or ()), *(name for name in present if name not in held)}
    held |= {name: _facts(folder / name) for name in sorted(wanted) if (folder / name).is_file()}
    held = {name: facts for name, facts in held.items() if (folder / name).is_file()}
    body = {"format": FORMAT, "files": held}
    text = json.dumps({**body, "sha256": _own(body)}, indent=1, sort_keys=True) + "\n"
    beside = folder / f".{MANIFEST}.{uuid.uuid4().hex[:8]}"
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / MANIFEST)
    finally:
        beside.unlink(missing_ok=True)


def record_if_listed(folder: Path, names: Iterable[str]) -> None:
    """`record` where the folder has a manifest: files beside a model that were written later."""
    if (folder / MANIFEST).is_file():
        record(folder, names)


def verify(folder: Path) -> bool:
    """Check every listed file against its checksum; False where the folder has no manifest.

    Reads each file once. Raises CheckpointError, in one line, for a file that is missing or has
    changed, and for a manifest that is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    for name, facts in _read(path).items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; {MANIFEST} lists it: copy the whole folder")
        if _facts(file) != facts:
            raise CheckpointError(
                f"{file}: has changed since the model was saved (size or SHA-256 differs); "
                f"copy it anew, or delete {path} if you changed it on purpose"
            )
    return True


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def _own(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads(path.read_text("utf-8"))
        own = manifest.pop("sha256")
        if own != _own(manifest):
            raise ValueError("its own SHA-256 differs")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        if any(Path(name).name != name for name in files):
            raise ValueError("it lists a file outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: is damaged ({reason}); copy the folder anew, or delete this file to load"
            " without checksums"
        ) from None
    return files


def _read_or_empty(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return _read(folder / MANIFEST)
    except CheckpointError:
        return {}


__all__ = ["FILES", "FORMAT", "MANIFEST", "record", "record_if_listed", "verify"]
