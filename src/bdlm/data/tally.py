"""Counts the records of some data and those left out, and stops where too many are bad.

In: one call a record. Out: counts, the first reasons, and a `DataError` beyond the limit. Knows
nothing about files.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from bdlm.core.errors import BdlmWarning, ConfigError, DataError

BAD_RECORDS = 0.01  # share of the records that may be bad, unless the user says otherwise
SHOWN = 5  # reasons that are kept
# a share is taken of at least so many records while reading, so that one early fault does not stop
# it
EARLY = 1000


class BadRecord(DataError):
    """One record that cannot be used, while the rest of its file can. The message names file and
    line.
    """


class EmptyRecord(BadRecord):
    """A record whose text is empty."""


def check_bad_records(allowed: float, name: str = "bad_records") -> None:
    """Raise `ConfigError` unless it is a share in [0, 1) or a whole number of records."""
    if not (0 <= allowed < math.inf and (allowed < 1 or allowed == int(allowed))):
        raise ConfigError(
            f"{name} is {allowed}; use a share of the records from 0 to below 1, or a whole number"
            " of records"
        )


@dataclass
class Tally:
    """How many records were read (`records`) and left out (`skipped`), and the first reasons
    (`reasons`).

    allowed: below 1 a share of the records that may be bad, else how many. At the end a share is
    one of what was read; before, and where reading stopped at a limit (`whole` False), of at least
    `EARLY` records. bad: those of `skipped` that the limit is about.
    """

    allowed: float = BAD_RECORDS
    records: int = 0
    skipped: int = 0
    bad: int = 0
    whole: bool = True
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_bad_records(self.allowed)

    def skip(self, reason: str, bad: bool = True) -> None:
        """Leave a record out. Raises `DataError` with the first reason where more are bad than
        allowed.
        """
        self.records += 1
        self.skipped += 1
        if bad and self.bad == 0:
            self.reasons.insert(0, reason)  # the one that an error names
        elif len(self.reasons) < SHOWN:
            self.reasons.append(reason)
        self.bad += bad
        self._check(max(self.records, EARLY))

    def finish(self, whole: bool = True) -> None:
        """Reading has ended; `whole`: at the end of the data. Raises `DataError` beyond the limit;
        warns of what was left out.
        """
        self.whole = whole
        self.check()
        if self.skipped:
            warnings.warn(
                f"{self.skipped:,} of {self.records:,} records are left out (bad_records allows "
                f"{_spelt(self.allowed)} to be bad): {'; '.join(self.reasons[:SHOWN])}"
                + ("; ..." if self.skipped > len(self.reasons) else ""),
                BdlmWarning,
                stacklevel=2,
            )

    def check(self) -> None:
        """Raise `DataError` with the first reason where more are bad than allowed of what was
        read."""
        self._check(self.records if self.whole else max(self.records, EARLY))

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON-able values."""
        return {
            name: getattr(self, name) for name in ("records", "skipped", "bad", "whole", "reasons")
        }

    @classmethod
    def of(cls, counts: dict[str, Any]) -> Tally:
        """The counts that `to_dict` gave."""
        return cls(**counts)

    def again(self, earlier: Tally) -> None:
        """Take over the counts of an earlier reading of the same data, and judge them by this
        limit.
        """
        for name, value in earlier.to_dict().items():
            setattr(self, name, value)
        self.finish(self.whole)

    def _check(self, of: int) -> None:
        most = self.allowed * of if self.allowed < 1 else self.allowed
        if self.bad > most:
            raise DataError(
                f"{self.reasons[0]} ({self.bad:,} of {self.records:,} records are bad; bad_records"
                f" allows {_spelt(self.allowed)}: mend the data, or raise it)"
            )


def _spelt(allowed: float) -> str:
    return f"{allowed:.3g} of them" if 0 < allowed < 1 else f"{int(allowed):,}"
