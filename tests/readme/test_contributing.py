"""Test that the recipes of CONTRIBUTING.md are real: each diff applies to a copy of the tree, is
short, and passes the contract tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = re.findall(
    r"^## Add a (.+?)$(?:.*?)^```diff\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.DOTALL | re.MULTILINE,
)
SUITES = {  # what proves an addition: (test files, -k expression)
    "noise schedule": (["tests/contracts/test_schedules.py"], "cubic"),
    "decoder": (["tests/contracts/test_decoders.py"], "hits"),
    "backbone": (["tests/contracts/test_denoisers.py"], "bag"),
}


def test_every_recipe_has_its_suite() -> None:
    assert {name for name, _ in RECIPES} == set(SUITES)


@pytest.mark.parametrize(("name", "diff"), RECIPES, ids=[name for name, _ in RECIPES])
def test_a_recipe_is_under_40_lines(name: str, diff: str) -> None:
    changed = [
        line for line in diff.splitlines() if line[:1] in "+-" and line[:4] not in ("+++ ", "--- ")
    ]
    assert 0 < len(changed) < 40


@pytest.mark.slow
@pytest.mark.parametrize(("name", "diff"), RECIPES, ids=[name for name, _ in RECIPES])
def test_a_recipe_applies_and_passes_its_contract(name: str, diff: str, tmp_path: Path) -> None:
    for part in ("src", "tests"):
        shutil.copytree(
            ROOT / part,
            tmp_path / part,
            ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
        )
    apply = ["git", "apply", "--unidiff-zero", "--whitespace=nowarn", "-"]
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(
        apply, input=diff, text=True, cwd=tmp_path, capture_output=True, env=outside
    )
    assert done.returncode == 0, (
        f"the recipe no longer fits the tree; update its diff: {done.stderr}"
    )
    files, word = SUITES[name]
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        *files,
        "-k",
        word,
    ]
    env = {
        **outside,
        "PYTHONPATH": f"{tmp_path / 'src'}{os.pathsep}{tmp_path}",
        "OMP_NUM_THREADS": "1",
    }
    proof = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert proof.returncode == 0, proof.stdout[-3000:] + proof.stderr[-1000:]
    assert re.search(r"\d+ passed", proof.stdout)
    assert "tests ran" not in proof.stdout
