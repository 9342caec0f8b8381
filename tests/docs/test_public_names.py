"""Examples and pages use public names only: of `bdlm.__all__`, or of a submodule that
docs/public-api.md lists.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bdlm
from tests.docs.fences import fences

ROOT = Path(__file__).parents[2]
PUBLIC = {*bdlm.__all__, "__version__"}
SUBMODULES = set(
    re.findall(r"`(bdlm(?:\.[a-z_]+)+)`", (ROOT / "docs" / "public-api.md").read_text())
)
EXCEPT = {  # pages about what is not public, and say so
    "docs/decoders.md": {"bdlm.generation.sampling_params", "bdlm.generation.full_sequence.engine"},
}


def programs() -> Iterator[tuple[str, str]]:
    """(name, text) of every Python program that a reader is shown."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield f"examples/{path.name}", path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield (
            f"examples/{path.name}",
            "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"),
        )
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = "\n".join(f.body for f in fences(path) if f.kind == "python" and "import " in f.body)
        if text:
            yield path.relative_to(ROOT).as_posix(), text


def private_names(text: str) -> list[str]:
    """What a program uses of bdlm that is not public."""
    wrong = []
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "bdlm"
        ):
            wrong += [f"bdlm.{node.attr}"] if node.attr not in PUBLIC else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bdlm":
            if node.module == "bdlm":
                wrong += [f"bdlm.{alias.name}" for alias in node.names if alias.name not in PUBLIC]
            elif node.module not in SUBMODULES:
                wrong.append(str(node.module))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("bdlm.")]
            wrong += [name for name in names if name not in SUBMODULES]
    return wrong


@pytest.mark.parametrize(("name", "text"), [pytest.param(*each, id=each[0]) for each in programs()])
def test_a_program_uses_public_names_only(name: str, text: str) -> None:
    assert [used for used in private_names(text) if used not in EXCEPT.get(name, set())] == []


def test_private_names_are_found() -> None:
    text = "import bdlm\nimport bdlm.api\nfrom bdlm import LM, core\nbdlm.load, bdlm.cli"
    text += "\nfrom bdlm.core.types import Step"
    assert sorted(private_names(text)) == ["bdlm.api", "bdlm.cli", "bdlm.core", "bdlm.core.types"]
