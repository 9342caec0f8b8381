"""Shared by all commands: help, internal errors, the installed program. And `bdlm info`, `data`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bdlm import cli
from tests.cli.conftest import Run


def test_info_and_mask(bdlm: Run, tiny_model: Path, tmp_path: Path) -> None:
    facts = json.loads(bdlm("info", "--model", tiny_model, "--json")[1])
    assert facts["block_size"] == 4
    assert facts["vocab_size"] == 258
    drawn = json.loads(bdlm("info", "--mask", "--length", 8, "--block-size", 2, "--json")[1])
    length, size = 8, 2
    # the paper's count of allowed pairs
    assert sum(map(sum, drawn["visible"])) == length * (length + size)
    picture = tmp_path / "mask.png"
    assert bdlm("info", "--mask", "--model", tiny_model, "--out", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_data_inspect(bdlm: Run, text_file: Path) -> None:
    facts = json.loads(bdlm("data", "inspect", "--data", text_file, "--length", 32, "--json")[1])
    assert facts["documents"] == 1
    assert facts["bytes"] == text_file.stat().st_size


def test_an_internal_error_is_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, bdlm: Run
) -> None:
    from bdlm.commands import info

    def broken(options: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(info, "run", broken)
    code, _, err = bdlm("info")
    assert code == 1
    assert "planted" in err
    assert len(err.strip().splitlines()) == 1
    monkeypatch.setenv("BDLM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["info"])


def test_every_command_explains_itself(bdlm: Run) -> None:
    listing = bdlm("--help")[1]
    for name in cli.COMMANDS:
        assert name in listing
        code, out, _ = bdlm(name, "--help")
        assert code == 0
        assert f"bdlm {name}" in out


def test_the_installed_command_runs() -> None:
    program = Path(sys.executable).with_name("bdlm")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("bdlm ")
