"""Checkpoints that survive a kill at any moment: safetensors and JSON, no pickle.

A checkpoint is a folder `step-000000123` with tensor files, `state.json` and, written last,
`manifest.json` (size and sha256 of every file). It is written under a temporary name, every file
and the folder are synced, and only then is it renamed. The newest complete checkpoint wins; older
ones are deleted only after the new one has been read back. Knows nothing about models or
optimisers: only named tensors and a dictionary."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bdlm.core.errors import CheckpointError
from bdlm.core.manifest import sha256_of_file, sha256_of_json

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    groups: {"weights": {name: tensor}, ...} on CPU. state: plain values."""

    path: Path
    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    groups: Groups,
    state: Mapping[str, Any],
    keep: int = 2,
    spare: Path | None = None,
) -> Path:
    """Write checkpoint `step` under `folder`, verify it, then delete older ones except the newest
    `keep` complete ones and `spare`.

    groups: named sets of tensors, one safetensors file each. state: values that JSON can hold. The
    parent of `folder` must exist. If a complete checkpoint of that step exists, it stays when its
    content is equal and is set aside (`set_aside`) when it differs. Returns the checkpoint's
    folder. Raises CheckpointError when the checkpoint cannot be written (full disk); earlier ones
    are left intact."""
    final, part = folder_of(folder, step), folder / f".part-{step:09d}"
    try:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        _write_all(part, step, groups, state)
        if _is_whole(final):
            if (final / MANIFEST).read_bytes() == (part / MANIFEST).read_bytes():
                shutil.rmtree(part)
                return final
            set_aside([final])
        elif final.exists():
            _remove(final)
        os.rename(part, final)
        sync_folder(folder)
        verify(final)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors reports a full disk in an exception type of its own
        shutil.rmtree(part, ignore_errors=True)
        last = newest(folder)
        kept = (
            f"the last whole checkpoint is '{last}'" if last else "there is no earlier checkpoint"
        )
        raise CheckpointError(
            f"checkpoint '{final}' could not be written ({error}); {kept}; free some space and"
            " resume"
        ) from error
    prune(final, keep, spare)
    return final


def set_aside(paths: Sequence[Path]) -> Path:
    """Move checkpoints of an abandoned branch to `set-aside-N` next to their folder. Returns the
    new folder."""
    runs = paths[0].parent.parent
    number = 1
    while (aside := runs / f"set-aside-{number}").exists():
        number += 1
    aside.mkdir()
    for path in paths:
        os.rename(path, aside / path.name)
    sync_folder(aside)
    sync_folder(paths[0].parent)
    return aside


def _write_all(part: Path, step: int, groups: Groups, state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    for name, tensors in groups.items():
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            part / f"{name}.safetensors",
        )
    (part / STATE).write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
    names = [f"{name}.safetensors" for name in groups] + [STATE]
    for name in names:
        sync_file(part / name)
    files = {
        name: {"bytes": (part / name).stat().st_size, "sha256": sha256_of_file(part / name)}
        for name in names
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (part / MANIFEST).write_text(
        json.dumps({**manifest, "sha256": sha256_of_json(manifest)}, indent=1), encoding="utf-8"
    )
    sync_file(part / MANIFEST)
    sync_folder(part)


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every file against it. Raises
    CheckpointError with the name of the damaged file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        own = manifest.pop("sha256")
        if own != sha256_of_json(manifest):
            raise ValueError("its own sha256 differs")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
    except FileNotFoundError:
        raise CheckpointError(
            f"'{path / MANIFEST}' is missing: the checkpoint was never finished; use an earlier"
            " checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"'{path / MANIFEST}' is damaged ({error}); use an earlier checkpoint"
        ) from None
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"'{file}' is missing; use an earlier checkpoint")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"'{file}' has {file.stat().st_size} bytes where {facts['bytes']} were written; use"
                " an earlier checkpoint"
            )
        if sha256_of_file(file) != facts["sha256"]:
            raise CheckpointError(
                f"'{file}' has changed since it was written (sha256 differs); use an earlier"
                " checkpoint"
            )
    return manifest


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def load(path: Path) -> Checkpoint:
    """Read one checkpoint after verifying it. Raises CheckpointError with the name of the damaged
    file."""
    from safetensors.torch import load_file

    manifest = verify(path)
    groups = {
        Path(n).stem: load_file(path / n) for n in manifest["files"] if n.endswith(".safetensors")
    }
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(path, manifest["step"], groups, state)


