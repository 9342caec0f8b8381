"""Help for the fields of a dataclass: the docstring under each one, and its type in words.

In: a dataclass in which a string literal follows each field. Out: field name -> sentence. Python
drops these literals when it compiles a class, so the source file is parsed (once); every wheel
contains it. Loads no torch."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import types
from typing import Any, Union, get_args, get_origin


@functools.cache
def field_docs(kind: Any) -> dict[str, str]:
    """Map field names to their docstrings, each in one line. Empty without source code."""
    module = inspect.getmodule(kind)
    try:
        tree = _parsed(inspect.getsource(module)) if module else ast.Module([], [])
    except (OSError, TypeError):  # no file, or a built-in class
        return {}
    body = next(
        (c.body for c in tree.body if isinstance(c, ast.ClassDef) and c.name == kind.__name__), []
    )
    found = {}
    for statement, after in itertools.pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[statement.target.id] = " ".join(after.value.value.split())
    return found


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def type_words(hint: Any) -> str:
    """Write a resolved annotation as in source code, `float | None`, without the range that
    `Annotated` adds."""
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(type_words, get_args(hint)))
    if hint is types.NoneType:
        return "None"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).removeprefix("typing.")
