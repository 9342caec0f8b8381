"""Shared by the command-line tests: run one command in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bdlm import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bdlm(capsys: pytest.CaptureFixture[str]) -> Run:
    """`bdlm("eval", "--json", ...)` -> (exit code, stdout, stderr), in this process."""

    def call(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
