"""Check the rules of the architecture: imports point down, torch is loaded late, block
arithmetic lives in one place."""

from __future__ import annotations

import ast
import re
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


BLOCK_SIZE = re.compile(
    r"(?:size|sizes|block|blocks|bs|width)|(?:\w+_)?block_sizes?|(?:\w+_)?bs", re.IGNORECASE
)
DIVIDES = {
    "divmod",
    "floor_divide",
    "remainder",
    "fmod",
    "mod",
    "floordiv",
    "__floordiv__",
    "__mod__",
}
ROUNDS = {"int", "floor", "ceil", "trunc", "fix", "round", "long", "astype", "to"}
QUOTIENTS = {"div", "divide", "true_divide", "truediv"}
NOT_OF_POSITIONS = {  # divisions by a number of that name which are not of places in a text
    "core/counts.py: (BINS * count - 1) // size",  # a share of masked cells
    "likelihood/score.py: place[scored] // width",  # bins of a report, of any width
    "models/attention.py: -count // self.mask.BLOCK_SIZE[0]",  # FlexAttention's tile
}


def names_of(node: ast.AST) -> set[str]:
    """Names that an expression's value goes by: of `self.x.size[0].clamp(1)` it is size."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Subscript):
        return names_of(node.value)
    if isinstance(node, ast.Call):
        inner = node.func.value if isinstance(node.func, ast.Attribute) else ast.Tuple([])
        return names_of(inner).union(*map(names_of, node.args))
    return set().union(*map(names_of, ast.iter_child_nodes(node)))


def is_block_size(node: ast.AST) -> bool:
    return any(BLOCK_SIZE.fullmatch(name) for name in names_of(node))


def called(node: ast.AST) -> str:
    """The bare name of a called function or method, without torch's underscore for in-place."""
    if not isinstance(node, ast.Call):
        return ""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name if name.startswith("__") else name.removesuffix("_")


def divisor(call: ast.Call) -> ast.AST:
    """What a function or method divides by: its last positional argument, or the named one."""
    named = {k.arg: k.value for k in call.keywords}
    positional: list[ast.AST] = [*call.args, ast.Tuple([])]
    return named.get("other") or named.get("x2") or positional[len(call.args) - 1]


def has_quotient(node: ast.AST) -> bool:
    """Whether an expression is a true quotient by a block size, or arithmetic on one."""
    if isinstance(node, ast.BinOp):
        own = isinstance(node.op, ast.Div) and is_block_size(node.right)
        return own or has_quotient(node.left) or has_quotient(node.right)
    if isinstance(node, ast.Call):
        own = called(node) in QUOTIENTS and is_block_size(divisor(node))
        return own or (isinstance(node.func, ast.Attribute) and has_quotient(node.func.value))
    return isinstance(node, ast.UnaryOp) and has_quotient(node.operand)


