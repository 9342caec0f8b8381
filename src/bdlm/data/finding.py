"""Finds the files behind names: files, folders, globs, `~`; and reports which files of a folder are
left out, and why.

In: a name. Out: paths in an order that depends on the names alone, and what is left out. Knows
nothing about content."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, field
from pathlib import Path

from bdlm.core.errors import DataError
from bdlm.data.compression import COMPRESSIONS, is_compressed, without_compression

TEXT = (".txt", ".text", ".md")
LINES = (".jsonl", ".ndjson")
JSON, PARQUET = ".json", ".parquet"
TABLES = {".csv": ",", ".tsv": "\t"}
READABLE = (*TEXT, *LINES, JSON, *TABLES, PARQUET)
SAVED = (
    "dataset_dict.json",
    "state.json",
)  # a folder that `datasets.save_to_disk` wrote holds one of them
WHAT = "give a file, a folder, a glob, or hf:name[:config][:split][:field]"


@dataclass(frozen=True)
class LeftOut:
    """Report a file or folder of a named folder that is not read, and why."""

    path: str
    why: str


@dataclass
class Found:
    """List what a name stands for.

    files: to be read in this order, folders written by `save_to_disk` among them.
    left_out: files that are not read.
    hidden: files that start with a dot, listed separately since every folder has some."""

    files: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    hidden: list[LeftOut] = field(default_factory=list)


def find(name: str) -> Found:
    """List what a name stands for. Raises `DataError` if nothing of it can be read."""
    if not name.strip():
        raise DataError(f"a name of data is empty; {WHAT}")
    try:
        if not os.path.lexists(name):
            name = os.path.expanduser(name)
        if os.path.lexists(name) or not glob.has_magic(name):
            return _place(Path(name), name)
        return _glob(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read ({error}); {WHAT}") from error


def kind_of(path: Path) -> str:
    """Return the ending that decides how a file is read, in lower case, without that of a
    compression."""
    return without_compression(path).suffix.lower()


def is_saved(path: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote this folder."""
    return (path / SAVED[0]).is_file() or (
        (path / SAVED[1]).is_file() and (path / "dataset_info.json").is_file()
    )


def _place(path: Path, name: str) -> Found:
    if path.is_file():
        return Found([path])
    if not path.is_dir():
        if not os.path.lexists(path):
            hint = "; there is no such user on this system" if name.startswith("~") else ""
            raise DataError(f"{name} does not exist{hint}; {WHAT}")
        raise DataError(f"{name} is neither a file nor a folder; {WHAT}")
    found = _folder(path)
    if not found.files:
        endings = f"{', '.join(READABLE)}, each but {PARQUET} also with {', '.join(COMPRESSIONS)}"
        raise DataError(f"{path} holds no file that can be read; known endings: {endings}")
    return found


def _glob(pattern: str) -> Found:
    """List the matches in the order of their paths. Files of unknown endings are read only if the
    pattern spells their ending."""
    matches = sorted(
        (Path(match) for match in glob.glob(pattern, recursive=True)), key=lambda p: p.parts
    )
    if not matches:
        raise DataError(f"{pattern} matches no file; check it, or {WHAT}")
    ending, found = Path(pattern).suffix, Found()
    seen: set[Path] = set()
    named = bool(ending) and not glob.has_magic(ending)
    for path in matches:
        inside = _folder(path) if path.is_dir() else Found()
        if not path.is_dir():
            _sort_in(path, inside, named)
        found.files += [p for p in inside.files if p not in seen]
        seen |= set(inside.files)
        found.left_out += inside.left_out
        found.hidden += inside.hidden
    if not found.files:
        raise DataError(
            f"{pattern} matches no file that can be read; known endings: {', '.join(READABLE)}"
        )
    return found


def _folder(folder: Path) -> Found:
    """List everything in a folder and its subfolders."""
    found = Found()
    if is_saved(folder):
        return Found([folder])

    def refuse(error: OSError) -> None:
        found.left_out.append(LeftOut(str(error.filename), f"cannot be opened ({error.strerror})"))

    for place, folders, files in os.walk(folder, onerror=refuse):
        here = Path(place)
        for name in list(folders):
            path = here / name
            if name.startswith("."):
                found.hidden.append(LeftOut(str(path), "its name starts with a dot"))
            elif path.is_symlink():
                found.left_out.append(
                    LeftOut(str(path), "a link to a folder; name that folder itself")
                )
            elif is_saved(path):
                found.files.append(path)
            else:
                continue
            folders.remove(name)
        for name in files:
            _sort_in(here / name, found)
    found.files.sort(key=lambda p: p.relative_to(folder).parts)
    for group in (found.left_out, found.hidden):
        group.sort(key=lambda out: Path(out.path).parts)
    return found


def _sort_in(path: Path, found: Found, named: bool = False) -> None:
    """Add a file to the list that it belongs to."""
    ending = kind_of(path)
    if path.name.startswith(".") and not named:
        found.hidden.append(LeftOut(str(path), "its name starts with a dot"))
    elif not path.is_file():
        found.left_out.append(LeftOut(str(path), "not a plain file, or a link to nothing"))
    elif ending == PARQUET and is_compressed(path):
        found.left_out.append(LeftOut(str(path), "Parquet in another compression; expand it"))
    elif named or ending in READABLE:
        found.files.append(path)
    else:
        found.left_out.append(
            LeftOut(
                str(path), f"its ending '{ending}' is not known" if ending else "it has no ending"
            )
        )
