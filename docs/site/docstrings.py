"""Turn annotations, defaults and docstrings into Markdown. Knows nothing about which names there are."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from bdlm.training.fields import field_docs

REQUIRED = "required"
Field = tuple[str, str, str, str]  # name, type, default, sentence


def prose(text: str) -> str:
    """A docstring's prose as Markdown: outside of code, stars and angle brackets stand for themselves."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(p if i % 2 else re.sub(r"([*<\[\]])", r"\\\1", p) for i, p in enumerate(parts))


def document(text: str | None) -> str:
    """A whole docstring as Markdown: indented parts are code, the rest is prose."""
    blocks, code = [], False
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text or "")):
        code = all(line.startswith("    ") for line in block.splitlines())
        blocks.append(f"```python\n{inspect.cleandoc(block)}\n```" if code else prose(block))
    return "\n\n".join(filter(None, blocks))


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
    sentences = _described(kind) | field_docs(kind)
    if not dataclasses.is_dataclass(kind):
        own = vars(kind).get("__annotations__", {})
        return [(prefix + n, written(t), "", prose(sentences.get(n, ""))) for n, t in own.items()]
    found = []
    for f in dataclasses.fields(kind):
        if not f.name.startswith("_"):
            sentence = prose(sentences.get(f.name, ""))
            found.append((prefix + f.name, written(f.type), _default(f), sentence))
    return found


def _described(kind: Any) -> dict[str, str]:
    """Field name -> what the class docstring says after "name: " or "name, name: "."""
    names = "|".join(vars(kind).get("__annotations__", {}))
    if not names:
        return {}
    found = {}
    for paragraph in inspect.cleandoc(kind.__doc__ or "").split("\n\n"):
        pieces = re.split(
            rf"(?:^|(?<=[.;:] ))((?:{names})(?:, (?:{names}))*): ", " ".join(paragraph.split())
        )
        for several, sentence in zip(pieces[1::2], pieces[2::2], strict=True):
            found |= dict.fromkeys(several.split(", "), sentence.strip().rstrip(";"))
    return found


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
        return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"
    except TypeError:
        return f"`{value!r}`"


def written(kind: Any) -> str:
    """A type as one writes its values: `adamw | muon`, `float or null`."""
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    while match := re.search(r"(?:Annotated|[\w.]*Positional)\[", text):
        inside, after = _balanced(text[match.end() :])
        text = text[: match.start()] + _first_argument(inside) + after
    text = re.sub(
        r"Literal\[([^\]]*)\]", lambda m: " | ".join(w.strip(" '\"") for w in m[1].split(",")), text
    )
    return text.replace(" | None", " or null")


def _balanced(text: str) -> tuple[str, str]:
    """What stands before the bracket that closes an open one, and what after."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def _first_argument(text: str) -> str:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            return text[:i]
    return text


def _bars(text: str) -> str:
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(p if i % 2 else p.replace("|", "\\|") for i, p in enumerate(parts))


def table(fields: list[Field], anchor: str = "") -> str:
    """The fields as a Markdown table. anchor: where given, each row can be linked as anchor + name."""
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
