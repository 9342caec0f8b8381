"""Records out of open files: JSON lines, JSON arrays, tables and Parquet, one at a time, each with
the text of its field.

In: lines, content or a file. Out: texts; what is wrong with one record goes to a `Tally`, what is
wrong with the whole file is a `DataError`. Every message names the file and the line or record.
Knows nothing about folders or names.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bdlm.core.errors import DataError, nearest, shown
from bdlm.data.compression import RATIO, SLACK, binary_kind
from bdlm.data.tally import BadRecord, EmptyRecord, Tally

BLANKS = re.compile(r"[ \t\r\n]*")
ROWS = 256  # of Parquet, at once
IN_VAIN = (
    ValueError,
    RecursionError,
)  # what `json` says of a record: broken, too deep, or a number of too many digits


def kept(
    texts: Iterable[str | BadRecord], tally: Tally, empty_is_bad: bool = True
) -> Iterator[str]:
    """The texts that can be used; the tally counts all, and stops where too many are bad (empty
    ones among them if they count).
    """
    for text in texts:
        if isinstance(text, BadRecord):
            tally.skip(str(text), empty_is_bad or not isinstance(text, EmptyRecord))
        else:
            tally.records += 1
            yield text


def decoded(content: bytes, path: Path, offset: int = 0, line: int | None = None) -> str:
    """The text of bytes that stand at that offset (and line) of a file. Raises DataError for what
    is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, where = content[error.start], "" if line is None else f" (line {line})"
        kind = binary_kind(content[:1024]) if offset == 0 else None
        if kind:
            raise DataError(f"{path} is not UTF-8 text but looks like {kind}") from error
        raise BadRecord(
            f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}{where};"
            " convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error


def field_of(record: Any, field: str, where: str) -> str:
    """The text in a field of a record. `meta.body` is field body of field meta, unless a field has
    just that name.

    Raises `BadRecord` where it is missing, null, empty, not text, or cannot be written as UTF-8.
    """
    if not isinstance(record, dict):
        raise BadRecord(
            f"{where} is not a JSON object; each record must be one, with the text in field"
            f" '{field}'"
        )
    value: Any = record
    for name in [field] if field in record else field.split("."):
        if not isinstance(value, dict) or name not in value:
            known = [str(key) for key in value] if isinstance(value, dict) else []
            raise BadRecord(f"{where} has no field '{field}'{nearest(name, known)}")
        value = value[name]
    return checked_text(value, f"{where} field '{field}'")


def checked_text(value: Any, where: str) -> str:
    """The value, if it is text that a document can be made of; else `BadRecord`."""
    if value is None:
        raise BadRecord(f"{where} is null")
    if not isinstance(value, str):
        raise BadRecord(
            f"{where} is not text but {type(value).__name__}; name the field that holds the text"
        )
    if not value or value.isspace():
        raise EmptyRecord(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{where} holds a lone surrogate ({shown(value[error.start])}), which is not text;"
            " remove it"
        ) from error
    return value


def parsed(text: str, where: str, what: str = "each line must be one JSON object") -> Any:
    """The value of a JSON text; `BadRecord` if there is none."""
    try:
        return json.loads(text)
    except IN_VAIN as error:
        raise BadRecord(f"{where} is not JSON ({_why(error)}); {what}") from error


def from_lines(
    lines: Iterable[str | BadRecord], field: str, path: Path
) -> Iterator[str | BadRecord]:
    """One JSON object a line; blank lines are not records."""
    for number, line in enumerate(lines, 1):
        if isinstance(line, BadRecord):
            yield line
            continue
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield field_of(parsed(line, where), field, where)
        except BadRecord as error:
            yield error


