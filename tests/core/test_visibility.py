"""The visibility rule against the paper's mask written out, and its chunked and FlexAttention forms
against the dense one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdlm.core.blockmap import BlockMap, Contiguous, Permuted, make_layout
from bdlm.core.types import CLEAN, NOWHERE, Layout
from bdlm.core.visibility import Cells, Plan, chunked_plan, flex_mask, join, sees
from tests.core.maps import Ragged, Variable

MAPS: dict[str, BlockMap] = {
    "contiguous": Contiguous(4),
    "single": Contiguous(1),
    "one_block": Contiguous(24),
    "ragged": Ragged(3, 4),
    "variable": Variable((2, 5, 1, 3)),
    "permuted": Permuted(tuple((i * 7) % 5 for i in range(24))),
    "alone": Permuted(tuple((i * 7) % 24 for i in range(24)), alone=True),
}


def two_streams(layout: Layout) -> Cells:
    """Noisy cells, then clean ones, as the training pass lays them."""
    noisy = Cells.of(layout)
    return join(
        noisy, Cells(layout.rank, torch.full_like(layout.group, CLEAN), layout.limit, layout.doc)
    )


def documents(rows: int = 3, length: int = 24) -> Tensor:
    """Rows with different documents; the last row is padded."""
    doc = torch.zeros(rows, length, dtype=torch.long)
    doc[1, 9:], doc[2, 5:], doc[2, 13:], doc[2, 20:] = 1, 1, 2, NOWHERE
    return doc


@pytest.mark.parametrize(("length", "size"), ((6, 2), (12, 3), (8, 1), (16, 16)))
def test_rule_is_the_papers_mask(length: int, size: int) -> None:
    """Spec 2.1: block diagonal, offset block causal, block causal; L(L + L') pairs."""
    cells = two_streams(make_layout(Contiguous(size), length))
    visible = sees(cells, cells)[0]
    for q, k in itertools.product(range(2 * length), repeat=2):
        clean_q, clean_k, block_q, block_k = (
            q >= length,
            k >= length,
            q % length // size,
            k % length // size,
        )
        diagonal = block_q == block_k and clean_q == clean_k
        offset = block_q > block_k and not clean_q and clean_k
        causal = block_q >= block_k and clean_q and clean_k
        assert bool(visible[q, k]) == (diagonal or offset or causal), (q, k)
    assert int(visible.sum()) == length * (length + size)


def test_rule_in_words() -> None:
    """The one sentence of the module, cell by cell, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high: torch.randint(low, high, (2, 12), generator=generator)
    cells = Cells(draw(0, 4), draw(-1, 3), draw(0, 4), draw(0, 2))
    visible = sees(cells, cells)
    for r, q, k in itertools.product(range(2), range(12), range(12)):
        rank, group, limit, doc = (
            f[r].tolist() for f in (cells.rank, cells.group, cells.limit, cells.doc)
        )
        if group[k] == CLEAN:
            expected = rank[k] < limit[q] if group[q] != CLEAN else rank[k] <= rank[q]
        else:
            expected = group[k] == group[q]
        assert bool(visible[r, q, k]) == (expected and doc[k] == doc[q])


def written_out(plan: Plan, rows: int, queries: int, keys: int) -> Tensor:
    """The pairs that a plan's calls attend, as a dense mask."""
    dense = torch.zeros(rows, queries, keys, dtype=torch.bool)
    for segment in plan.segments:
        index = torch.cat([torch.arange(a, b) for a, b in segment.runs])
        part = torch.ones(1, segment.stop - segment.start, len(index), dtype=torch.bool)
        if segment.mask is not None:
            part = segment.mask[:, 0] == 0
        dense[:, segment.start : segment.stop, index] = part
    return dense


@pytest.mark.parametrize("context", ("block", "causal"))
@pytest.mark.parametrize("with_documents", (False, True))
@pytest.mark.parametrize("name", MAPS)
def test_split_and_flex_equal_dense(name: str, with_documents: bool, context: str) -> None:
    if context == "causal" and isinstance(MAPS[name], Permuted):
        return  # a causal context needs blocks that are runs
    cells = two_streams(
        make_layout(MAPS[name], 24, documents() if with_documents else None, context)
    )
    dense = sees(cells, cells)
    rows, count = dense.shape[0], len(cells)
    for chunk, breaks in ((7, (24,)), (128, ()), (8, (24,))):
        plan = chunked_plan(cells, cells, chunk=chunk, breaks=breaks)
        assert bool((written_out(plan, rows, count, count) == dense).all())
        assert bool(
            (written_out(plan.truncated(24), rows, count, count)[:, :24] == dense[:, :24]).all()
        )
    b, q, k = torch.meshgrid(
        torch.arange(rows), torch.arange(count), torch.arange(count), indexing="ij"
    )
    assert bool((flex_mask(cells, cells)(b, torch.zeros_like(b), q, k) == dense).all())


def test_split_never_computes_much_more_than_it_must() -> None:
    """Pairs of the chunked form at L = 256, L' = 4: near the quarter that the rule allows, far from
    the dense (2L)^2."""
    cells = two_streams(make_layout(Contiguous(4), 256))
    plan = chunked_plan(cells, cells, chunk=32, breaks=(256,))
    assert plan.pairs < 0.36 * (2 * 256) ** 2


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), length=st.integers(1, 30))
def test_maps_start_where_their_blocks_start(sizes: list[int], length: int) -> None:
    """Any map of runs: `start` of a block is its first position, blocks count up by one."""
    position = torch.arange(length)
    for map in (Contiguous(sizes[0]), Ragged(sizes[0], sizes[-1]), Variable(tuple(sizes))):
        block = map.block(position)
        first = torch.ones(length, dtype=torch.bool)
        first[1:] = block[1:] != block[:-1]
        assert bool((map.start(block)[first] == position[first]).all())
        assert block[0] == 0
        assert bool((block.diff() <= 1).all())
        assert bool((block.diff() >= 0).all())


def test_documents_have_blocks_of_their_own() -> None:
    """No block spans two documents, positions restart, padding is separate: for runs and for
    permuted sets."""
    doc = documents()
    for name in ("contiguous", "permuted", "ragged"):
        layout = make_layout(MAPS[name], 24, doc)
        for r in range(3):
            pairs = {(int(b), int(d)) for b, d in zip(layout.block[r], doc[r], strict=True)}
            assert len(pairs) == len({b for b, _ in pairs})
        assert layout.position[1, 9] == 0
        assert layout.position[2, 13] == 0
        assert layout.position[2, 12] == 7
