"""`bdlm train [RECIPE] [--section.field VALUE ...]`: train a model from a recipe and overrides.

The words after the recipe are fields of `bdlm.training.config.TrainConfig` by their dotted names,
with short names for the common ones. A field that holds a list may be repeated:
`--data a.txt --data b.txt` is `--data "[a.txt, b.txt]"`. The config reads and checks the values.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from bdlm.commands.terminal import program
from bdlm.core.errors import ConfigError, nearest
from bdlm.training.config import TrainConfig, load_config, recipe_names
from bdlm.training.fields import field_docs, type_words
from bdlm.training.recipes import parse_yaml

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
    """What one run of the command asks for.

    recipe: a YAML file, a packaged name, or None. overrides: `field=value`, in order. json: print
    the report as JSON."""

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    json: bool = False


def parse(words: Sequence[str]) -> Options:
    """Read `[RECIPE]`, `--field VALUE`, `--field=VALUE` and `field=VALUE`, in any order."""
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
    return Options(recipes[0] if recipes else None, _collected(given), "--json" in words)


def _collected(overrides: Sequence[str]) -> tuple[str, ...]:
    """Join repeated overrides of a field that holds a list into one, at the first one's place."""
    lists = set(_list_fields(TrainConfig))
    found: dict[str, list[str]] = {}
    for number, override in enumerate(overrides):
        name, _, value = override.partition("=")
        found.setdefault(name if name in lists else f"{number}={name}", []).append(value)
    return tuple(
        f"{key.rpartition('=')[2]}={values[0] if len(values) == 1 else _as_list(key, values)}"
        for key, values in found.items()
    )


def _list_fields(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields that hold lists of any length."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _list_fields(hint, f"{prefix}{name}.")
        elif get_origin(hint) is tuple and get_args(hint)[-1:] == (...,):
            yield f"{prefix}{name}"


def _as_list(name: str, values: Sequence[str]) -> str:
    """Join YAML values, each an item or a list of items, into one YAML list."""
    items: list[Any] = []
    for value in values:
        read = parse_yaml(value, f"--{name}")
        items += read if isinstance(read, list) else [read]
    return json.dumps(items, default=str)


def run(options: Options) -> None:
    """Train, and print where the model is."""
    config = load_config(options.recipe, options.overrides)
    from bdlm.api import train

    result = train(config)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
    elif result.model is None:
        again = shlex.quote(f"{result.folder}/config.json")
        print(
            f"stopped by {result.reason} at step {result.step}; resume with: {program()} train"
            f" {again}"
        )
    else:
        print(f"\n{result.step} steps, {result.tokens:,} tokens; all files are in {result.folder}")
        print(f"  {program()} eval --model {shlex.quote(result.model)} --data FILE")
        print(f"  {program()} generate --model {shlex.quote(result.model)} --prompt 'Once' --live")


def _field(name: str) -> str:
    """Find the field of the config that a flag sets. Raises ConfigError with the nearest name."""
    if name in SHORT:
        return SHORT[name]
    known = {field for field, _, _ in _fields(TrainConfig)}
    path = name.replace("-", "_")
    if path not in known:
        raise ConfigError(f"bdlm train has no option '--{name}'{_hint(path, known)}")
    return path


def _hint(path: str, known: set[str]) -> str:
    """Suggest the nearest flag, by its full name or by its last part."""
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
    """Yield (dotted name, type, default) of every field."""
    for _, fields in _sections(kind, prefix):
        for name, (typed, default, _) in fields.items():
            yield name, typed, default


def _sections(kind: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, tuple[str, Any, str]]]]:
    """Yield (title, {dotted name: (type, default, sentence)}) of each section; the fields outside
    any section come last."""
    hints: dict[str, Any] = get_type_hints(kind)
    docs, loose = field_docs(kind), {}
    for f in dataclasses.fields(kind):
        doc = docs.get(f.name, "")
        if dataclasses.is_dataclass(hints[f.name]):
            for _, fields in _sections(hints[f.name], f"{prefix}{f.name}."):
                yield f"{prefix}{f.name}: {doc}", fields
        else:
            loose[f"{prefix}{f.name}"] = (type_words(hints[f.name]), f.default, doc)
    yield "fields of the whole run", loose


def _help() -> str:
    width = max(map(len, SHORT))
    lines = [
        "usage: bdlm train [RECIPE] [--field VALUE ...] [--json]",
        "",
        (
            "Train a model from a recipe (a YAML file or a packaged name) and overrides. Values are"
            " YAML."
        ),
        "Write a list as [a, b], or repeat the option: --data a.txt --data b.txt.",
        "The recipe RUN/config.json resumes the run in the folder RUN.",
        f"packaged recipes: {', '.join(recipe_names()) or 'none'} (`bdlm recipes` describes them)",
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
    """Write a type the way its values are written: `adamw|muon`, `float or null`."""
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
    """Write a default the way a recipe writes it."""
    return value if isinstance(value, str) else json.dumps(value)
