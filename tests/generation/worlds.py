"""Toy distributions enumerated by hand, and the chi-square test against them: shared by the tests
of this folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdlm.models.toy import JointTable

# chance that a correct sampler fails one of these tests, had its seeds been drawn again
FALSE_ALARM = 1e-6


def p_value(counts: Tensor, distribution: Tensor) -> float:
    """Pearson's chi-square test of counts [K] against probabilities [K]; cells that expect less
    than 5 are pooled."""
    expected = distribution.double() * counts.sum()
    rare = expected < 5
    seen, wanted = counts.double()[~rare], expected[~rare]
    if bool(rare.any()):
        seen, wanted = (
            torch.cat((x, y[rare].sum()[None]))
            for x, y in ((seen, counts.double()), (wanted, expected))
        )
    keep = wanted > 0
    assert not bool(seen[~keep].any()), "something impossible was sampled"
    statistic = ((seen - wanted)[keep] ** 2 / wanted[keep]).sum()
    return float(torch.special.gammaincc((keep.sum() - 1) / 2.0, statistic / 2))


def conditional(table: JointTable, known: dict[int, int], place: int) -> Tensor:
    """p(x_place | known tokens), float64 [tokens], by summing the table."""
    p = table.log_joint.exp()
    for at, token in known.items():
        p = p.index_select(at, torch.tensor([token]))
    rest = [d for d in range(table.places) if d != place]
    p = p.sum(rest)
    return p / p.sum()


def text_distribution(table: JointTable, prompt: Sequence[int]) -> dict[tuple[int, ...], float]:
    """The table's own distribution of the texts that begin with the prompt."""
    distribution = {}
    for text in itertools.product(range(table.tokens), repeat=table.places):
        if text[: len(prompt)] == tuple(prompt):
            distribution[text] = float(table.log_joint[text].exp())
    total = sum(distribution.values())
    return {t: p / total for t, p in distribution.items()}


def grid_distribution(
    table: JointTable,
    prompt: Sequence[int],
    blocks: Sequence[Sequence[int]],
    share: Sequence[float],
) -> dict[tuple[int, ...], float]:
    """The distribution of ancestral sampling: each cell of a block falls into step i with
    probability share[i]; the cells of a step are drawn independently given all cells of earlier
    steps and blocks. Enumerated from the table."""
    distribution: dict[tuple[int, ...], float] = {}

    def write(known: dict[int, int], left: list[list[int]], p: float) -> None:
        if not left:
            text = tuple(known[i] for i in range(table.places))
            distribution[text] = distribution.get(text, 0.0) + p
            return
        cells = [c for c in left[0] if c not in known]
        for steps in itertools.product(range(len(share)), repeat=len(cells)):
            odds = p
            for s in steps:
                odds *= share[s]
            fill(known, cells, steps, 0, odds, lambda k, q: write(k, left[1:], q))

    def fill(
        known: dict[int, int],
        cells: list[int],
        steps: tuple[int, ...],
        step: int,
        p: float,
        then: Callable[[dict[int, int], float], None],
    ) -> None:
        if step == len(share):
            then(known, p)
            return
        now = [c for c, s in zip(cells, steps, strict=True) if s == step]
        distributions = [conditional(table, known, c) for c in now]
        for tokens in itertools.product(range(table.tokens), repeat=len(now)):
            odds = p
            for own, token in zip(distributions, tokens, strict=True):
                odds *= float(own[token])
            fill(
                {**known, **dict(zip(now, tokens, strict=True))}, cells, steps, step + 1, odds, then
            )

    write(dict(enumerate(prompt)), [list(b) for b in blocks], 1.0)
    return distribution


def hitting_distribution(
    prompt: Sequence[int],
    blocks: Sequence[Sequence[int]],
    conditional: Callable[[dict[int, int], int], Tensor],
) -> dict[tuple[int, ...], float]:
    """The distribution of first-hitting: each block's cells in a uniformly random order, one at a
    time, by `conditional(known tokens, place)`."""
    distribution: dict[tuple[int, ...], float] = {}

    def write(
        known: dict[int, int], orders: list[list[tuple[int, ...]]], left: tuple[int, ...], p: float
    ) -> None:
        if left:
            for token, q in enumerate(conditional(known, left[0]).tolist()):
                write({**known, left[0]: token}, orders, left[1:], p * q)
        elif orders:
            for order in orders[0]:
                write(known, orders[1:], order, p / len(orders[0]))
        else:
            text = tuple(known[i] for i in sorted(known))
            distribution[text] = distribution.get(text, 0.0) + p

    cells = [[c for c in block if c >= len(prompt)] for block in blocks]
    write(dict(enumerate(prompt)), [list(itertools.permutations(c)) for c in cells if c], (), 1.0)
    return distribution


def counted(
    texts: Sequence[Sequence[int]], distribution: dict[tuple[int, ...], float]
) -> tuple[Tensor, Tensor]:
    """Counts and probabilities over the support of a distribution, in one order."""
    index = {text: i for i, text in enumerate(distribution)}
    counts = torch.zeros(len(distribution), dtype=torch.long)
    for text in texts:
        counts[index[tuple(text)]] += 1
    return counts, torch.tensor(list(distribution.values()), dtype=torch.float64)


def same_distribution(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> float:
    """Two-sample chi-square test that two equally large samples of texts have one distribution;
    kinds seen less than 10 times are pooled."""
    kinds = sorted({tuple(t) for t in (*first, *second)})
    index = {kind: i for i, kind in enumerate(kinds)}
    counts = torch.zeros(2, len(kinds), dtype=torch.float64)
    for side, texts in enumerate((first, second)):
        for text in texts:
            counts[side, index[tuple(text)]] += 1
    rare = counts.sum(0) < 10
    counts = torch.cat((counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)), 1)
    counts = counts[:, counts.sum(0) > 0]
    statistic = ((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum()
    return float(
        torch.special.gammaincc(
            torch.tensor((counts.shape[1] - 1) / 2.0, dtype=torch.float64), statistic / 2
        )
    )