def from_json(text: str, field: str, path: Path) -> Iterator[str | BadRecord]:
    """The objects of a JSON array, or objects one after the other. What breaks the file's own
    grammar is a `DataError`.
    """
    decoder, seen, line = json.JSONDecoder(), 0, 1
    at = _skip(text, 0)
    array = text[at : at + 1] == "["
    at = _skip(text, at + 1) if array else at
    end = array and text[at : at + 1] == "]"
    while not end and at < len(text):
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path} line {line}"
        try:
            record, at = decoder.raw_decode(text, at)
        except IN_VAIN as error:
            raise DataError(
                f"{where} is not JSON ({_why(error)}), and what follows cannot be read; mend it"
                " there"
            ) from error
        try:
            yield field_of(record, field, where)
        except BadRecord as error:
            yield error
        at = _skip(text, at)
        if array:
            end = _closed(text, at, path)
            at = _skip(text, at + 1)
    if (array and not end) or text[at:]:
        line += text.count("\n", seen, at)
        raise DataError(
            f"{path} line {line} is not JSON: the array"
            f" {'goes on after its end' if end else 'has no end'}; mend the file"
        )


def _closed(text: str, at: int, path: Path) -> bool:
    """Whether the array ends here. Raises `DataError` where neither a comma nor its bracket
    stands."""
    if text[at : at + 1] not in (",", "]"):
        line = 1 + text.count("\n", 0, at)
        raise DataError(
            f"{path} line {line} is not JSON: ',' or ']' is missing in the array; mend the file"
        )
    return text[at] == "]"


def _skip(text: str, at: int) -> int:
    match = BLANKS.match(text, at)
    return match.end() if match else at


def _why(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def from_table(
    lines: Iterable[str], delimiter: str, field: str, path: Path
) -> Iterator[str | BadRecord]:
    """One row a record, in the columns that `field` names; the first row is the header unless they
    are numbers.
    """
    csv.field_size_limit(1 << 30)  # the module's own limit would refuse documents of 128 KiB
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[int] = []
    try:
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if not columns:
                columns = _columns(field, row, where)
                if not _numbered(field):
                    continue
            if row:
                try:
                    yield checked_text(_joined(row, columns, where), where)
                except BadRecord as error:
                    yield error
    except csv.Error as error:
        kind = "CSV" if delimiter == "," else "TSV"
        raise DataError(
            f"{path} line {rows.line_num} is not {kind} ({error}); "
            "put text that holds quotes or line ends in quotes, and double the quotes in it"
        ) from error


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
                f"{where} has no column '{name}'; it has {', '.join(columns)}: give the field as"
                " one of these names, or as a number if the table has no header; '2+3' joins two"
            )
    return found


def _joined(row: list[str], columns: list[int], where: str) -> str:
    if max(columns) >= len(row):
        raise BadRecord(
            f"{where} has {len(row)} columns, too few for column {max(columns) + 1}; check its"
            " quotes and separators"
        )
    return " ".join(row[c] for c in columns)


def from_parquet(path: Path, field: str) -> Iterator[str | BadRecord]:
    """One row a record, in column `field` (`meta.body`: of a struct). Reads some hundred rows at a
    time.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            column = _parquet_column(file, field, path)
            for batch in file.iter_batches(ROWS, columns=[column]):
                values = batch.column(0)
                for i in range(len(values)):
                    number += 1
                    yield _cell(values[i], column, field, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as Parquet ({reason}); check the file") from error


def _parquet_column(file: Any, field: str, path: Path) -> str:
    """The top column that holds the field. Raises `DataError` for an unknown one, and for a file
    that expands too far.
    """
    names, data = file.schema_arrow.names, file.metadata
    top = field if field in names else field.split(".")[0]
    if top not in names:
        raise DataError(f"{path} has no field '{field}'{nearest(field, names)}")
    plain = sum(data.row_group(i).total_byte_size for i in range(data.num_row_groups))
    if plain > SLACK + RATIO * path.stat().st_size:
        raise DataError(
            f"{path} expands more than {RATIO} times, as a compression bomb does; if you trust it,"
            " write it anew as JSONL"
        )
    return top


def _cell(value: Any, column: str, field: str, where: str) -> str | BadRecord:
    try:
        return field_of({column: value.as_py()}, field, where)
    except BadRecord as error:
        return error
    except UnicodeDecodeError as error:
        return BadRecord(
            f"{where} field '{field}' is not UTF-8 ({error.reason} at byte {error.start});"
            " convert it"
        )
