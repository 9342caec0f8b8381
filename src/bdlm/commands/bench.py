"""`bdlm bench train|generate`: speed and memory beside the plain published algorithm. The
measurements live in `benchmarks/`."""

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
    """Measure this library beside the plain form of the published algorithm, side by side on this
    machine."""

    what: Positional[Literal["train", "generate"]]
    """What to measure."""
    json: bool = False
    """Print a JSON list of rows."""


def run(options: Options) -> None:
    """Run the benchmark's own `main`."""
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    file = folder / f"{options.what}.py"
    if not file.is_file():
        if folder.is_dir():
            raise ConfigError(
                "there is no benchmark"
                f" '{options.what}'{nearest(options.what, [p.stem for p in folder.glob('*.py')])}"
            )
        raise UnsupportedError(
            "the benchmarks come with the project's repository, not with the package; clone it and"
            " run there"
        )
    sys.path.insert(0, str(folder.parent))
    module = importlib.import_module(f"benchmarks.{options.what}")
    module.main(json=options.json)
