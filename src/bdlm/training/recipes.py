"""Recipes: YAML or JSON files of training fields, and those that come with the package.

In: a file or the name of a packaged recipe. Out: plain values, or the recipe's text and its
one-line description. Knows nothing about which fields there are, and loads no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bdlm.core.errors import ConfigError, nearest, shown

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RUN_FILES = ("checkpoints", "metrics.jsonl", ".lock")  # what a run leaves beside its config.json


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The text of a packaged recipe. Raises ConfigError with the nearest name."""
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {shown(name)}{nearest(name, recipe_names())}")
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """What a packaged recipe is for: the first sentence of the comment that it opens with."""
    lines = []
    for line in recipe_text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"(?<=[.])\s", " ".join(lines), maxsplit=1)[0]


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file or a packaged recipe. Raises ConfigError."""
    path = Path(recipe)
    if not _is_file(path):
        if str(recipe) not in recipe_names():
            raise ConfigError(
                f"recipe {shown(str(recipe))} is neither a file nor a known"
                f" recipe{nearest(str(recipe), recipe_names())}"
            )
        path = RECIPES / f"{recipe}.yaml"
    return read_yaml(path, f"recipe '{path}'")


def run_folder(recipe: str | Path) -> Path | None:
    """The run folder whose config.json this is, links followed where need be; None for any other
    recipe."""
    path = Path(recipe)
    if path.name != "config.json" and not path.is_symlink():
        return None
    for file in (path, path.resolve()):
        beside = (file.with_name(name) for name in RUN_FILES)
        if (
            file.name == "config.json"
            and file.is_file()
            and any(other.exists() for other in beside)
        ):
            return file.parent
    return None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. what: how messages name it. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is not UTF-8 text; save it as UTF-8") from None
    values = _json(text) if path.suffix == ".json" else None
    if values is None:
        values = parse_yaml(text, what)
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is not a mapping of fields; write lines such as 'seed: 1'")
    return values


def parse_yaml(text: str, what: str) -> Any:
    """The values in YAML text. what: how messages name it. Raises ConfigError."""
    import yaml

    try:
        return yaml.safe_load(text)
    # beside YAMLError: ValueError, KeyError, ... for values that only look like a date or a number
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what} is not valid YAML: {shown(said, 200)}") from None


def _json(text: str) -> Any:
    """The values in JSON text, read as JSON: YAML takes 1e-08 for text and parts letters beyond 16
    bits. None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        return False
