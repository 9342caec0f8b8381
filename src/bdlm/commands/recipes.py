"""`bdlm recipes [NAME]`: the training recipes that come with the package, or the text of one."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tyro.conf import Positional

from bdlm.training.recipes import parse_yaml, recipe_names, recipe_summary, recipe_text


@dataclass(frozen=True)
class Options:
    """List the recipes that come with the package, or print one, to start a recipe of your own
    from."""

    name: Positional[str | None] = None
    """The recipe to print; without it, all are listed."""
    json: bool = False
    """Print JSON: the list with each recipe's description, or one recipe's fields."""


def run(options: Options) -> None:
    """Print the list, or the recipe as it stands."""
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
