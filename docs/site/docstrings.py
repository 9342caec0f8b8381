"""Turn annotations, defaults and docstrings into Markdown, whatever they belong to."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import types
from collections import abc
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from bdlm.training.fields import field_docs

REQUIRED = "required"
Field = tuple[str, str, str, str]  # name, type, default, sentence


def prose(text: str) -> str:
    """A docstring's prose as Markdown: outside of code, its characters stand for themselves."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(p if i % 2 else re.sub(r"([*<\[\]\\])", r"\\\1", p) for i, p in enumerate(parts))


def document(text: str | None, names: Sequence[str] = (), listed: bool = True) -> str:
    """A whole docstring as Markdown: indented parts are code, the rest is prose.

    names: arguments or fields that the docstring describes as "name: what it is". Those become a
    list; with listed=False they are left out, for a page that shows them in a table.
    """
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text or "")):
        if block and all(line.startswith("    ") for line in block.splitlines()):
            blocks.append(f"```python\n{inspect.cleandoc(block)}\n```")
            continue
        before, found = _descriptions(block, names)
        raises = re.search(r"(?:^|(?<=[.;] ))Raises [A-Z].*", found[-1][1]) if found else None
        if raises:  # of the whole call, not of its last argument
            found[-1] = (found[-1][0], found[-1][1][: raises.start()].strip())
        items = [
            f"- {', '.join(f'`{n}`' for n in names)}: {prose(about)}" for names, about in found
        ]
        blocks += [prose(before), "\n".join(items) if listed else ""]
        blocks.append(prose(raises[0]) if raises else "")
    return "\n\n".join(filter(None, blocks))


def _descriptions(block: str, names: Sequence[str]) -> tuple[str, list[tuple[list[str], str]]]:
    """A paragraph's text before the first "name: " or "name, name: ", and each such part."""
    if not names:
        return block, []
    one = "|".join(map(re.escape, names))
    pattern = rf"(?:^|(?<=[.;] ))((?:{one})(?:, (?:{one}))*): "
    before, *rest = re.split(pattern, " ".join(block.split()))
    pairs = zip(rest[::2], rest[1::2], strict=True)
    found = [(several.split(", "), about.strip().rstrip(";")) for several, about in pairs]
    return (before.strip(), found) if found else (block, [])


def first_line(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return prose(" ".join(inspect.cleandoc(text or "").split("\n\n")[0].split()))


def signature(name: str, of: Any) -> str:
    """A call as one writes it: on one line where it fits, else an argument a line."""
    try:
        found = inspect.signature(of)
    except (TypeError, ValueError):
        return name
    parameters = [p for name, p in found.parameters.items() if name != "self"]
    arguments = [_quotes(str(p)) for p in _starred(parameters)]
    result = ""
    if not inspect.isclass(of) and found.return_annotation is not found.empty:
        result = f" -> {_quotes(found.return_annotation)}"
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= 88:
        return line
    inner = "".join(f"    {argument},\n" for argument in arguments)
    return f"{name}(\n{inner}){result}"


def _starred(parameters: Sequence[inspect.Parameter]) -> Iterator[Any]:
    """The parameters, with the bare star before the first one that goes by keyword only."""
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not several:
            several = True
            yield "*"
        yield p


def _quotes(text: Any) -> str:
    """An annotation without the quotes that postponed evaluation leaves around it."""
    shown = text if isinstance(text, str) else getattr(text, "__name__", str(text))
    return re.sub(r"""(: |-> |^)(['"])(.+?)\2(?= = |$)""", r"\1\3", shown)


def fields_of(kind: Any, prefix: str = "") -> list[Field]:
    """The fields of a dataclass, or the annotated attributes of another class."""
    sentences, hints = _described(kind) | field_docs(kind), _hints(kind)
    if not dataclasses.is_dataclass(kind):
        own = {n: hints.get(n, t) for n, t in vars(kind).get("__annotations__", {}).items()}
        return [(prefix + n, written(t), "", prose(sentences.get(n, ""))) for n, t in own.items()]
    found = []
    for f in dataclasses.fields(kind):
        if not f.name.startswith("_"):
            sentence = prose(sentences.get(f.name, ""))
            kind_of = written(hints.get(f.name, f.type))
            found.append((prefix + f.name, kind_of, _default(f), sentence))
    return found


def _hints(kind: Any) -> dict[str, Any]:
    """The annotations as objects, or none where a name is only known to type checkers."""
    try:
        return get_type_hints(kind, include_extras=True)
    except NameError:
        return {}


def _described(kind: Any) -> dict[str, str]:
    """Field name -> what the class docstring says about it."""
    names = list(vars(kind).get("__annotations__", {}))
    sentences: dict[str, str] = {}
    for paragraph in inspect.cleandoc(kind.__doc__ or "").split("\n\n"):
        for several, about in _descriptions(paragraph, names)[1]:
            sentences |= dict.fromkeys(several, about)
    return sentences


def _default(field: dataclasses.Field[Any]) -> str:
    """A field's default as one would write it in a recipe."""
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return REQUIRED
        value = field.default_factory()
    if dataclasses.is_dataclass(value):
        return ""
    try:
        plain = isinstance(value, str) and value.isprintable() and value
        return f"`{value}`" if plain else f"`{json.dumps(value)}`"
    except TypeError:
        return f"`{value!r}`"


def written(kind: Any) -> str:
    """A type as one writes its values: `adamw | muon`, `float or null`, `int >= 1`."""
    if isinstance(
        kind, str
    ):  # a name that cannot be resolved without the modules of a type checker
        return kind.replace(" | None", " or null")
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [_range(mark) for mark in arguments[1:] if hasattr(mark, "low")]
        return " ".join([written(arguments[0]), *limits])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        parts = [written(a) for a in arguments if a is not types.NoneType]
        return " or ".join([*parts, "null"] if types.NoneType in arguments else parts)
    name = getattr(kind, "__name__", str(kind).removeprefix("typing."))
    inner = ", ".join("..." if a is ... else written(a) for a in arguments)
    return f"{name}[{inner}]" if inner and origin is not abc.Callable else name


def _range(mark: Any) -> str:
    """The limits of a number, from the mark in its annotation."""
    high = getattr(mark, "high", math.inf)
    ends = getattr(mark, "ends", "[]")
    if high == math.inf:
        return f"{'>=' if ends[0] == '[' else '>'} {mark.low}"
    return f"in {ends[0]}{mark.low}, {high}{ends[1]}"


def _bars(text: str) -> str:
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(p if i % 2 else p.replace("|", "\\|") for i, p in enumerate(parts))


def table(fields: list[Field], anchor: str = "") -> str:
    """The fields as a Markdown table. anchor: if given, rows can be linked as anchor + name."""
    if not fields:
        return ""
    columns = [i for i in range(4) if i == 0 or any(field[i] for field in fields)]
    heads = ("name", "type", "default", "what it is")
    rows = [[heads[i] for i in columns], ["---" for _ in columns]]
    for name, kind, default, sentence in fields:
        mark = f'<a id="{anchor}{name}"></a>' if anchor else ""
        # a bar within backticks does not end a cell
        cells = (f"{mark}`{name}`", f"`{kind}`" if kind else "", default, _bars(sentence))
        rows.append([cells[i] for i in columns])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
