"""What help, editors and type checkers see: every option by name, with the default of the record or
function that it goes to."""

from __future__ import annotations

import ast
import inspect
import os
import pydoc
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_overloads

import pytest

import bdlm
from bdlm.api import LM
from bdlm.likelihood.bound import evaluate

OF_PARAMS = {f.name: f for f in fields(bdlm.SamplingParams)}
# of the record, but not of the method
NOT_THERE = {
    "generate": {"options"},
    "stream": {"options"},
    "infill": {"options", "max_new_tokens", "known_tokens"},
}
NULL = {"known_tokens": {}}  # None in a signature stands for these
OTHER = {"infill": {"infill_mode": "gap"}}  # defaults of a method's own


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("method", NOT_THERE)
def test_every_sampling_option_is_in_the_signature_with_its_default(method: str) -> None:
    shown = parameters(getattr(LM, method))
    assert shown.keys() >= OF_PARAMS.keys() - NOT_THERE[method]
    assert not shown.keys() & NOT_THERE[method]
    for name in OF_PARAMS.keys() - NOT_THERE[method]:
        f = OF_PARAMS[name]
        default = f.default if f.default is not MISSING else f.default_factory()
        default = OTHER.get(method, {}).get(name, default)
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert (NULL.get(name) if shown[name].default is None else shown[name].default) == default
        assert shown[name].annotation not in ("Any", inspect.Parameter.empty)
    rest = [p.name for p in shown.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    assert rest == ["decoder_options"]


@pytest.mark.parametrize("method", ["score", "evaluate"])
def test_every_option_of_the_likelihood_is_in_the_signature_with_its_default(method: str) -> None:
    shown = parameters(getattr(LM, method))
    theirs = parameters(evaluate)
    for name in theirs.keys() - {"model", "windows", "tokenizer"}:
        assert shown[name].default == theirs[name].default, name
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in shown.values())


def test_the_overloads_have_the_options_of_the_method() -> None:
    method = parameters(LM.generate)
    for overload in get_overloads(inspect.unwrap(LM.generate)):
        shown = parameters(overload)
        assert list(shown) == list(method)
        for name in shown.keys() - {"prompt"}:
            assert shown[name] == method[name], name


def test_help_names_the_options() -> None:
    text = pydoc.render_doc(LM.generate, renderer=pydoc.plaintext)
    assert all(f"{name}:" in text for name in OF_PARAMS.keys() - {"options"})


def test_the_package_shows_type_checkers_the_names_that_it_has() -> None:
    tree = ast.parse(Path(bdlm.__file__).read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == bdlm._HOMES
    assert sorted(seen) == bdlm.__all__
    for name in bdlm.__all__:
        assert getattr(bdlm, name) is not None
        assert name in dir(bdlm)


USER = """
import bdlm

lm = bdlm.load("shakespeare")
one = lm.generate("a", max_new_tokens=3, temperature=0.0, stop=["x"], decoder="eb", gamma=0.1)
two = lm.generate(["a", "b"], bdlm.SamplingParams(max_new_tokens=3))
reveal_type(one.text)
reveal_type(two[0].sequences)
reveal_type(lm.score("a").nats_per_token)
lm.generate("a", max_new_tokens="3")
lm.generate("a", 3)
one.txt
bdlm.Nothing
"""


@pytest.mark.slow
def test_mypy_sees_the_options(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    user, source = tmp_path / "user.py", Path(bdlm.__file__).parents[1]
    user.write_text(USER)
    checked = subprocess.run(  # with the project's own settings, and so its cache
        [sys.executable, "-m", "mypy", str(user)],
        cwd=source.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(source)},
    )
    said = "\n".join(line for line in checked.stdout.splitlines() if "user.py:" in line)
    assert said.count("Revealed type") == 3, said
    for line, kind in ((7, "str"), (8, "list[int]"), (9, "float")):
        shown = rf'user.py:{line}: note: Revealed type is "(builtins\.)?{re.escape(kind)}'
        assert re.search(shown, said.replace("builtins.int", "int")), said
    for line in (10, 11, 12, 13):
        assert f"user.py:{line}: error" in said, said
    assert said.count("error:") == 4, said
