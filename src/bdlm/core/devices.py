"""Devices and number types by the names that users write. In: a name. Out: torch's object, or a
`ConfigError` that names the choices."""

from __future__ import annotations

import os

import torch

from bdlm.core.errors import ConfigError


def device_of_name(name: str | torch.device) -> torch.device:
    """ "cpu", "cuda", "cuda:1", or "auto" for the better there is. Raises ConfigError for one that
    cannot be used here."""
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if str(name).startswith("mps"):
        raise ConfigError("device 'mps' has no float64, which the sampler's noise needs; use cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is '{name}'; use cpu, cuda or auto") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].splitlines()[0][:160]
        raise ConfigError(
            f"device '{name}' cannot be used here ({reason}); use cpu, cuda or auto"
        ) from None
    return device


def dtype_of_name(name: str | torch.dtype | None) -> torch.dtype | None:
    """ "float32", "bfloat16", ...; None stays None. Raises ConfigError for what holds no
    fractions."""
    if name is None:
        return None
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is '{name}'; use float32, bfloat16, float16 or float64")
    return found


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has in all; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def check_memory(device: torch.device, needed: int, what: str) -> None:
    """Raise ConfigError if something needs more bytes than the device has in all.

    what: the subject of the message and what to do, as "a text of 7 cells; ask for fewer".
    """
    have = memory_of(device)
    if have is not None and needed > have:
        subject, _, fix = what.partition("; ")
        raise ConfigError(
            f"{subject} needs {needed / 1e9:,.0f} GB, but {device} has {have / 1e9:,.0f}; {fix}"
        )
