"""Every fenced `bash` and `python` command of the README runs, on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if line.strip()
]
PROGRAMS = [body for kind, body in BLOCKS if kind == "python"]

# run by people and by continuous integration; test_make_targets looks at them
TOO_LONG = {"make demo", "make test"}
SMALLER = {  # what a test puts in place of a command's sizes
    "--max-new-tokens 120": "--max-new-tokens 12",
    '--prompt "Once"': '--prompt "Once" --max-new-tokens 8',
    "ancestral --option": "ancestral --max-new-tokens 12 --option",
    "--max-steps 200": "--max-steps 6 --model.hidden_dim 32 --valid.rows 4 --optim.batch_size 8",
    "--max-steps 300": "--max-steps 8",
    "--data my.txt": "--data my.txt --max-tokens 200",
}
ONLY_EVAL = "--max-tokens 200"


def smaller(command: str) -> str:
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    return command if command.startswith("bdlm eval") else command.replace(f" {ONLY_EVAL}", "")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    """A working folder with the reader's text; what the README calls `shakespeare` is the tiny
    model there."""
    folder = tmp_path_factory.mktemp("scheduler")
    shutil.copytree(tiny_model, folder / "shakespeare")
    shutil.copy(text_file, folder / "my.txt")
    return folder


def test_the_readme_was_read() -> None:
    assert set(COMMANDS) >= TOO_LONG
    assert len(COMMANDS) >= 10
    assert len(PROGRAMS) >= 2


def test_commands_run_in_order(scheduler: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for command in COMMANDS:
        if command in TOO_LONG:
            continue
        done = subprocess.run(
            shlex.split(smaller(command)), cwd=scheduler, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip(), command


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(
    program: str,
    scheduler: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(scheduler)
    exec(
        compile(re.sub(r"max_new_tokens=\d+", "max_new_tokens=8", program), "README.md", "exec"), {}
    )
    assert capsys.readouterr().out.strip()


def test_make_targets() -> None:
    rules = (ROOT / "Makefile").read_text()
    for command in TOO_LONG:
        assert re.search(rf"^{command.split()[1]}:", rules, re.MULTILINE)


def test_every_named_proof_is_a_test() -> None:
    named = re.findall(r"`(tests/\S+?)::(\w+)`", (ROOT / "docs" / "proofs.md").read_text())
    assert len(named) > 20
    wrong = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert not wrong


PAGES = [
    *ROOT.glob("*.md"),
    *(
        page
        for folder in ("docs", "results", "tests", "src")
        for page in (ROOT / folder).rglob("*.md")
    ),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_published_records_are_written_only_when_asked_for() -> None:
    """Defaults write to `runs/`, which git ignores; the published records in `results/` change only
    by --results."""
    from bdlm.commands.experiment import Options
    from benchmarks.common import FIGURES

    assert Options(what="list").results == "runs/results"
    assert FIGURES.relative_to(ROOT).parts[0] == "runs"
