"""Documents of the Hugging Face `datasets` library: from the hub, or from a saved folder.

In: a dataset's name or folder. Out: documents, one a record. Loads `datasets` only when read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdlm.core.errors import DataError
from bdlm.data.finding import LeftOut, is_saved
from bdlm.data.records import field_of, kept
from bdlm.data.tally import BadRecord, Tally


@dataclass(frozen=True)
class HubSource:
    """Read a dataset of the `datasets` library: `hf:name[:config][:split][:field]`; `stream:` in
    place of `hf:` reads it without a copy.

    An empty part takes its default: no configuration, split "train", the source's field. Empty
    records are left out and counted, but not as bad ones: corpora that were published line by line,
    such as WikiText, have many."""

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
        """Identify the data if the library has it on disk; a stream is identified by its name
        alone."""
        content = "stream" if self.streaming else self._load()._fingerprint
        return f"hf {self.name} {self.config} {self.split} {self.field} {content}"

    def documents(self, tally: Tally | None = None) -> Iterator[str]:
        """Yield the documents, none of them empty. Bad records go to the tally (None: none are
        allowed)."""
        yield from _rows(self._load(), self.field, f"dataset '{self.name}'", tally)


@dataclass(frozen=True)
class SavedSource:
    """Read a folder that `datasets.save_to_disk` wrote: one dataset, or of several splits "train"
    or the only one.

    Empty records are treated as in `HubSource`."""

    path: Path
    field: str = "text"

    def split(self) -> Path:
        """Return the folder of the split that is read. Raises `DataError` if it is not clear
        which."""
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
        """List the splits that are not read."""
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
        """Identify the dataset by the library's own fingerprint and by its files."""
        files = [(p.name, p.stat().st_size) for p in sorted(self.split().iterdir())]
        return f"saved {self._load()._fingerprint} {files} {self.field}"

    def documents(self, tally: Tally | None = None) -> Iterator[str]:
        """Yield the documents, none of them empty. Bad records go to the tally (None: none are
        allowed)."""
        yield from _rows(self._load(), self.field, str(self.split()), tally)


def _rows(data: Any, field: str, where: str, tally: Tally | None) -> Iterator[str]:
    """Yield the texts of a dataset's records."""
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
