"""`bdlm train [RECIPE] [--section.field VALUE ...]`: a run from a recipe and overrides.

The words after the recipe are fields of `bdlm.training.config.TrainConfig` by their dotted names,
with short names for the common ones. Reading, checking and nearest names are the config's own work.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from bdlm.commands.terminal import program
from bdlm.core.errors import ConfigError, nearest
from bdlm.training.config import TrainConfig, load_config, recipe_names
from bdlm.training.fields import field_docs

SHORT = {
    "max-minutes": "limits.minutes",
    "max-tokens": "limits.tokens",
    "max-steps": "limits.steps",
    "data": "data.train",
    "valid": "data.valid",
    "block-size": "model.block_size",
    "init-from": "model.init_from",
}


@dataclass(frozen=True)
class Options:
    """recipe: a YAML file or a packaged name, or None. overrides: `field=value`, in order. json:
    print the report as JSON."""

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    json: bool = False


def parse(words: Sequence[str]) -> Options:
    """`[RECIPE] --field VALUE`, `--field=VALUE` or `field=VALUE`, in any order."""
    if {"-h", "--help"} & set(words):
        print(_help())
        sys.exit(0)
    rest, given, recipes = [w for w in words if w != "--json"], [], []
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") and not equals:
            recipes.append(name)
            continue
        if not equals:
            if not rest:
                raise ConfigError(f"{name} needs a value; see `bdlm train --help`")
            value = rest.pop(0)
        given.append(f"{_field(name.removeprefix('--'))}={value}")
    if len(recipes) > 1:
        raise ConfigError(
            f"bdlm train takes one recipe, not {' and '.join(recipes)}; write fields as --field"
            " VALUE"
        )
    return Options(recipes[0] if recipes else None, tuple(given), "--json" in words)


def run(options: Options) -> None:
    """Train, and say where the model is."""
    config = load_config(options.recipe, options.overrides)
    from bdlm.api import train

    result = train(config)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
    elif result.model is None:
        again = shlex.quote(f"{result.folder}/config.json")
        print(
            f"stopped by {result.reason} at step {result.step}; go on with: {program()} train"
            f" {again}"
        )
    else:
        print(f"\n{result.step} steps, {result.tokens:,} tokens; everything is in {result.folder}")
        print(f"  {program()} eval --model {shlex.quote(result.model)} --data FILE")
        print(f"  {program()} generate --model {shlex.quote(result.model)} --prompt 'Once' --live")


def _field(name: str) -> str:
    """The config's field for a flag; an unknown one is an error with the nearest name over all
    fields."""
    if name in SHORT:
        return SHORT[name]
    known = {field for field, _, _ in _fields(TrainConfig)}
    path = name.replace("-", "_")
    if path not in known:
        raise ConfigError(f"bdlm train has no option '--{name}'{_hint(path, known)}")
    return path


def _hint(path: str, known: set[str]) -> str:
    """The nearest flag, by its full name or by its last part."""
    last = {field.rsplit(".", 1)[-1]: field for field in known} | {
        short.replace("-", "_"): short for short in SHORT
    }
    hint = nearest(path, known | set(last))
    if " is now called " in hint:
        old, new = hint.split("'")[1::2]
        return f"; '--{old}' is now called '--{last.get(new, new)}'"
    if not hint.startswith("; did you"):
        return "; see `bdlm train --help`"
    word = hint.split("'")[1]
    return f"; did you mean '--{last.get(word, word)}'?"


def _fields(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, type, default) of every field."""
    for _, fields in _sections(kind, prefix):
        for name, (typed, default, _) in fields.items():
            yield name, typed, default


def _sections(kind: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, tuple[str, Any, str]]]]:
    """(title, {dotted name: (type, default, sentence)}) of each section; the fields outside of any
    come last."""
    hints, docs, loose = get_type_hints(kind), field_docs(kind), {}
    for f in dataclasses.fields(kind):
        doc = docs.get(f.name, "")
        if dataclasses.is_dataclass(hints[f.name]):
            for _, fields in _sections(hints[f.name], f"{prefix}{f.name}."):  # type: ignore[arg-type]
                yield f"{prefix}{f.name}: {doc}", fields
        else:
            loose[f"{prefix}{f.name}"] = (str(f.type), f.default, doc)
    yield "of the whole run", loose


def _help() -> str:
    width = max(map(len, SHORT))
    lines = [
        "usage: bdlm train [RECIPE] [--field VALUE ...] [--json]",
        "",
        (
            "Train a model from a recipe (a YAML file or a packaged name) and overrides; values are"
            " YAML, lists as [a, b]."
        ),
        "RUN/config.json goes on with the run in the folder RUN.",
        f"packaged recipes: {', '.join(recipe_names()) or 'none'} (`bdlm recipes` says what for)",
        "",
        *(f"  --{name:<{width}}  short for --{field}" for name, field in SHORT.items()),
    ]
    for title, fields in _sections(TrainConfig):
        lines += ["", title]
        for name, (kind, default, doc) in fields.items():
            lines.append(f"  --{name}  {_written(kind)}  (default: {_as_yaml(default)})")
            lines += textwrap.wrap(doc, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _written(kind: str) -> str:
    """A type as one writes its values: `adamw|muon`, `float or null`."""
    if kind.startswith("Literal["):
        return (
            kind.removeprefix("Literal[")
            .rstrip("]")
            .replace("'", "")
            .replace('"', "")
            .replace(", ", "|")
        )
    return kind.replace(" | None", " or null")


def _as_yaml(value: Any) -> str:
    """A default as one would write it in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)
