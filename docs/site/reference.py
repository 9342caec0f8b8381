"""The pages of the reference, made from the package itself: nothing of it is written by hand.

`pages()` returns them as Markdown by path. Every name of `bdlm.__all__` has the anchor `bdlm.NAME`,
every field of a training config the anchor `config.SECTION.FIELD`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

import yaml

import bdlm
from bdlm import cli
from bdlm.core.schedules import SCHEDULES
from bdlm.generation.decoders import DECODERS
from bdlm.training.config import TrainConfig, recipe_names
from docs.site.docstrings import document, fields_of, first_line, prose, signature, table

GROUPS = {  # page -> (title, modules where its names are defined)
    "api": ("Load, write, score, train", ("bdlm.api", "bdlm.likelihood")),
    "generation": ("Requests, engine and decoders", ("bdlm.generation",)),
    "training": ("Training configs", ("bdlm.training",)),
    "model": ("The contract of a model", ("bdlm.core.types", "bdlm.core.schedules", "bdlm.models")),
    "errors": ("Errors and warnings", ("bdlm.core.errors",)),
}
NAME = re.compile(r"(?<!\[)`bdlm\.(\w+)`")
OTHERS = "model"  # the page of a name from any other module


def pages() -> dict[str, str]:
    """Path below the site's root -> Markdown, of every page of the reference."""
    found = {f"reference/{page}.md": _group(page) for page in GROUPS}
    found["reference/commands.md"] = _commands()
    found["reference/config.md"] = _config()
    found["reference/decoders.md"] = _decoders()
    found["reference/schedules.md"] = _schedules()
    found["reference/recipes.md"] = _recipes()
    return {path: link_names(text) for path, text in found.items()}


