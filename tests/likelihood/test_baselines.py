"""The n-gram model: normalised in every context, equal to the formulas on a corpus counted by hand,
better than chance; xz."""

from __future__ import annotations

import itertools
import lzma
import math
from collections import Counter, defaultdict

import pytest
import torch

from bdlm.core.errors import ConfigError, DataError
from bdlm.likelihood.baselines import KneserNey, _discounts, xz

# 0..4, uneven
STREAM = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0)).pow(2) // 4


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_every_context_is_normalised(order: int) -> None:
    model = KneserNey.fit(STREAM, 6, order)
    for length in range(order + 1):
        for context in itertools.product(range(6), repeat=min(length, 3)):
            p = model.distribution(list(context))
            assert bool((p > 0).all())
            assert abs(float(p.sum()) - 1) < 1e-12


def by_hand(
    stream: list[int], vocab: int, order: int, context: tuple[int, ...], token: int
) -> float:
    """Interpolated modified Kneser-Ney by dictionaries of tuples: slow and plain."""
    raw = [
        Counter(tuple(stream[i : i + k]) for i in range(len(stream) - k + 1))
        for k in range(1, order + 1)
    ]
    p = 1 / vocab
    for k in range(1, order + 1):
        if k - 1 > len(context):
            break
        counts: dict[tuple[int, ...], int] = dict(raw[k - 1])
        if k < order:
            before = defaultdict(set)
            for gram in raw[k]:
                before[gram[1:]].add(gram[0])
            counts = {g: len(before[g]) for g in raw[k - 1]}
        cut = _discounts(
            torch.tensor([float(c) for c in counts.values()], dtype=torch.float64)
        ).tolist()
        h = context[len(context) - k + 1 :]
        mine = {g: c for g, c in counts.items() if g[:-1] == h}
        total = sum(mine.values())
        if total:
            spare = sum(min(cut[min(c, 3)], c) for c in mine.values())
            c = mine.get((*h, token), 0)
            p = (max(c - cut[min(c, 3)], 0) + spare * p) / total
    return p


def test_equals_the_formulas_counted_by_hand() -> None:
    stream, held_out = STREAM[:200], STREAM[200:240]
    model = KneserNey.fit(stream, 6, 3)
    nats = model.nats(held_out)
    for i in range(len(held_out)):
        context = tuple(held_out[max(0, i - 2) : i].tolist())
        assert float(nats[i]) == pytest.approx(
            -math.log(by_hand(stream.tolist(), 6, 3, context, int(held_out[i]))), abs=1e-12
        )


def test_discounts_are_those_of_chen_and_goodman() -> None:
    count = torch.tensor([1.0] * 8 + [2.0] * 4 + [3.0] * 2 + [4.0])
    y = 8 / 16
    assert _discounts(count).tolist() == pytest.approx(
        [0, 1 - 2 * y * 4 / 8, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2]
    )


def test_longer_context_helps_where_the_text_has_memory() -> None:
    text = torch.tensor([0, 1, 2, 3, 1, 4] * 60)
    short, long = (float(KneserNey.fit(text, 6, n).nats(text).mean()) for n in (1, 3))
    assert long < 0.1 < 1.0 < short


def test_xz_alone_and_after_the_training_text() -> None:
    training, text = bytes(range(256)) * 20, bytes(range(256)) * 4
    report = xz(text, training)
    assert report.alone == pytest.approx(
        8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    )
    assert report.after_training is not None
    assert 0 <= report.after_training < report.alone


def test_bad_input_names_the_fix() -> None:
    with pytest.raises(DataError, match="more than its order"):
        KneserNey.fit(torch.tensor([1, 2]), 5)
    with pytest.raises(DataError, match="outside the vocabulary"):
        KneserNey.fit(torch.arange(9), 5)
    with pytest.raises(ConfigError, match="order is 0"):
        KneserNey.fit(STREAM, 5, 0)
    with pytest.raises(DataError, match="not empty"):
        xz(b"")
