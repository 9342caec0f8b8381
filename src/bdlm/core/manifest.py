"""Records and checks the checksums of a model folder: `manifest.json` holds the size and SHA-256 of
each file of the model.

A flipped bit in a weight, a config or a tokenizer seldom breaks a file's format; it gives a model
that loads and answers wrongly. Code that writes such a file records it here (`record`), and code
that loads the folder checks it first (`verify`). The manifest carries its own checksum. Uses the
standard library only; knows nothing about what the files hold."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bdlm.core.errors import CheckpointError

MANIFEST, FORMAT = "manifest.json", 1

# files that a load reads, whichever tokenizer there is
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
    """Record the present content of some files of a folder, and of model files not yet listed.

    names: files that were written; None lists all files of the model again. The manifest is written
    under a temporary name and renamed."""
    listed = {} if names is None else _read_or_empty(folder)
    present = [*FILES, *(path.name for path in folder.glob("*.safetensors"))]
    changed = {*(names or ()), *(name for name in present if name not in listed)}
    listed |= {
        name: _size_and_hash(folder / name) for name in sorted(changed) if (folder / name).is_file()
    }
    listed = {name: facts for name, facts in listed.items() if (folder / name).is_file()}
    body = {"format": FORMAT, "files": listed}
    text = json.dumps({**body, "sha256": sha256_of_json(body)}, indent=1, sort_keys=True) + "\n"
    temporary = folder / f".{MANIFEST}.{uuid.uuid4().hex[:8]}"
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def record_if_listed(folder: Path, names: Iterable[str]) -> None:
    """Run `record` if the folder has a manifest: for files added to a model later."""
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
        if _size_and_hash(file) != facts:
            raise CheckpointError(
                f"{file}: has changed since the model was saved (size or SHA-256 differs); "
                f"copy it again, or delete {path} if you changed it on purpose"
            )
    return True


def sha256_of_file(file: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(values: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of plain values as JSON, in hexadecimal; the order of keys does not
    matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _size_and_hash(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads(path.read_text("utf-8"))
        own = manifest.pop("sha256")
        if own != sha256_of_json(manifest):
            raise ValueError("its own SHA-256 differs")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        if any(Path(name).name != name for name in files):
            raise ValueError("it lists a file outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: is damaged ({reason}); copy the folder again, or delete this file to load"
            " without checksums"
        ) from None
    return files


def _read_or_empty(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return _read(folder / MANIFEST)
    except CheckpointError:
        return {}


__all__ = ["FILES", "FORMAT", "MANIFEST", "record", "record_if_listed", "verify"]
