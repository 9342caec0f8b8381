"""Fenced examples of a Markdown page: found, made small, and run in order in one folder.

Shared by the tests of the README and those of guides and tutorials. Commands of `bdlm` run in this
process, which saves the seconds that each import of torch takes; other commands go to the shell.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bdlm import cli

FENCE = re.compile(
    r"^```(bash|python)\n(.*?)^```$(?:\s*<!-- output -->\n```text\n(.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
NOT_RUN = {
    "pip install .",
    "bdlm demo",
    "make demo",
    "make test",
    "make docs",
}  # by people and continuous integration
TINY = "--model.hidden_dim 32 --valid.rows 4 --optim.batch_size 8"
SMALLER = {  # what a test puts in place of a command's sizes
    "--max-new-tokens 120": "--max-new-tokens 12",
    "--max-new-tokens 6": "--max-new-tokens 1",  # 60 and 64
    '--prompt "Once"': '--prompt "Once" --max-new-tokens 8',
    "ancestral --option steps=4 --json": "ancestral --option steps=4 --max-new-tokens 12 --json",
    "train tiny": f"train tiny {TINY}",
    "train demo": f"train demo {TINY} --model.length 32 --data.vocab_size 270 --max-steps 4",
    "--max-steps 200": "--max-steps 6",
    "--max-steps 300": "--max-steps 8",
    "--limits.minutes 10": "--limits.minutes 10 --max-steps 6",
    "--max-tokens 2000": "--max-tokens 200",
}
IN_PYTHON = {
    r"max_new_tokens=\d+": "max_new_tokens=8",
    r'"limits\.steps=200"': '"limits.steps=4", "model.hidden_dim=32", "optim.batch_size=8"',
}


@dataclass(frozen=True)
class Fence:
    """An example: its language, its text, and the output that the page shows for it, if it does."""

    kind: str
    body: str
    output: str | None = None

    def commands(self) -> list[str]:
        """The commands of a bash example, continued lines joined."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def fences(page: Path) -> list[Fence]:
    """The bash and python examples of a page, in order."""
    return [Fence(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def run(
    page: Path,
    folder: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    small_python: bool = True,
) -> int:
    """Run the examples of a page in `folder`, python ones in one namespace. Returns how many ran.

    Commands run with the sizes of `SMALLER`; small_python: programs with those of `IN_PYTHON`, else
    as they are. Fails with the example and what it printed.
    """
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": page.stem}
    count = 0
    for fence in fences(page):
        capsys.readouterr()
        if fence.kind == "python":
            body = _smaller_python(fence.body) if small_python else fence.body
            exec(compile(body, page.name, "exec"), names)
            count += 1
        for command in fence.commands() if fence.kind == "bash" else ():
            if command not in NOT_RUN:
                _command(smaller(command), capsys)
                count += 1
        if fence.output:
            assert_close(capsys.readouterr().out, fence.output)
    return count


def smaller(command: str) -> str:
    """The command with a test's sizes."""
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    whole_text = command.startswith("bdlm eval") and "--max-tokens" not in command
    return f"{command} --max-tokens 200" if whole_text else command


def _smaller_python(body: str) -> str:
    for long, short in IN_PYTHON.items():
        body = re.sub(long, short, body)
    return body


def _command(command: str, capsys: Any) -> None:
    words = shlex.split(command)
    if words[0] == "bdlm" and "$'" not in command:
        code = cli.run(words[1:])
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.err}"
        assert printed.out.strip(), command
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env: Mapping[str, str] = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def assert_close(printed: str, shown: str) -> None:
    """The page's output has the words that were printed, and numbers within 1 % of theirs."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    wrong = [
        (got, said) for got, said in pairs if float(got) != pytest.approx(float(said), rel=0.01)
    ]
    assert not wrong, printed
