"""Where documents come from: text files, JSONL, CSV and TSV, folders and gzips of these, and datasets of the Hugging Face library.

In: names such as `plays/`, `train.jsonl`, `notes.txt.gz`, `hf:wikitext:wikitext-2-raw-v1:train:text`. Out: documents (strings), in an
order that depends on the names and contents alone. Knows nothing about tokens.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bdlm.core.errors import DataError, nearest

TEXT = (".txt", ".text", ".md")
LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
READABLE = (*TEXT, *LINES, *TABLES)
SPLITS = {"file": None, "line": "\n", "paragraph": "\n\n", "article": "article"}  # how documents are parted within a text file
ARTICLE = re.compile(r"(?<=\n \n)(?= = [^=].* = \n \n)")  # before a heading of the first rank between two blank lines, as WikiText has it


@dataclass(frozen=True)
class FileSource:
    """One file. A text file is one document, or several parted by `separator`; a JSONL file has one a line, in `field`.

    A CSV or TSV file has one a row, in the column `field` of its header, or of that number from 1 if it has none; "title+body" or "2+3"
    joins several by a blank. "article" as separator: WikiText's articles, each with its heading.
    """

    path: Path
    field: str = "text"
    separator: str | None = None

    def fingerprint(self) -> str:
        """Equal only if the documents are equal: content, field and separator."""
        digest = hashlib.sha256()
        with _reading(self.path), open(self.path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        how = self.field if _kind(self.path) in (*LINES, *TABLES) else f"separator {self.separator!r}"
        return f"{_kind(self.path)} {digest.hexdigest()} {how}"

    def documents(self) -> Iterator[str]:
        """The documents, none of them empty. Raises `DataError` naming the file (and line or byte) for whatever is wrong with it."""
        found = False
        for document in self._read():
            if document.strip():
                found = True
                yield document
        if not found:
            raise DataError(f"{self.path} is empty: it holds no text; give a file with at least one document")

    def _read(self) -> Iterator[str]:
        kind = _kind(self.path)
        return self._json() if kind in LINES else self._table(TABLES[kind]) if kind in TABLES else self._text()

    def _text(self) -> Iterator[str]:
        with _reading(self.path), _open(self.path) as file:
            if self.separator == "\n":
                yield from (line.rstrip("\r\n") for line in self._lines(file))
                return
            whole = decoded(file.read(), self.path).removeprefix("\ufeff")
        if self.separator == SPLITS["article"]:
            yield from ARTICLE.split(whole)
        else:
            yield from whole.split(self.separator) if self.separator else [whole]

    def _json(self) -> Iterator[str]:
        with _reading(self.path), _open(self.path) as file:
            for number, line in enumerate(self._lines(file), 1):
                if not line.strip():
                    continue
                where = f"{self.path} line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where} is not JSON ({error}); each line must be one JSON object") from error
                yield _field(record, self.field, where)

    def _table(self, delimiter: str) -> Iterator[str]:
        csv.field_size_limit(1 << 30)  # the module's own limit would refuse documents of 128 KiB
        with _reading(self.path), _open(self.path) as file:
            rows = csv.reader(self._lines(file), delimiter=delimiter, strict=True)
            columns: list[int] = []
            try:
                for row in rows:
                    where = f"{self.path} line {rows.line_num}"
                    if not columns:
                        columns = _columns(self.field, row, where)
                        if not _numbered(self.field):
                            continue
                    if row:
                        yield _joined(row, columns, where)
            except csv.Error as error:
                raise DataError(
                    f"{self.path} line {rows.line_num} is not {_kind(self.path)[1:].upper()} ({error}); "
                    "put text that holds quotes or line ends in quotes, and double the quotes in it"
                ) from error

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        offset = 0
        for line in file:
            text = decoded(line, self.path, offset)
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(line)


@dataclass(frozen=True)
class HubSource:
    """A dataset of the `datasets` library: `hf:name[:config][:split][:field]`; `stream:` in place of `hf:` reads it without a copy.

    An empty part takes its default: no configuration, split "train", the source's field.
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
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"dataset '{self.name}' (config {self.config}, split {self.split}) cannot be loaded: {reason}; the form is "
                f"hf:name[:config][:split][:field]"
            ) from error

    def fingerprint(self) -> str:
        """Of the data where the library has it on disk; of the name alone for a stream."""
        content = "stream" if self.streaming else self._load()._fingerprint
        return f"hf {self.name} {self.config} {self.split} {self.field} {content}"

    def documents(self) -> Iterator[str]:
        for number, record in enumerate(self._load()):
            document = _field(record, self.field, f"dataset '{self.name}' record {number}")
            if document.strip():
                yield document


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

    def documents(self) -> Iterator[str]:
        return iter(self.texts)