def link_names(text: str) -> str:
    """The page with its public names as links to their entries, except in headings and code."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        if name not in bdlm.__all__:
            return match[0]
        return f"[`bdlm.{name}`]({page_of(name)}.md#bdlm.{name})"

    parts = re.split(r"(^```(?s:.*?)^```$|^#.*$)", text, flags=re.MULTILINE)
    return "".join(p if i % 2 else NAME.sub(link, p) for i, p in enumerate(parts))


def contents() -> str:
    """A list of the pages of the reference, for the front page."""
    lines = [f"- [{title}](reference/{page}.md)" for page, (title, _) in GROUPS.items()]
    lines += [
        "- [Every command and its options](reference/commands.md)",
        "- [Every field of a recipe](reference/config.md)",
        "- [Decoders](reference/decoders.md), [schedules](reference/schedules.md)"
        " and [recipes](reference/recipes.md) by name",
    ]
    return "\n".join(lines)


# -- public names ----------------------------------------------------------------------


def page_of(name: str) -> str:
    """The page that holds a public name."""
    home = bdlm._HOMES[name]
    for page, (_, modules) in GROUPS.items():
        if any(home == module or home.startswith(f"{module}.") for module in modules):
            return page
    return OTHERS


def _group(page: str) -> str:
    names = [name for name in bdlm.__all__ if page_of(name) == page]
    names.sort(key=lambda name: (inspect.isclass(getattr(bdlm, name)), name))
    parts = [f"# {GROUPS[page][0]}"]
    if page == "training":
        parts.append(
            "Every field of a config is listed under [Every field of a recipe](config.md)."
        )
    parts += [_name(name) for name in names]
    return "\n\n".join(filter(None, parts)) + "\n"


def _name(name: str) -> str:
    thing = getattr(bdlm, name)
    head = f"## `bdlm.{name}` {{ #bdlm.{name} }}"
    if isinstance(thing, Mapping):
        where = {id(DECODERS): "decoders", id(SCHEDULES): "schedules"}.get(id(thing))
        if where:
            return f"{head}\n\nA dictionary by name: {_members(thing)}. See [{where}]({where}.md)."
        rows = [(key, "", "", _about(value)) for key, value in thing.items()]
        return f"{head}\n\nA dictionary by name.\n\n{table(rows)}"
    code = f"```python\n{signature(name, thing)}\n```"
    if not inspect.isclass(thing):
        parts = [head, code, document(thing.__doc__, _arguments(thing)), f"*{_source(thing)}*"]
        return "\n\n".join(filter(None, parts))
    fields = fields_of(thing)
    names = [field[0] for field in fields]
    others = list(vars(thing).get("__annotations__", {})) or _arguments(thing)
    about = document(thing.__doc__, names or others, listed=not fields)
    parts = [head, code, about, f"*{_source(thing)}*", table(fields), *_methods(name, thing)]
    return "\n\n".join(filter(None, parts))


def _members(registry: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in registry)


def _about(member: Any) -> str:
    """What a registered class, or object of a class, says that it is."""
    return first_line((member if inspect.isclass(member) else type(member)).__doc__)


def _methods(name: str, kind: type) -> list[str]:
    """The public methods and properties that a class defines itself."""
    found = []
    for method, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else value
        function = getattr(function, "__func__", function)
        if method.startswith("_") or not inspect.isfunction(function):
            continue
        if not function.__doc__ and isinstance(value, property):
            continue
        head = f"### `{name}.{method}` {{ #bdlm.{name}.{method} }}"
        call = f"{name}.{method}" if isinstance(value, property) else signature(method, function)
        about = document(function.__doc__, _arguments(function))
        found += [head, f"```python\n{call}\n```", about]
    return found


def _arguments(of: Any) -> list[str]:
    try:
        return list(inspect.signature(of).parameters)
    except (TypeError, ValueError):
        return []


def _source(thing: Any) -> str:
    """Where a name is defined, as a link into the repository."""
    module = thing.__module__
    path = f"src/{module.replace('.', '/')}.py"
    return f"Defined in [`{module}`](repository:{path})"


# -- commands --------------------------------------------------------------------------


def _commands() -> str:
    intro = (
        "Every command prints its options with `--help`. An option that does not exist is an error"
        " with the nearest name. Exit codes: 0 done, 1 an internal error, 2 something that you can"
        " fix, 130 interrupted."
    )
    parts = ["# Every command and its options", intro]
    for name, about in cli.COMMANDS.items():
        module = cli.command(name)
        kind = module.Options
        parts += [
            f"## `bdlm {name}` {{ #bdlm-{name} }}",
            f"{prose(about)[0].upper()}{prose(about)[1:]}.",
        ]
        if hasattr(module, "SHORT"):  # train: its options are the fields of the config
            parts.append(_train(module.SHORT))
            continue
        parts += [document(kind.__doc__), table(_options(kind))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _options(kind: Any) -> list[tuple[str, str, str, str]]:
    rows = []
    for (name, written, default, about), f in zip(
        fields_of(kind), dataclasses.fields(kind), strict=True
    ):
        flag = name if "Positional" in str(f.type) else f"--{name.replace('_', '-')}"
        rows.append((flag, written, default, about))
    return rows


def _train(short: Mapping[str, str]) -> str:
    usage = "```text\nbdlm train [RECIPE] [--field VALUE ...] [--json]\n```"
    rows = [
        (f"--{name}", "", "", f"Short for [`--{field}`](config.md#config.{field}).")
        for name, field in short.items()
    ]
    text = (
        "`RECIPE` is a YAML file or [a packaged name](recipes.md). Every"
        " [field of the config](config.md) is an option by its dotted name."
    )
    return f"{usage}\n\n{text}\n\n{table(rows)}"


# -- registries ------------------------------------------------------------------------


def _config() -> str:
    intro = (
        "A recipe is a YAML file with these fields; `bdlm train --SECTION.FIELD VALUE` overrides"
        " one. The defaults are those of the [`TrainConfig`](training.md)."
    )
    parts, loose = ["# Every field of a recipe", intro], []
    hints = get_type_hints(TrainConfig)
    for field in fields_of(TrainConfig):
        section = hints[field[0]]
        if not dataclasses.is_dataclass(section):
            loose.append(field)
            continue
        parts += [
            f"## `{field[0]}` {{ #config.{field[0]} }}",
            document(section.__doc__),  # type: ignore[union-attr]
            table(fields_of(section, f"{field[0]}."), "config."),
        ]
    parts += ["## Of the whole run", table(loose, "config.")]
    return "\n\n".join(filter(None, parts)) + "\n"


def _decoders() -> str:
    parts = [
        "# Decoders by name",
        'Ask for one by `--decoder NAME` or `decoder="NAME"`, and for its parameters by'
        " `--option NAME=VALUE` or keyword. [Decoders](../decoders.md) says where each comes from"
        " and what was measured; [Which decoder?](../guides/which-decoder.md) helps to choose.",
    ]
    for name, kind in DECODERS.items():
        fields = fields_of(kind)
        about = document(kind.__doc__, [field[0] for field in fields], listed=False)
        parts += [f"## `{name}`", about, table(fields)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _schedules() -> str:
    rows = [(name, "", "", _about(one)) for name, one in SCHEDULES.items()]
    more = (
        "`clipped:LOW,HIGH` restricts the mask rates to an interval. Adding a schedule takes a"
        " small class: [how](../CONTRIBUTING.md)."
    )
    return f"# Schedules by name\n\n{table(rows)}\n\n{more}\n"


def _recipes() -> str:
    parts = ["# Recipes by name", "`bdlm train NAME` runs one; each is a YAML file of the package."]
    for name in recipe_names():
        text = _recipe_file(name).read_text(encoding="utf-8")
        about = " ".join(line.lstrip("# ") for line in _leading_comment(text))
        body = yaml.safe_dump(
            yaml.safe_load(text), sort_keys=False, default_flow_style=None, width=96
        )
        parts += [f"## `{name}`", prose(about), f"```yaml\n{body}```"]
    return "\n\n".join(parts) + "\n"


def _leading_comment(text: str) -> list[str]:
    lines = text.splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return lines[:end]


def _recipe_file(name: str) -> Any:
    from importlib.resources import files

    return files("bdlm") / "recipes" / f"{name}.yaml"
