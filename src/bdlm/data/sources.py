"""Where documents come from: text, JSONL, JSON, CSV, TSV and Parquet files, folders, globs, and
datasets of the Hugging Face library.

In: names such as `plays/`, `~/train.jsonl.zst`, `parts/*.parquet`,
`hf:wikitext:wikitext-2-raw-v1:train:text`. Out: documents (strings), in an order that depends on
the names and contents alone. Knows nothing about tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bdlm.core.errors import BdlmWarning, DataError, nearest
from bdlm.data.compression import Reading, is_compressed, open_plain
from bdlm.data.finding import JSON, LINES, PARQUET, TABLES, WHAT, LeftOut, find, is_saved, kind_of
from bdlm.data.records import (
    decoded,
    field_of,
    from_json,
    from_lines,
    from_parquet,
    from_table,
    kept,
)
from bdlm.data.tally import BadRecord, Tally

__all__ = [
    "FileSource",
    "HubSource",
    "ListSource",
    "SavedSource",
    "Source",
    "decoded",
    "documents",
    "find_sources",
    "open_sources",
]

# how documents are parted within a text file
SPLITS = {"file": None, "line": "\n", "paragraph": "\n\n", "article": "article"}
PARAGRAPH = re.compile(r"\r?\n\r?\n")  # an empty line, of Unix and of Windows
# Before a heading of the first rank between two blank lines, as WikiText has it.
ARTICLE = re.compile(r"(?:(?<=\n \n)|(?<=\n \r\n))(?= = [^=].* = \r?\n \r?\n)")


@dataclass(frozen=True)
class FileSource:
    """One file. A text file is one document, or several parted by `separator`; a JSONL file has one
    a line, in `field`.

    A JSON file holds an array of objects (or objects one after the other), a Parquet file rows,
    with the text in `field` ("meta.body": in field body of field meta). A CSV or TSV file has one a
    row, in the column `field` of its header, or of that number from 1 if it has none; "title+body"
    or "2+3" joins several by a blank. "article" as separator: WikiText's articles, each with its
    heading.
    """

    path: Path
    field: str = "text"
    separator: str | None = None

    def fingerprint(self) -> str:
        """Equal only if the documents are equal: content, field and separator."""
        digest = hashlib.sha256()
        with Reading(self.path), open(self.path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        kind = kind_of(self.path)
        how = (
            self.field
            if kind in (*LINES, JSON, PARQUET, *TABLES)
            else f"separator {self.separator!r}"
        )
        return f"{kind} {digest.hexdigest()} {how}"

    def documents(self, tally: Tally | None = None) -> Iterator[str]:
        """The documents, none of them empty. Bad records go to the tally (None: none are allowed).

        Raises `DataError` naming the file (and line or byte) for whatever is wrong with it.
        """
        tally = Tally(0) if tally is None else tally
        found, before = False, tally.skipped
        for document in kept(self._read(), tally):
            found = True
            yield document
        if not found:
            tally.check()
            none = (
                f" ({tally.skipped - before:,} records are left out)"
                if tally.skipped > before
                else ""
            )
            raise DataError(
                f"{self.path} is empty: it holds no text{none}; give a file with at least one"
                " document"
            )

    def _read(self) -> Iterator[str | BadRecord]:
        kind = kind_of(self.path)
        if kind == PARQUET:
            if is_compressed(self.path):
                raise DataError(
                    f"{self.path} is Parquet in another compression; expand it, since Parquet is"
                    " compressed by itself"
                )
            yield from from_parquet(self.path, self.field)
            return
        with Reading(self.path), open_plain(self.path) as file:
            if kind in LINES:
                yield from from_lines(self._lines(file), self.field, self.path)
            elif kind == JSON:
                yield from self._json(file)
            elif kind in TABLES:
                yield from from_table(
                    map(_strict, self._lines(file)), TABLES[kind], self.field, self.path
                )
            else:
                yield from self._text(file)

    def _text(self, file: IO[bytes]) -> Iterator[str | BadRecord]:
        """Parts of blanks alone are not documents, nor records."""
        if self.separator == "\n":
            lines = (line.rstrip("\r\n") for line in map(_strict, self._lines(file)))
            yield from (line for line in lines if line and not line.isspace())
            return
        whole = decoded(file.read(), self.path).removeprefix("\ufeff")
        if self.separator == SPLITS["article"]:
            parts = ARTICLE.split(whole)
        elif self.separator == SPLITS["paragraph"]:
            parts = PARAGRAPH.split(whole)
        else:
            parts = whole.split(self.separator) if self.separator else [whole]
        yield from (part for part in parts if part and not part.isspace())

    def _json(self, file: IO[bytes]) -> Iterator[str | BadRecord]:
        if self._holds_lines():
            yield from from_lines(self._lines(file), self.field, self.path)
        else:
            yield from from_json(
                decoded(file.read(), self.path).removeprefix("\ufeff"), self.field, self.path
            )

    def _holds_lines(self) -> bool:
        """Whether a JSON file's first line is an object by itself: JSON lines under another
        name."""
        with open_plain(self.path) as file:
            while (line := file.readline(1 << 16)) and not line.strip(b"\xef\xbb\xbf \t\r\n"):
                pass
            if not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
                return False
            line += b"" if line.endswith(b"\n") else file.readline()
        try:
            return isinstance(json.loads(line.decode("utf-8-sig")), dict)
        except (ValueError, RecursionError):
            return False

    def _lines(self, file: IO[bytes]) -> Iterator[str | BadRecord]:
        offset = 0
        for number, line in enumerate(file, 1):
            try:
                text = decoded(line, self.path, offset, number)
                yield text.removeprefix("\ufeff") if offset == 0 else text
            except BadRecord as error:
                yield error
            offset += len(line)


def _strict(line: str | BadRecord) -> str:
    """The line, where the whole file depends on it."""
    if isinstance(line, BadRecord):
        raise line
    return line


@dataclass(frozen=True)
class HubSource:
    """A dataset of the `datasets` library: `hf:name[:config][:split][:field]`; `stream:` in place
    of `hf:` reads it without a copy.

    An empty part takes its default: no configuration, split "train", the source's field. Empty
    records are left out and counted, but not held against the limit of bad ones: corpora that were
    published line by line, such as WikiText, have many.
    """

    name: str
    config: str | None
    split: str
    field: str
    streaming: bool = False

    def _load(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.name, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:
            raise DataError(
                f"dataset '{self.name}' (config {self.config}, split {self.split}) cannot be"
                f" loaded: {_reason(error)}; the form is hf:name[:config][:split][:field]"
            ) from error

    def fingerprint(self) -> str:
        """Of the data where the library has it on disk; of the name alone for a stream."""
        content = "stream" if self.streaming else self._load()._fingerprint
        return f"hf {self.name} {self.config} {self.split} {self.field} {content}"

    def documents(self, tally: Tally | None = None) -> Iterator[str]:
        """The documents, none of them empty. Bad records go to the tally (None: none are
        allowed)."""
        yield from _rows(self._load(), self.field, f"dataset '{self.name}'", tally)


@dataclass(frozen=True)
class SavedSource:
    """A folder that `datasets.save_to_disk` wrote: one dataset, or of several splits "train" or the
    only one.

    Empty records are treated as in `HubSource`.
    """

    path: Path
    field: str = "text"

    def split(self) -> Path:
        """The folder of the split that is read. Raises `DataError` if it is not clear which."""
        names = self._splits()
        if not names:
            return self.path
        if "train" not in names and len(names) > 1:
            raise DataError(
                f"{self.path} has the splits {', '.join(names)}; name the folder of one, such as"
                f" {self.path / names[0]}"
            )
        return self.path / ("train" if "train" in names else names[0])

    def left_out(self) -> list[LeftOut]:
        """The splits that are not read."""
        rest = [self.path / name for name in self._splits() if self.path / name != self.split()]
        return [
            LeftOut(str(path), "another split of the dataset; name its folder to read it")
            for path in rest
        ]

    def _splits(self) -> list[str]:
        return (
            sorted(p.name for p in self.path.iterdir() if p.is_dir() and is_saved(p))
            if self.path.is_dir()
            else []
        )

    def _load(self) -> Any:
        from datasets import load_from_disk

        try:
            return load_from_disk(str(self.split()))
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.path} cannot be read as a saved dataset ({_reason(error)}); save it again"
            ) from error

    def fingerprint(self) -> str:
        """Of the dataset, as the library keeps it, and of its files."""
        files = [(p.name, p.stat().st_size) for p in sorted(self.split().iterdir())]
        return f"saved {self._load()._fingerprint} {files} {self.field}"

    def documents(self, tally: Tally | None = None) -> Iterator[str]:
        """The documents, none of them empty. Bad records go to the tally (None: none are
        allowed)."""
        yield from _rows(self._load(), self.field, str(self.split()), tally)


def _rows(data: Any, field: str, where: str, tally: Tally | None) -> Iterator[str]:
    """The texts of a dataset's records."""
    tally, found = Tally(0) if tally is None else tally, False

    def texts() -> Iterator[str | BadRecord]:
        records, number = iter(data), 0
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(
                    f"{where} cannot be read at record {number} ({_reason(error)}); check the"
                    " dataset"
                ) from error
            try:
                yield field_of(record, field, f"{where} record {number}")
            except BadRecord as error:
                yield error
            number += 1

    for text in kept(texts(), tally, empty_is_bad=False):
        found = True
        yield text
    if not found:
        tally.check()
        raise DataError(f"{where} is empty: it holds no text in field '{field}'; name another")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class ListSource:
    """Documents that are already in memory."""

    texts: tuple[str, ...]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(content)} ".encode() + content)
        return f"list {digest.hexdigest()}"

    def documents(self, tally: Tally | None = None) -> Iterator[str]:
        for text in self.texts:
            if tally is not None:
                tally.records += 1
            yield text