Source = FileSource | HubSource | ListSource


def open_sources(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], field: str = "text", split: str = "file"
) -> list[Source]:
    """The sources behind names, in the order given; a folder's files in the order of their paths.

    field: the JSONL key, or column of a table or dataset, that holds the text (tables: `FileSource`). split: how a text file falls into
    documents: "file" (not at all), "line", "paragraph", "article" (of WikiText), or any separator. Raises `DataError` if a file is
    missing or a folder holds none that can be read.
    """
    if split not in SPLITS and split.isalpha() and (hint := nearest(split, SPLITS)).startswith("; did you mean"):
        raise DataError(f"split is '{split}'{hint}")
    separator = SPLITS.get(split, split)
    if separator == "":
        raise DataError(f"split is an empty separator; use {', '.join(SPLITS)}, or the text that parts documents")
    names = [names] if isinstance(names, str | os.PathLike) else names
    sources: list[Source] = []
    for name in [os.fspath(name) for name in names]:
        scheme, colon, rest = name.partition(":")
        if colon and scheme in ("hf", "stream"):
            sources.append(_hub(name, rest, field, streaming=scheme == "stream"))
        else:
            sources.extend(FileSource(path, field, separator) for path in _files(Path(name)))
    if not sources:
        raise DataError("no data is named; give text, JSONL, CSV or TSV files, folders of these, or hf:name[:config][:split][:field]")
    return sources


def documents(sources: Iterable[Source], limit: int | None = None) -> Iterator[str]:
    """All documents, one after the other; at most `limit`."""
    count = 0
    for source in sources:
        for document in source.documents():
            if limit is not None and count >= limit:
                return
            count += 1
            yield document


def _hub(name: str, rest: str, field: str, streaming: bool) -> HubSource:
    parts = rest.split(":")
    if not parts[0] or len(parts) > 4:
        raise DataError(f"'{name}' is not of the form hf:name[:config][:split][:field]")
    dataset, config, split, column = parts + [""] * (4 - len(parts))
    return HubSource(dataset, config or None, split or "train", column or field, streaming)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist; give a file, a folder, or hf:name[:config][:split][:field]")
    inside = [p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    readable = [p for p in inside if _kind(p) in READABLE]
    if not readable:
        raise DataError(f"{path} holds no file that can be read; known endings: {', '.join(READABLE)}, each also with .gz")
    return sorted(readable, key=lambda p: p.relative_to(path).parts)


def _kind(path: Path) -> str:
    """The ending that says how to read the file, `.gz` left aside."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


class _reading:
    """Turns what the system says about a file into one line with its name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | EOFError | zlib.error):
            raise DataError(f"{self.path} cannot be read ({error}); check the file") from error


def decoded(content: bytes, path: Path, offset: int = 0) -> str:
    """The text of bytes that stand at that offset of a file. Raises DataError for what is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DataError(
            f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}; convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object; each line must be one, with the text in field '{field}'")
    if field not in record:
        raise DataError(f"{where} has no field '{field}'{nearest(field, map(str, record))}")
    if not isinstance(record[field], str):
        raise DataError(f"{where} field '{field}' is not text but {type(record[field]).__name__}; name the field that holds the text")
    return record[field]


def _numbered(field: str) -> bool:
    """Whether columns are named by number, so that the table has no header."""
    return all(name.isdecimal() for name in field.split("+"))


def _columns(field: str, first: list[str], where: str) -> list[int]:
    """Which columns, from 0, a field names in a table whose first row is `first`."""
    found = []
    for name in field.split("+"):
        if _numbered(field) and 1 <= int(name) <= len(first):
            found.append(int(name) - 1)
        elif name in first and not _numbered(field):
            found.append(first.index(name))
        else:
            columns = [f"{number} ({title[:24]})" for number, title in enumerate(first, 1)]
            raise DataError(
                f"{where} has no column '{name}'; it has {', '.join(columns)}: give the field as one of these names, or as a number if the "
                "table has no header; '2+3' joins two"
            )
    return found


def _joined(row: list[str], columns: list[int], where: str) -> str:
    if max(columns) >= len(row):
        raise DataError(f"{where} has {len(row)} columns, too few for column {max(columns) + 1}; check its quotes and separators")
    return " ".join(row[c] for c in columns)
