"""Counter-based noise: every random number is a hash of what it is for (seed, row, position, draw, token).

A row's numbers do not depend on its neighbours, on the batch, on the device or on how many were drawn before; a later call's
noise can be foreseen. Uniforms carry 53 bits and Gumbels are float64: coarser ones act as a lower temperature (spec 4.4).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = (v - (1 << 64) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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
        value = part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.long, device=device)
        state = _mix(state * 3 + value * _GOLDEN + _MIX2)
    return state


def uniform(*parts: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """Uniform in the open interval (0, 1), float64, one for each combination of the parts."""
    return (_shift(bits(*parts, device=device), 11).double() + 0.5) * 2.0**-53


def gumbel(*parts: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """Standard Gumbel noise, float64. `argmax(log p + gumbel)` is a sample of p."""
    return -torch.log(-torch.log(uniform(*parts, device=device)))


def permutation(size: int, *parts: int, device: torch.device | str = "cpu") -> Tensor:
    """A uniformly random permutation of 0..size-1, int64 [size]."""
    index = torch.arange(size, device=device)
    return bits(*parts, purpose("permutation"), index).argsort()
