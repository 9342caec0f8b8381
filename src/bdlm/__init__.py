"""Block diffusion language models: train, measure, sample.

    import bdlm
    lm = bdlm.load("shakespeare")
    print(lm.generate("MACBETH.", max_new_tokens=200).text)

The names below are the public interface; each is loaded when first used, so importing this package
loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdlm.api import LM as LM
    from bdlm.api import Chunk as Chunk
    from bdlm.api import Generated as Generated
    from bdlm.api import Score as Score
    from bdlm.api import load as load
    from bdlm.api import train as train

_HOMES = {
    "load": "bdlm.api",
    "LM": "bdlm.api",
    "Generated": "bdlm.api",
    "Chunk": "bdlm.api",
    "Score": "bdlm.api",
    "train": "bdlm.api",
    "Denoiser": "bdlm.core.types",
    "ModelSpec": "bdlm.core.types",
    "Step": "bdlm.core.types",
    "Out": "bdlm.core.types",
    "Canvas": "bdlm.core.types",
    "Commit": "bdlm.core.types",
    "BdlmError": "bdlm.core.errors",
    "BdlmWarning": "bdlm.core.errors",
    "ConfigError": "bdlm.core.errors",
    "DataError": "bdlm.core.errors",
    "CheckpointError": "bdlm.core.errors",
    "UnsupportedError": "bdlm.core.errors",
    "TrainingError": "bdlm.core.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """A public name, from its home (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("bdlm")
    if name not in _HOMES:
        from bdlm.core.errors import nearest

        raise AttributeError(f"module 'bdlm' has no attribute '{name}'{nearest(name, __all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
