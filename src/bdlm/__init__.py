"""Block diffusion language models: train, measure, sample.

    import bdlm
    lm = bdlm.load("shakespeare")
    print(lm.generate("MACBETH.", max_new_tokens=200).text)

The names in `__all__` are the public interface; docs/public-api.md says what is promised about
them. Each is loaded when first used, so importing this package loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bdlm.core.removed_names import answer_imports

if TYPE_CHECKING:
    from bdlm.api import LM as LM
    from bdlm.api import load as load
    from bdlm.api import train as train
    from bdlm.core.errors import BdlmError as BdlmError
    from bdlm.core.errors import BdlmWarning as BdlmWarning
    from bdlm.core.errors import CheckpointError as CheckpointError
    from bdlm.core.errors import ConfigError as ConfigError
    from bdlm.core.errors import DataError as DataError
    from bdlm.core.errors import DecoderError as DecoderError
    from bdlm.core.errors import TrainingError as TrainingError
    from bdlm.core.errors import UnsupportedError as UnsupportedError
    from bdlm.core.schedules import SCHEDULES as SCHEDULES
    from bdlm.core.schedules import Schedule as Schedule
    from bdlm.core.types import Cache as Cache
    from bdlm.core.types import Canvas as Canvas
    from bdlm.core.types import Commit as Commit
    from bdlm.core.types import Denoiser as Denoiser
    from bdlm.core.types import Layout as Layout
    from bdlm.core.types import ModelSpec as ModelSpec
    from bdlm.core.types import Out as Out
    from bdlm.core.types import Step as Step
    from bdlm.generation.decoders import DECODERS as DECODERS
    from bdlm.generation.decoders.base import Decoder as Decoder
    from bdlm.generation.decoders.base import View as View
    from bdlm.generation.engine.engine import Engine as Engine
    from bdlm.generation.engine.request import Event as Event
    from bdlm.generation.full_sequence.approximate_cache import CACHES as CACHES
    from bdlm.generation.sampling_params import RequestOutput as RequestOutput
    from bdlm.generation.sampling_params import SamplingParams as SamplingParams
    from bdlm.generation.text_generation import Chunk as Chunk
    from bdlm.generation.text_generation import Streamer as Streamer
    from bdlm.likelihood.score import Score as Score
    from bdlm.training.config import TrainConfig as TrainConfig
    from bdlm.training.config import load_config as load_config

    __version__: str

# the module of each name; tests hold this and the imports above equal
_MODULES = {
    "api": "LM load train",
    "core.errors": (
        "BdlmError BdlmWarning CheckpointError ConfigError DataError DecoderError TrainingError"
        " UnsupportedError"
    ),
    "core.schedules": "SCHEDULES Schedule",
    "core.types": "Cache Canvas Commit Denoiser Layout ModelSpec Out Step",
    "generation.decoders": "DECODERS",
    "generation.decoders.base": "Decoder View",
    "generation.engine.engine": "Engine",
    "generation.engine.request": "Event",
    "generation.full_sequence.approximate_cache": "CACHES",
    "generation.sampling_params": "RequestOutput SamplingParams",
    "generation.text_generation": "Chunk Streamer",
    "likelihood.score": "Score",
    "training.config": "TrainConfig load_config",
}
_HOMES = {name: f"bdlm.{home}" for home, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_HOMES)

answer_imports()


if not TYPE_CHECKING:  # for a type checker a name that is not imported above does not exist

    def __getattr__(name: str) -> Any:
        """Load a public name from its module (PEP 562)."""
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