def divides_by_a_block_size(node: ast.AST) -> bool:
    """Whether one expression floors a quotient by a block size or takes a remainder, in any of the
    forms that Python and torch have."""
    if isinstance(node, ast.BinOp | ast.AugAssign):
        by = node.right if isinstance(node, ast.BinOp) else node.value
        left = node.left if isinstance(node, ast.BinOp) else node.target
        formats = isinstance(left, ast.JoinedStr) or (
            isinstance(left, ast.Constant) and isinstance(left.value, str)
        )
        return isinstance(node.op, ast.FloorDiv | ast.Mod) and is_block_size(by) and not formats
    if not isinstance(node, ast.Call):
        return False
    name = called(node)
    if name in DIVIDES and is_block_size(divisor(node)):
        return True
    if (
        name in QUOTIENTS
        and any(k.arg == "rounding_mode" for k in node.keywords)
        and is_block_size(divisor(node))
    ):
        return True
    rounded = [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
    return name in ROUNDS and any(map(has_quotient, rounded))


def divisions_by_a_block_size(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every one in a file."""
    for node in ast.walk(ast.parse(source)):
        if divides_by_a_block_size(node):
            yield node.lineno, ast.unparse(node)


def test_only_the_block_map_divides_by_a_block_size() -> None:
    home = ROOT / "core" / "blockmap.py"
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {text}": line
        for path in FILES
        if path != home
        for line, text in divisions_by_a_block_size(path.read_text())
    }
    assert not [
        f"{text} (line {line}); ask core.blockmap"
        for text, line in found.items()
        if text not in NOT_OF_POSITIONS
    ]
    assert set(found) >= NOT_OF_POSITIONS, "an exception that is no longer needed"
    assert len(list(divisions_by_a_block_size(home.read_text()))) >= 2


@pytest.mark.parametrize(
    "name",
    [
        "size",
        "sizes[:, None]",
        "block",
        "self.block_size",
        "x.spec.block_size",
        "bs",
        "width",
        "kv_block_size",
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        "p // {n}",
        "p % {n}",
        "p //= {n}",
        "p %= {n}",
        "-(-p // {n})",
        "p // ({n} or 4)",
        "p // max(1, {n})",
        "p // int({n})",
        "(p + {n} - 1) // {n} * {n}",
        "divmod(p, {n})",
        "torch.div(p, {n}, rounding_mode='floor')",
        "torch.div(p, other={n}, rounding_mode='trunc')",
        "torch.divide(p, {n}, rounding_mode='floor')",
        "torch.floor_divide(p, {n})",
        "torch.remainder(p, {n})",
        "torch.fmod(p, {n})",
        "torch.floor(p / {n})",
        "torch.floor(torch.div(p, {n}))",
        "p.div({n}, rounding_mode='floor')",
        "p.div_({n}, rounding_mode='floor')",
        "p.floor_divide({n})",
        "p.floor_divide_({n})",
        "p.remainder({n})",
        "p.fmod({n})",
        "(p / {n}).floor()",
        "(p / {n}).long()",
        "(p / {n} + 1).ceil()",
        "p.div({n}).floor_()",
        "math.floor(p / {n})",
        "math.ceil(p / {n})",
        "math.trunc(p / {n})",
        "math.fmod(p, {n})",
        "int(p / {n})",
        "round(p / {n})",
        "np.floor_divide(p, {n})",
        "np.mod(p, {n})",
        "np.remainder(p, {n})",
        "np.divmod(p, {n})",
        "np.floor(p / {n})",
        "(p / {n}).astype(int)",
        "operator.floordiv(p, {n})",
        "operator.mod(p, {n})",
        "p.__floordiv__({n})",
        "p.__mod__({n})",
    ],
)
def test_the_check_sees_every_form_of_division(form: str, name: str) -> None:
    assert list(divisions_by_a_block_size(form.format(n=name)))


@pytest.mark.parametrize(
    "form",
    [
        "p / size",
        "p * size",
        "p // heads",
        "size // 2",
        "'%d' % size",
        "p // vocab_size",
        "p // self.block.heads",
    ],
)
def test_the_check_lets_other_arithmetic_be(form: str) -> None:
    assert not list(divisions_by_a_block_size(form))


def unused_in_core(sources: dict[str, str]) -> list[str]:
    """Public functions and classes at the top of core's files that no file names outside their own
    definition. sources: path -> text."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    tops = [
        (path, top, getattr(top, "name", "")) for path, tree in trees.items() for top in tree.body
    ]
    names: dict[int, set[str]] = {}
    for _, top, _ in tops:
        if not isinstance(top, ast.Import | ast.ImportFrom):
            inside = list(ast.walk(top))
            named = {n.id for n in inside if isinstance(n, ast.Name)} | {
                n.attr for n in inside if isinstance(n, ast.Attribute)
            }
            # `_HOMES`, lazy annotations
            quoted = {
                n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            names[id(top)] = named | quoted
    core = [
        (path, top, name)
        for path, top, name in tops
        if path.startswith("core/") and name and not name.startswith("_")
    ]
    return [
        f"{path}: {name}"
        for path, top, name in core
        if not any(name in seen for key, seen in names.items() if key != id(top))
    ]


def test_core_holds_nothing_that_only_tests_use() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
    assert unused_in_core(sources) == []
    planted = {
        **sources,
        "core/x.py": "def lonely(n):\n    return lonely(n - 1)\n\ndef used(): ...\n",
        "api.py": "used()",
    }
    assert "core/x.py: lonely" in unused_in_core(planted)
    assert "core/x.py: used" not in unused_in_core(planted)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules after a statement, in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


HEAVY = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "tokenizers"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import bdlm; dir(bdlm)") & (HEAVY | {"rich", "tyro", "numpy"})


def test_the_command_line_and_its_types_load_nothing_heavy() -> None:
    every = "from bdlm import cli; [cli.command(name) for name in cli.COMMANDS]"
    assert not loaded_by(every) & HEAVY


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by("from bdlm import cli; assert cli.run(['--help']) == 0") & HEAVY