Source = FileSource | HubSource | SavedSource | ListSource


@dataclass(frozen=True)
class Found:
    """sources: what is read, in order. left_out: files of named folders that are not. hidden: those
    that start with a dot.
    """

    sources: list[Source]
    left_out: list[LeftOut]
    hidden: list[LeftOut]


def open_sources(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    field: str = "text",
    split: str = "file",
) -> list[Source]:
    """The sources behind names, in the order given; a folder's files in the order of their paths.
    Warns of what it leaves out.

    names: files, folders, globs (`parts/*.jsonl`), `~/...`, folders of `datasets.save_to_disk`,
    `hf:name...`. field: the JSON key ("meta.body": nested), or column of a table or dataset, that
    holds the text (tables: `FileSource`). split: how a text file falls into documents: "file" (not
    at all), "line", "paragraph", "article" (of WikiText), or any separator. Raises `DataError` if a
    file is missing or a folder holds none that can be read.
    """
    return find_sources(names, field, split).sources


def find_sources(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    field: str = "text",
    split: str = "file",
) -> Found:
    """`open_sources`, and what is left out."""
    if (
        split not in SPLITS
        and split.isalpha()
        and (hint := nearest(split, SPLITS)).startswith("; did you mean")
    ):
        raise DataError(f"split is '{split}'{hint}")
    separator = SPLITS.get(split, split)
    if separator == "":
        raise DataError(
            f"split is an empty separator; use {', '.join(SPLITS)}, or the text that parts"
            " documents"
        )
    names = [names] if isinstance(names, str | os.PathLike) else names
    found = Found([], [], [])
    for name in [os.fspath(name) for name in names]:
        scheme, colon, rest = name.partition(":")
        if colon and scheme in ("hf", "stream"):
            found.sources.append(_hub(name, rest, field, streaming=scheme == "stream"))
        else:
            _add(found, name, field, separator)
    if not found.sources:
        raise DataError(f"no data is named; {WHAT}")
    if found.left_out:
        shown = "; ".join(f"{out.path}: {out.why}" for out in found.left_out[:5])
        more = f"; and {len(found.left_out) - 5:,} more" if len(found.left_out) > 5 else ""
        warnings.warn(f"left out of the data: {shown}{more}", BdlmWarning, stacklevel=2)
    return found


