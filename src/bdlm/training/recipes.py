"""Recipes: YAML or JSON files of training fields, and the recipes that come with the package.

In: a file or the name of a packaged recipe. Out: plain values, or the recipe's text and its
one-line description. Knows nothing about which fields exist, and loads no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bdlm.core.errors import ConfigError, nearest, shown

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RUN_FILES = ("checkpoints", "metrics.jsonl", ".lock")  # what a run leaves next to its config.json


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """Return the text of a packaged recipe. Raises ConfigError with the nearest name."""
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {shown(name)}{nearest(name, recipe_names())}")
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """Return the purpose of a packaged recipe: the first sentence of its opening comment."""
    lines = []
    for line in recipe_text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"(?<=[.])\s", " ".join(lines), maxsplit=1)[0]


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML or JSON file or a packaged recipe. Raises ConfigError."""
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
    """Return the run folder whose config.json this is, through links if needed; None for any other
    recipe."""
    path = Path(recipe)
    if path.name != "config.json" and not path.is_symlink():
        return None
    for file in (path, path.resolve()):
        others = (file.with_name(name) for name in RUN_FILES)
        if (
            file.name == "config.json"
            and file.is_file()
            and any(other.exists() for other in others)
        ):
            return file.parent
    return None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read the mapping in a YAML or JSON file. what: its name in messages. Raises ConfigError."""
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
    """Parse YAML text. what: its name in messages. Raises ConfigError."""
    import yaml

    try:
        return yaml.safe_load(text)
    # YAMLError, but also ValueError, KeyError, ... for values that resemble a date or a number
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what} is not valid YAML: {shown(reason, 200)}") from None


def _json(text: str) -> Any:
    """Parse JSON text as JSON: YAML reads 1e-08 as text and splits letters beyond 16 bits. None if
    it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        return False
