"""The statistics of a frontier: means with their errors, paired differences with a bound, the
front, and the area under it (AUP).

In: values of each text as [S, P] (S seeds of each of P prompts; NaN where a text is empty). Out:
numbers. Knows nothing about models. Source: arXiv 2604.02718. KL(q || p) = E_q[-log p] - H(q): a
sampler's distance to the judge is its log perplexity less its own entropy, and sampling colder
improves either one alone at no cost. The entropy of the samples' distribution is unknown; the
entropy of each text's own tokens replaces it, so "quality" ranks samplers of one model and is not
itself a distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from bdlm.core.statistics import mean_estimate, t_quantile

LEVEL = 0.95  # of one-sided bounds
LEAST = 4  # prompts from which a bound is given
SLACK = 5.0  # AUP: points whose accuracy is this far below the slowest one's do not count
STEEP = 3.0  # AUP: how fast the weight falls with accuracy


@dataclass(frozen=True)
class MeanWithErrors:
    """A mean over texts. stderr_texts: if other prompts and seeds had been drawn (texts of one
    prompt count as one). stderr_seeds: other seeds, these prompts.

    None where unknown (one prompt, one seed)."""

    mean: float
    stderr_texts: float | None
    stderr_seeds: float | None


@dataclass(frozen=True)
class PairedDifference:
    """Mean of value - reference over the same prompts and seeds, its error over prompts, and the
    one-sided upper 95 % bound.

    None where there are too few prompts."""

    mean: float
    stderr: float | None
    upper: float | None


def mean_of(values: Tensor) -> MeanWithErrors:
    """Compute the mean of values [S, P] with its errors."""
    prompts = _by_prompt(values)
    found = mean_estimate(prompts)
    return MeanWithErrors(found.mean, _known(found.stderr), _over_seeds(values))


def paired(values: Tensor, reference: Tensor) -> PairedDifference:
    """Compare values with a reference, both [S, P] of the same prompts and seeds. Texts of one
    prompt are not independent: the unit is the prompt."""
    found = mean_estimate(_by_prompt(values.double() - reference.double()))
    upper = (
        found.mean + t_quantile(LEVEL, found.count - 1) * found.stderr
        if found.count >= LEAST
        else None
    )
    return PairedDifference(found.mean, _known(found.stderr), upper)


def _by_prompt(values: Tensor) -> Tensor:
    """Average over seeds for each prompt that has any text, [<= P]."""
    means = values.double().nanmean(0)
    return means[~means.isnan()]


def _over_seeds(values: Tensor) -> float | None:
    """Pool the error of the mean from the variance within prompts: every text has its own noise."""
    kept = values.double()[:, ~values.isnan().any(0)]
    if kept.shape[0] < 2 or kept.shape[1] < 1:
        return None
    return math.sqrt(float(kept.var(0).mean()) / kept.numel())


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (speed, quality) that no other one beats: none is as fast
    and better, or as good and faster. Fastest last."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept[::-1]


def at_equal_entropy(
    entropy: float, log_perplexity: float, curve: Sequence[tuple[float, float]]
) -> float | None:
    """Subtract the log perplexity of a reference at the temperature of equal entropy, interpolated
    between two points of its (entropy, log perplexity) curve; None beyond its ends."""
    ordered = sorted(curve)
    for (left, low), (right, high) in pairwise(ordered):
        if left <= entropy <= right and right > left:
            return log_perplexity - (low + (high - low) * (entropy - left) / (right - left))
    return None


def accuracy(excess: float) -> float:
    """Convert excess to the accuracy of AUP, in (0, 100]: 100 exp(-excess), excess in nats per
    judge token over the reference.

    Better than the reference counts as 100. This choice is ours: the published measure uses
    accuracies of tasks."""
    return 100 * math.exp(-max(excess, 0.0))


def aup(points: Sequence[tuple[float, float]], best: float) -> float:
    """Compute accuracy under parallelism (d3LLM): the area of weighted accuracy over tokens per
    forward, flat from 0 to the slowest point.

    points: (tokens per forward, accuracy in %) of one decoder, in any order. best: the greatest
    accuracy of all compared decoders. Each accuracy y is weighted by min(exp(-3 (1 - y / best)),
    1); points more than 5 % below the slowest one's accuracy do not count."""
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - SLACK]
    weighted = [(rho, y * min(math.exp(-STEEP * (1 - y / best)), 1.0)) for rho, y in kept]
    area = weighted[0][0] * weighted[0][1]
    for (low, left), (high, right) in pairwise(weighted):
        area += (high - low) * (left + right) / 2
    return area
