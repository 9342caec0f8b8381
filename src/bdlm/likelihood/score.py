"""The result of an evaluation: nats per token with its standard error and the error's two parts,
perplexity, bits per byte.

In: nats of each unit (document or window) in each replicate. Out: a `Score`, also as plain values
for JSON. Knows nothing about models. Source: ratio estimator of `core.statistics`; arXiv
2503.09573, App. C.4 (protocol)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import public_record
from bdlm.core.statistics import mean_estimate, ratio_estimate


@dataclass(frozen=True)
class PositionScore:
    """Mean nats per token of the scored tokens at positions [first, last] of their text. stderr:
    over units, None if unknown."""

    first: int
    last: int
    nats_per_token: float
    stderr: float | None
    tokens: int


@public_record
@dataclass(frozen=True)
class Score:
    """Likelihood of a text under a model.

    nats_per_token: an upper bound for "nelbo", "nelbo-exact" and (in expectation) "k-orders", exact
    for "nll" and "exact". stderr: of both parts together. stderr_units: from the choice of
    documents or windows, without Monte-Carlo noise. stderr_monte_carlo: from the noise, by
    independent replicates. None where unknown (one unit, one replicate). estimator: what a
    Monte-Carlo method drew, None for the others. bits_per_byte: over the bytes of the scored
    tokens, None without a tokenizer. passes: forward passes of every window, all replicates.
    unit_nats, unit_tokens: of each unit, mean over replicates, for paired comparisons.
    target_stderr: the requested stderr_monte_carlo, None if none was requested. Contains no times,
    so equal seeds give equal scores."""

    nats_per_token: float
    stderr: float | None
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    method: str
    estimator: str | None
    block_size: int
    replicates: int
    stderr_units: float | None
    stderr_monte_carlo: float | None
    unit: str
    units: int
    bytes: int | None
    passes: int
    seed: int
    target_stderr: float | None = None
    positions: tuple[PositionScore, ...] = ()
    unit_nats: tuple[float, ...] = field(default=(), repr=False)
    unit_tokens: tuple[int, ...] = field(default=(), repr=False)

    @property
    def target_reached(self) -> bool | None:
        """Whether the noise is within `target_stderr`; None if none was requested."""
        if self.target_stderr is None:
            return None
        return (
            self.stderr_monte_carlo is not None
            and self.stderr_monte_carlo <= self.target_stderr * (1 + 1e-9)
        )

    @property
    def remark(self) -> str:
        """What the standard error does not cover, and a target that was not reached, in words;
        empty if there is nothing to report."""
        remarks = []
        if self.units <= 1:
            remarks.append(
                f"one {self.unit}: "
                + (
                    "no standard error"
                    if self.stderr is None
                    else "the error is of the noise alone"
                )
            )
        if self.target_reached is False:
            error = (
                "is not known"
                if self.stderr_monte_carlo is None
                else f"is {self.stderr_monte_carlo:.2g}"
            )
            remarks.append(
                f"target_stderr {self.target_stderr:g} was not reached: the error of the noise"
                f" {error} after {self.replicates} draws, the most that were allowed; raise"
                " max_replicates"
            )
        return "; ".join(remarks)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in the order of the command line's contract, without the units, and
        without positions if there are none."""
        values = {
            k: v
            for k, v in asdict(self).items()
            if k not in ("positions", "unit_nats", "unit_tokens")
        }
        values |= {"target_reached": self.target_reached, "remark": self.remark or None}
        return (
            {**values, "positions": [asdict(p) for p in self.positions]}
            if self.positions
            else values
        )

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        bpb = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        how = (
            self.method
            if self.estimator is None
            else f"{self.method}, {self.estimator} x {self.replicates}"
        )
        about = "; ".join(filter(None, (f"{self.tokens} tokens, {how}", self.remark)))
        return (
            f"{self.nats_per_token:.4f}{error} nats per token, perplexity"
            f" {self.perplexity:.3f}{bpb} ({about})"
        )


@dataclass(frozen=True)
class CombinedMean:
    """A ratio of sums with its standard error and the parts of that error."""

    mean: float
    stderr: float | None
    units: float | None
    monte_carlo: float | None
    count: int


def combine(totals: Tensor, counts: Tensor, random: bool = True) -> CombinedMean:
    """Compute the mean of nats / tokens over units and independent replicates. totals: float64 [K,
    U]. counts: scored tokens [U].

    Var(mean) = Var over units of what they would give without noise + Var of the noise. The ratio
    estimator on the replicates' means contains the first part, and the noise as if units were
    independent. Stratified noise is not independent between units, so that share is estimated unit
    by unit and subtracted, and the noise of the mean itself is estimated from the spread of the K
    corpus means."""
    size, (draws, _) = float(counts.double().sum()), totals.shape
    over_units = ratio_estimate(totals.mean(0), counts)
    seen = _known(over_units.stderr)
    if not random:
        return CombinedMean(over_units.mean, seen, seen, 0.0, over_units.count)
    if draws < 2:
        return CombinedMean(over_units.mean, seen, None, None, over_units.count)
    noise = mean_estimate(totals.sum(1) / size).stderr
    inside = float(totals.var(0).sum()) / draws / size**2
    units = None if seen is None else math.sqrt(max(seen**2 - inside, 0.0))
    return CombinedMean(
        over_units.mean, math.hypot(units or 0.0, noise), units, noise, over_units.count
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def by_position(
    nats: Tensor, scored: Tensor, place: Tensor, unit: Tensor, width: int
) -> tuple[PositionScore, ...]:
    """Compute means over runs of `width` positions of the text. nats [N, L] (0 outside scored),
    place and unit int64 [N, L]."""
    bin = (place[scored] // width).long()
    units = int(unit.max()) + 1
    total, count = torch.zeros(2, int(bin.max()) + 1, units, dtype=torch.float64)
    total.index_put_((bin, unit[scored]), nats[scored].double(), accumulate=True)
    count.index_put_(
        (bin, unit[scored]), torch.ones(len(bin), dtype=torch.float64), accumulate=True
    )
    found = []
    for b in range(len(total)):
        if float(count[b].sum()):
            e = ratio_estimate(total[b], count[b])
            found.append(
                PositionScore(
                    b * width, (b + 1) * width - 1, e.mean, _known(e.stderr), int(count[b].sum())
                )
            )
    return tuple(found)
