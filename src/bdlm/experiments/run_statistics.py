"""The statistics of reports: values from records, means over runs with their errors, paired
differences, and the smallest detectable difference.

In: records, and the path of a value in them ("test.nats_per_token"). Out: numbers and table cells.
The error of a mean over runs is estimated from their spread. It covers the order of training and
its noise, and the noise of the measurement only where a plan gives each run its own seed for it.
With one seed for all, that noise is common to the runs of one block size: it cancels in their
differences and is missing from the error of a single value. Runs of one seed share their data
order, so differences are taken run by run. Knows nothing about pages."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from bdlm.core.statistics import t_quantile

_SIGN = re.compile(r" ([+-]) ")
# the smallest detectable difference is found with this probability, by a two-sided test at 5 %
POWER = 0.8


def pick(record: dict[str, Any], value_path: str) -> float | None:
    """Return the number at a dotted path of a record's measures ("training." reads the training),
    or a sum of such: "one - other + third".

    None where there is none."""
    first, *rest = _SIGN.split(value_path)
    if rest:
        parts = [
            (sign, pick(record, place))
            for sign, place in zip(["+", *rest[::2]], [first, *rest[1::2]], strict=True)
        ]
        return (
            None
            if any(v is None for _, v in parts)
            else sum(v if sign == "+" else -v for sign, v in parts if v is not None)
        )
    value = _at(
        {
            **record["measures"],
            "training": record.get("training"),
            "seconds": record.get("seconds"),
        },
        value_path.split("."),
    )
    return None if value is None else float(value)


def _at(value: Any, keys: list[str]) -> Any:
    """Return the value under nested keys, which may contain dots: the longest matching name
    wins."""
    if not keys or value is None:
        return value
    if isinstance(value, list):
        return (
            _at(value[int(keys[0])], keys[1:])
            if keys[0].isdigit() and int(keys[0]) < len(value)
            else None
        )
    for count in range(len(keys), 0, -1) if isinstance(value, dict) else ():
        if (name := ".".join(keys[:count])) in value:
            return _at(value[name], keys[count:])
    return None


def collect(records: Sequence[dict[str, Any]], value_path: str) -> list[float]:
    """Collect the value of each record that has it."""
    return [v for r in records if (v := pick(r, value_path)) is not None]


def error(values: Sequence[float]) -> float | None:
    """Compute the standard error of the mean; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def entry(values: Sequence[float], show: str) -> str:
    """Format a cell: mean ± error over runs, plain or as a perplexity (exp of the mean; its error
    by the delta method)."""
    if not values:
        return "-"
    mean, spread = fmean(values), error(values)
    if show == "perplexity":
        mean, spread = (
            math.exp(min(mean, 700.0)),
            (None if spread is None else math.exp(min(mean, 700.0)) * spread),
        )
    return number(mean) + ("" if spread is None else f" ± {number(spread, mean)}")


def number(value: float, reference: float | None = None) -> str:
    """Format four significant digits; an error gets as many places as the value next to it."""
    size = abs(value if reference is None else reference)
    if 0 < size < 1e-4:
        return f"{value:.1e}"
    places = max(0, 3 - math.floor(math.log10(size))) if size > 0 else 3
    return f"{value:,.{min(places, 6)}f}"


@dataclass(frozen=True)
class Row:
    """A label and its records, one for each seed."""

    label: str
    records: list[dict[str, Any]]

    def by_seed(self, value_path: str) -> dict[str, float]:
        """Return the value of each record that has it, by the last part of the run's name ("bd4-s1"
        -> "s1")."""
        return {
            r["run"].rsplit("-", 1)[-1]: v
            for r in self.records
            if (v := pick(r, value_path)) is not None
        }

    def differences(self, other: Row, value_path: str) -> list[float]:
        """Subtract the other row run by run, for the seeds that both have."""
        own, theirs = self.by_seed(value_path), other.by_seed(value_path)
        return [own[seed] - theirs[seed] for seed in own if seed in theirs]

    def less(self, other: Row, value_path: str) -> str:
        """Format a cell: the mean paired difference ± its error, "" for the reference itself."""
        found = self.differences(other, value_path)
        if self is other or not found:
            return "" if self is other else "-"
        spread = error(found)
        return f"{fmean(found):+.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def smallest_detectable(rows: Sequence[Row], reference: Row, columns: dict[str, str]) -> list[str]:
    """Write a sentence for each column with paired differences over several runs: pooled standard
    deviation, power 0.8, two-sided 5 %."""
    sentences = []
    for heading, value_path in columns.items():
        samples = [
            d
            for row in rows
            if row is not reference and len(d := row.differences(reference, value_path)) > 1
        ]
        if not samples:
            continue
        freedom = sum(len(d) - 1 for d in samples)
        pooled = math.sqrt(sum((len(d) - 1) * stdev(d) ** 2 for d in samples) / freedom)
        least = (
            (t_quantile(0.975, freedom) + t_quantile(POWER, freedom))
            * pooled
            / math.sqrt(min(map(len, samples)))
        )
        sentences.append(
            f"Smallest difference in {heading} that these runs could have shown (power {POWER:g},"
            f" two-sided 5 %): {least:.4f}."
        )
    return sentences
