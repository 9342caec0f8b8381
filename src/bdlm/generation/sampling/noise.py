"""The noise of each cell: its turn in the order of filling, and other uniforms that a decoder may
use.

A hash of (seed, position, draw), so a row's text does not depend on the other rows, and the order
of a whole block is known before the first forward pass. The Gumbel noise of tokens is in
`sampling.sampler`. Knows nothing about models or decoders.

Shapes: R rows, n cells."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from bdlm.core.randomness import purpose, uniform
from bdlm.generation.sampling.sampler import token_state

_ORDER, _OTHER = purpose("order"), purpose("other")


@dataclass(frozen=True)
class CellNoise:
    """The noise of R rows. seed: int64 [R]. position: int64 [R, n]. draw: int64 [R, n], how often a
    cell was reopened."""

    seed: Tensor
    position: Tensor
    draw: Tensor

    def order(self) -> Tensor:
        """Return the mask probability at which each cell is hit, float64 [R, n], uniform in (0, 1):
        cells are filled from the largest down.

        This is the exact distribution of the forward process run backwards: a cell is masked at
        mask probability p when its number is below p."""
        return self._order

    @cached_property
    def token_state(self) -> Tensor:
        """The state that the Gumbel noise of each cell's tokens is hashed from
        (`sampler.draw_hashed`), int64 [R, n]."""
        return token_state(self.seed[:, None], self.position, self.draw)

    @cached_property
    def _order(self) -> Tensor:
        return uniform(self.seed[:, None], self.position, self.draw, _ORDER)

    def uniform(self, step: Tensor | int, what: int = 0) -> Tensor:
        """Return other uniforms of a decision, float64 [R, n]. step: its number in the block. what:
        distinguishes several uniforms of one decision."""
        return uniform(self.seed[:, None], self.position, step, _OTHER, what)
