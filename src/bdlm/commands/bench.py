"""`bdlm bench train|generate`: compare speed and memory with the plain published algorithm.

The measurements are in the repository's folder `benchmarks/`."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bdlm.core.errors import ConfigError, UnsupportedError, nearest


@dataclass(frozen=True)
class Options:
    """Measure this library and the plain form of the published algorithm in turn on this
    machine."""

    what: Positional[Literal["train", "generate"]]
    """What to measure: train (training steps) or generate (sampling)."""
    json: bool = False
    """Print the rows as a JSON list."""


def run(options: Options) -> None:
    """Run the `main` of a benchmark in the repository."""
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    file = folder / f"{options.what}.py"
    if not file.is_file():
        if folder.is_dir():
            raise ConfigError(
                "there is no benchmark"
                f" '{options.what}'{nearest(options.what, [p.stem for p in folder.glob('*.py')])}"
            )
        raise UnsupportedError(
            "the benchmarks are part of the repository, not of the installed package; clone the"
            " repository and run the command there"
        )
    sys.path.insert(0, str(folder.parent))
    module = importlib.import_module(f"benchmarks.{options.what}")
    module.main(json=options.json)