def folder_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step under `folder`."""
    return folder / f"step-{step:09d}"


def steps(folder: Path) -> list[Path]:
    """List checkpoint folders, oldest first, complete or not."""
    return sorted(
        path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()
    )


def newest(folder: Path, damaged: list[str] | None = None) -> Path | None:
    """Return the newest complete checkpoint, or None if there is none. Messages about damaged ones
    are appended to `damaged`."""
    for path in reversed(steps(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            if damaged is not None:
                damaged.append(str(error))
        else:
            return path
    return None


def load_newest(folder: Path, damaged: list[str] | None = None) -> Checkpoint | None:
    """Read the newest complete checkpoint; None where there are no checkpoints.

    Raises CheckpointError with the file names when there are checkpoints but none is complete:
    starting over would hide the loss."""
    found: list[str] = []
    path = newest(folder, found)
    if damaged is not None:
        damaged.extend(found)
    if path is None and found:
        raise CheckpointError(
            f"no whole checkpoint in '{folder}': {' | '.join(found)}; choose another run folder, or"
            " resume=never"
        )
    return None if path is None else load(path)


def prune(written: Path, keep: int, spare: Path | None = None) -> None:
    """Delete checkpoints older than the newest `keep` complete ones, and unfinished leftovers.

    written: the newest one, just verified. It stays, and so do newer ones and `spare`. Damaged
    checkpoints do not count towards `keep`."""
    older = [path for path in steps(written.parent) if path.name < written.name]
    count = 1
    while older and count < keep:
        count += _is_whole(older.pop())
    for path in older:
        if path != spare:
            _remove(path)
    for path in written.parent.glob(".part-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a kill halfway leaves a folder that does not
    pass for a complete checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Return name and sha256 of each file in a folder (empty if the folder is missing), for the
    state of a checkpoint that depends on these files."""
    return {path.name: sha256_of_file(path) for path in sorted(folder.glob("*")) if path.is_file()}


def check_digests(folder: Path, expected: Mapping[str, str]) -> None:
    """Raise CheckpointError for a file of the folder that is missing or differs from what `digests`
    recorded."""
    for name, value in expected.items():
        if not (folder / name).is_file():
            raise CheckpointError(
                f"'{folder / name}' is missing: the run's checkpoints need it; put it back"
            )
        if sha256_of_file(folder / name) != value:
            raise CheckpointError(
                f"'{folder / name}' has changed since the run wrote it (sha256 differs); put it"
                " back"
            )


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk (where the system lets a folder be opened)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def folder_lock(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock the run folder for this process; the operating system releases the lock however the
    process ends.

    Yields a function that raises CheckpointError once the locked folder has been deleted, moved or
    replaced. Raises CheckpointError with the holder when another process has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as stream:
        if not _try_lock(stream):
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise CheckpointError(
                f"run folder '{folder}' is in use by {holder}; stop it, or choose another folder"
                " with out=..."
            )
        stream.seek(0)
        stream.truncate()
        stream.write(f"process {os.getpid()}")
        stream.flush()

        def check() -> None:
            try:
                there = os.path.samestat(os.fstat(stream.fileno()), os.stat(folder / ".lock"))
            except OSError:
                there = False
            if not there:
                raise CheckpointError(
                    f"run folder '{folder}' was deleted, moved or replaced during the run,"
                    " so nothing more can be saved; move it back (or start again where it is lost)"
                    " and train on with the same command"
                )

        yield check


def _try_lock(stream: Any) -> bool:
    try:
        try:
            import fcntl
        except ImportError:
            import msvcrt

            stream.seek(1 << 20)  # Windows locks are mandatory: lock a byte beyond the text
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
