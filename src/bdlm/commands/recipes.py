"""`bdlm recipes [NAME]`: list the packaged training recipes, or print one."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tyro.conf import Positional

from bdlm.training.recipes import parse_yaml, recipe_names, recipe_summary, recipe_text


@dataclass(frozen=True)
class Options:
    """List the packaged training recipes, or print one as a start for your own."""

    name: Positional[str | None] = None
    """Recipe to print; default a list of all recipes."""
    json: bool = False
    """Print JSON: the names with their descriptions, or the fields of one recipe."""


def run(options: Options) -> None:
    """Print the list, or the text of one recipe."""
    if options.name is not None:
        text = recipe_text(options.name)
        print(json.dumps(parse_yaml(text, options.name)) if options.json else text.rstrip("\n"))
        return
    found = {name: recipe_summary(name) for name in recipe_names()}
    if options.json:
        print(json.dumps([{"name": name, "description": about} for name, about in found.items()]))
        return
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {about}" for name, about in found.items()))
