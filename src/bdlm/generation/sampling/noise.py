"""The noise of a row's text: for every place, its turn in the order, and other uniforms a decoder
may want.

A hash of (seed, position, draw), so a row's text does not depend on its neighbours and a later call
can be foreseen: the order of a whole block is known before the model is called. The Gumbel noise of
tokens is in `logits.draw`. Knows nothing about models or decoders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from bdlm.core.randomness import purpose, uniform
from bdlm.generation.sampling.sampler import token_state

_ORDER, _OTHER = purpose("order"), purpose("other")


@dataclass(frozen=True)
class CellNoise:
    """seed: int64 [R]. position: int64 [R, n]. draw: int64 [R, n], how often a cell has been
    reopened."""

    seed: Tensor
    position: Tensor
    draw: Tensor

    def order(self) -> Tensor:
        """The mask probability at which each cell is hit, float64 [R, n], uniform in (0, 1): cells
        are filled from the largest down.

        The exact distribution of the forward process run backwards: a cell is masked at mask
        probability p when its number is below p."""
        return self._order

    @cached_property
    def token_state(self) -> Tensor:
        """What the Gumbel noise of each cell's tokens is hashed from (`logits.draw_hashed`), int64
        [R, n]."""
        return token_state(self.seed[:, None], self.position, self.draw)

    @cached_property
    def _order(self) -> Tensor:
        return uniform(self.seed[:, None], self.position, self.draw, _ORDER)

    def uniform(self, step: Tensor | int, what: int = 0) -> Tensor:
        """Other uniforms a decoder may want at a step, float64 [R, n]."""
        return uniform(self.seed[:, None], self.position, step, _OTHER, what)
