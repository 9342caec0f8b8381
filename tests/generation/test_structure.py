"""The engine's structure: a short step, few files, and no part that reaches through another."""

from __future__ import annotations

import ast
import doctest
import inspect
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import bdlm.generation.engine.engine as engine_module
from bdlm.generation.engine.engine import Engine
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.toy import Inconsistent, toy_spec

ENGINE = Path(engine_module.__file__).parent
GENERATION = ENGINE.parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ENGINE.glob("*.py"))}
CLASSES = {
    node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)
}


def part_names() -> Iterator[str]:
    """The names under which the engine's classes hold objects of each other."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                for argument in arguments:
                    kind = argument.annotation
                    if isinstance(kind, ast.Name) and kind.id in CLASSES:
                        yield argument.arg
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made, target = node.value.func, node.targets[0]
                if (
                    isinstance(made, ast.Name)
                    and made.id in CLASSES
                    and isinstance(target, ast.Attribute)
                ):
                    yield target.attr.lstrip("_")


PARTS = set(part_names())


def chain(node: ast.Attribute) -> list[str]:
    """The names of an attribute chain: `self.a.b` gives ["self", "a", "b"]."""
    names = [node.attr]
    inner: ast.expr = node.value
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    return [*([inner.id] if isinstance(inner, ast.Name) else []), *reversed(names)]


def reaching(source: str) -> Iterator[str]:
    """Attribute chains that go through one part into another."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names = chain(node)
            parts = [name.lstrip("_") in PARTS for name in names]
            if any(a and b for a, b in pairwise(parts)):
                yield f"{node.lineno}: {'.'.join(names)}"


@pytest.mark.parametrize("path", sorted(ENGINE.glob("*.py")), ids=lambda p: p.name)
def test_no_part_reaches_through_another(path: Path) -> None:
    assert list(reaching(path.read_text(encoding="utf-8"))) == []


def test_the_parts_are_found() -> None:
    assert {"scheduler", "runner", "decoding", "slots", "tokens", "blocks", "cache"} <= PARTS


@pytest.mark.parametrize(
    "source",
    ["self.scheduler.slots.taken", "scheduler.blocks.masked", "self._scheduler.cache"],
)
def test_the_check_sees_a_chain_through_a_part(source: str) -> None:
    assert list(reaching(source))


def imported(path: Path) -> set[str]:
    """The modules of generation that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module is not None
        and node.module.startswith("bdlm.generation")
    }


def test_the_engine_imports_at_most_twelve_files_of_generation() -> None:
    assert len(imported(ENGINE / "engine.py")) <= 12


def test_a_step_is_short_and_names_its_four_parts() -> None:
    source = inspect.getsource(Engine.step)
    body = ast.parse(inspect.cleandoc("\n" + source)).body[0]
    assert isinstance(body, ast.FunctionDef)
    assert len(source.splitlines()) <= 30
    called = [
        node.func.attr
        for statement in body.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert {"admit", "schedule", "plan", "run", "decode", "retire"} <= set(called)


def touched(engine: Engine) -> set[str]:
    """The files of generation that hold code which one step runs."""
    files: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(GENERATION)):
            files.add(path)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        engine.step()
    finally:
        sys.setprofile(before)
    return files


def test_a_step_touches_at_most_twelve_files() -> None:
    """A step within a block of two rows with temperature and nucleus, the files of the decoder and
    of the sampling functions included."""
    engine = Engine(Inconsistent(toy_spec(4, 16)), 2)
    for seed in range(2):
        engine.submit(
            [0, 1, 2, 0],
            SamplingParams(max_new_tokens=8, seed=seed, temperature=0.7, top_p=0.9),
        )
    engine.step()
    files = touched(engine)
    assert len(files) <= 12, "\n".join(sorted(files))
    assert {"engine.py", "scheduler.py", "model_runner.py", "decode_step.py"} <= {
        Path(file).name for file in files
    }


def test_every_file_is_short() -> None:
    for path in GENERATION.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path.name


def test_the_engines_example_runs() -> None:
    failed, tried = doctest.testmod(engine_module)
    assert tried and not failed
