"""The plain questions about contiguous blocks agree with the map itself."""

from __future__ import annotations

import pytest
import torch

from bdlm.core.blockmap import Contiguous, block_start


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_block_starts_are_those_of_the_contiguous_map(size: int) -> None:
    positions, map = torch.arange(40), Contiguous(size)
    starts = map.start(map.block(positions))
    assert torch.equal(block_start(positions, size), starts)
    assert torch.equal(block_start(positions, torch.full_like(positions, size)), starts)
    assert [block_start(p, size) for p in range(40)] == starts.tolist()


def test_a_row_has_its_own_block_size() -> None:
    assert block_start(torch.tensor([7, 7, 7]), torch.tensor([1, 4, 8])).tolist() == [7, 4, 0]