def _add(found: Found, name: str, field: str, separator: str | None) -> None:
    """The sources of one name, and what it leaves out."""
    place = find(name)
    for path in place.files:
        if not path.is_dir():
            found.sources.append(FileSource(path, field, separator))
            continue
        saved = SavedSource(path, field)
        found.sources.append(saved)
        found.left_out.extend(saved.left_out())
    found.left_out.extend(place.left_out)
    found.hidden.extend(place.hidden)


def documents(
    sources: Iterable[Source], limit: int | None = None, tally: Tally | None = None
) -> Iterator[str]:
    """All documents, one after the other; at most `limit`. Bad records are left out as far as the
    tally allows, with a warning.
    """
    tally, count = Tally() if tally is None else tally, 0
    for source in sources:
        for document in source.documents(tally):
            if limit is not None and count >= limit:
                tally.records -= 1
                tally.finish(whole=False)
                return
            count += 1
            yield document
    tally.finish()


def _hub(name: str, rest: str, field: str, streaming: bool) -> HubSource:
    parts = rest.split(":")
    if not parts[0] or len(parts) > 4:
        raise DataError(f"'{name}' is not of the form hf:name[:config][:split][:field]")
    dataset, config, split, column = parts + [""] * (4 - len(parts))
    return HubSource(dataset, config or None, split or "train", column or field, streaming)
