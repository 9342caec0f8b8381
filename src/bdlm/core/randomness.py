"""Counter-based noise: every random number is a hash of what it is for (seed, row, position, draw,
token).

A row's numbers do not depend on its neighbours, on the batch, on the device or on how many were
drawn before; a later call's noise can be foreseen. Uniforms carry 52 bits and Gumbels are float64:
coarser ones act as a lower temperature (arXiv 2409.02908)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = (
    v - (1 << 64) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def purpose(name: str) -> int:
    """A number for a named use of randomness, so that two uses never share noise."""
    return zlib.crc32(name.encode())


def bits(*parts: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """64 hashed bits as int64 for each combination of the parts, which broadcast."""
    if device is None:
        device = next((p.device for p in parts if isinstance(p, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.long, device=device)
    for part in parts:
        value = (
            part
            if isinstance(part, Tensor)
            else torch.tensor(part, dtype=torch.long, device=device)
        )
        state = follow(state, value)
    return state


def follow(state: Tensor, part: Tensor) -> Tensor:
    """`bits(*parts, part)` from `state = bits(*parts)`."""
    return _mix(state * 3 + part * _GOLDEN + _MIX2)


def uniform_of(state: Tensor) -> Tensor:
    """The uniform number that 64 hashed bits stand for, float64 in the open interval (0, 1).

    52 bits and the middle of their interval are 53 bits, all that a float64 holds: with one bit
    more, the greatest would round to 1.
    """
    return (_shift(state, 12).double() + 0.5) * 2.0**-52


class Rarity:
    """How rare the noise of many tokens is, in few passes: 2**63 * x, where x is 1 -
    uniform(*parts, token) cut to 31 bits.

    For the search of the largest among many Gumbel variables: -log x bounds -log(-log(1 - x)) from
    above, and is nearly equal where x is small. Works in memory of its own, so that each answer is
    good until the next call."""

    def __init__(self, tokens: int, rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._last = torch.arange(tokens, device=device) * _GOLDEN + _MIX2
            self._bits, self._shifted = (
                torch.empty(rows, tokens, dtype=torch.long, device=device) for _ in range(2)
            )
            self._out = torch.empty(rows, tokens, dtype=torch.float32, device=device)

    def __call__(self, state: Tensor) -> Tensor:
        """state: int64 [r], `bits(*parts)`. Returns float32 [r, tokens]."""
        z, shifted, out = (t[: len(state)] for t in (self._bits, self._shifted, self._out))
        torch.add(self._last, (state * 3)[:, None], out=z)
        # as `_mix`, whose last step leaves the top 31 bits alone
        for bits_, factor in ((30, _MIX1), (27, _MIX2)):
            torch.bitwise_right_shift(z, bits_, out=shifted)
            z.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits_)) - 1)).mul_(factor)
        torch.bitwise_right_shift(z, 1, out=shifted)
        return out.copy_(shifted.bitwise_not_().bitwise_and_((1 << 63) - (1 << 32)))


def uniform(*parts: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """Uniform in the open interval (0, 1), float64, one for each combination of the parts."""
    return uniform_of(bits(*parts, device=device))


def gumbel(*parts: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """Standard Gumbel noise, float64. `argmax(log p + gumbel)` is a sample of p."""
    return -torch.log(-torch.log(uniform(*parts, device=device)))


def permutation(size: int, *parts: int, device: torch.device | str = "cpu") -> Tensor:
    """A uniformly random permutation of 0..size-1, int64 [size]."""
    index = torch.arange(size, device=device)
    return bits(*parts, purpose("permutation"), index).argsort()
