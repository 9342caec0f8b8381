"""The docstrings under the fields of a dataclass, read from its source.

In: a dataclass whose fields are each followed by a string literal. Out: field name -> sentence.
Python keeps no such literals when
it compiles a class, so the source file is parsed (once); it is part of every wheel. Loads no torch.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from typing import Any


@functools.cache
def field_docs(kind: Any) -> dict[str, str]:
    """Field name -> docstring in one line, in order, of the fields that have one. Empty where there
    is no source."""
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
