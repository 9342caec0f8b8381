"""The house rules that a machine can check: imports point down, torch is loaded late, block arithmetic lives in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bdlm

ROOT = Path(bdlm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYER = {
    "core": 0,
    "models": 1,
    "data": 1,
    "training": 2,
    "likelihood": 2,
    "generation": 2,
    "api": 3,
    "harness": 4,
    "experiments": 4,
    "adapt": 4,
    "serving": 4,
    "commands": 5,
    "cli": 6,
    "__main__": 7,
}


def room(path: Path) -> str:
    """The folder or top-level module of the package that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted module, relative?) of every import anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level > 0
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name, False


def wrong_imports(path: Path, source: str) -> list[str]:
    """What a file imports against the rules, one line each."""
    here, wrong = room(path), []
    for line, module, relative in imports(ast.parse(source)):
        if relative:
            wrong.append(f"{path}:{line} a relative import; write `from bdlm.x import y`")
        parts = module.split(".")
        if parts[0] != "bdlm" or here == "__init__":
            continue
        if len(parts) == 1:
            wrong.append(f"{path}:{line} imports the whole package; name the module")
        elif parts[1] != here and LAYER[parts[1]] >= LAYER[here]:
            wrong.append(f"{path}:{line} {here} imports {parts[1]}, which is not below it")
    return wrong


def test_every_room_has_a_layer() -> None:
    assert {room(p) for p in FILES} - {"__init__"} <= set(LAYER)


def test_imports_point_down() -> None:
    wrong = [line for path in FILES for line in wrong_imports(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/x.py", "from bdlm.models.dit import DiT"),
        ("models/x.py", "def f():\n    import bdlm.data.packing"),
        ("generation/x.py", "from bdlm.training import loop"),
        ("core/x.py", "from .types import Step"),
        ("api.py", "import bdlm"),
        ("commands/x.py", "from bdlm.cli import main"),
    ],
)
def test_the_check_sees_a_planted_fault(file: str, source: str) -> None:
    assert wrong_imports(ROOT / file, source)


def test_core_needs_torch_and_the_standard_library_alone() -> None:
    allowed = sys.stdlib_module_names | {"torch", "bdlm"}
    wrong = [
        f"{path}:{line} imports {module}"
        for path in FILES
        if room(path) == "core"
        for line, module, _ in imports(ast.parse(path.read_text()))
        if module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def floor_divisions_by_a_block_size(source: str) -> Iterator[int]:
    """Lines that divide by something named `block_size`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and ast.unparse(node.right).endswith("block_size"):
            yield node.lineno


def test_only_the_block_map_divides_by_a_block_size() -> None:
    home = ROOT / "core" / "blockmap.py"
    wrong = [f"{p}:{n}" for p in FILES if p != home for n in floor_divisions_by_a_block_size(p.read_text())]
    assert not wrong, "\n".join(wrong)
    assert list(floor_divisions_by_a_block_size("a = p // self.spec.block_size"))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules after a statement, in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


HEAVY = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "tokenizers"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import bdlm; dir(bdlm)") & (HEAVY | {"rich", "tyro", "numpy"})


def test_the_command_line_and_its_types_load_nothing_heavy() -> None:
    every = "from bdlm import cli; [cli.command(name) for name in cli.COMMANDS]"
    assert not loaded_by(every) & HEAVY


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by("from bdlm import cli; assert cli.run(['--help']) == 0") & HEAVY
