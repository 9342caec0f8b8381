"""Commands on real streams: closed, full, broken, in ASCII, and on a terminal that is interrupted.
Also the commands that the program prints for the user to copy."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bdlm import cli
from bdlm.commands import demo, terminal
from bdlm.data.files import write_atomically

BDLM = (sys.executable, "-m", "bdlm")


def started(
    words: Sequence[object], redirect: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command in its own process, with its streams redirected as a shell does."""
    line = " ".join(["exec", *map(terminal.shlex.quote, [*BDLM, *map(str, words)]), redirect])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, env=env, stdin=subprocess.DEVNULL, check=False
    )


def test_a_closed_pipe_ends_the_command() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*BDLM, "info"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_and_full_streams() -> None:
    assert (closed := started(["info"], ">&-")).returncode == 0 and closed.stderr == b""
    assert started(["info", "--model", "nowhere"], "2>&-").returncode == 2
    if Path("/dev/full").exists():
        full = started(["info"], ">/dev/full")
        assert (
            full.returncode == 2
            and full.stderr.startswith(b"bdlm: ")
            and len(full.stderr.splitlines()) == 1
        )


def test_standard_input_that_is_closed_or_not_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", "shakespeare", "--prompt", "-"]
    assert (
        closed := started(words, "<&-")
    ).returncode == 2 and b"standard input, which is closed" in closed.stderr
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert cli.run(words) == 2 and "not valid UTF-8 text (byte 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_terminal_that_only_shows_ascii(environment: dict[str, str]) -> None:
    drawn = started(["info", "--mask", "--length", "2", "--block-size", "2"], **environment)
    assert (
        drawn.returncode == 0
        and drawn.stdout.isascii()
        and b"####" in drawn.stdout
        and b"::::" in drawn.stdout
    )
    helped = started(["generate", "--help"], **environment)
    assert (
        helped.returncode == 0 and helped.stdout.isascii() and b"--max-new-tokens" in helped.stdout
    )
    wrong = started(["info", "--length", "ü"], **environment)
    assert wrong.returncode == 2 and wrong.stderr.isascii() and wrong.stderr.startswith(b"bdlm: ")


def test_square_brackets_and_colons_are_text(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[/b]" / ":smile:"
    shutil.copytree(tiny_model, folder)
    for words in (
        ["info", "--model"],
        ["generate", "--max-new-tokens", "3", "--prompt", "[/b][bold]", "--live", "--model"],
    ):
        assert cli.run([*words, str(folder)]) == 0
    out = capsys.readouterr().out
    assert "[/b]/:smile:" in re.sub(r"\s", "", out) and "[/b][bold]" in out


CURSOR = re.compile(rb"\x1b\[\?25[hl]")


@pytest.mark.parametrize(
    "words",
    [
        (
            "generate",
            "--model",
            "{model}",
            "--max-new-tokens",
            "100000",
            "--context-window",
            "16",
            "--option",
            "ignore_eos=true",
            "--live",
        ),
        ("eval", "--model", "{model}", "--data", "{text}", "--replicates", "100000"),
    ],
)
def test_an_interrupted_terminal_has_its_cursor_back(
    words: tuple[str, ...], tiny_model: Path, text_file: Path
) -> None:
    ours, theirs = pty.openpty()
    line = [word.format(model=tiny_model, text=text_file) for word in words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(
        [*BDLM, *line],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=env,
        start_new_session=True,
        # a shell's background jobs ignore Ctrl-C, and so would this one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    shown = b""
    try:
        while b"\x1b[?25l" not in shown:
            shown += os.read(ours, 4096)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        while True:
            shown += os.read(ours, 4096)
    except OSError:  # the other end is closed
        pass
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.returncode == 130 and b"interrupted" in shown
    assert CURSOR.findall(shown)[-1] == b"\x1b[?25h"
    assert b"Traceback" not in shown


def script(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return path


def test_the_command_to_copy_is_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed command is the typed one, or the bare name where the shell finds that program."""
    own, other = (
        script(tmp_path / "my env" / "bin" / "bdlm", "own"),
        script(tmp_path / "other" / "bdlm", "other"),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    for path, typed, expected in (
        (own.parent, own, "bdlm"),
        (other.parent, own, "'my env/bin/bdlm'"),
        (other.parent, Path("my env/bin/bdlm"), "'my env/bin/bdlm'"),
        (other.parent, tmp_path / "src/bdlm/__main__.py", "'my env/bin/bdlm'"),
        (own.parent, tmp_path / "src/bdlm/__main__.py", "bdlm"),
    ):
        monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
        monkeypatch.setattr(sys, "argv", [str(typed)])
        assert terminal.program() == expected
        assert (
            subprocess.run(
                terminal.program(), shell=True, capture_output=True, text=True, check=True
            ).stdout
            == "own\n"
        )
    monkeypatch.chdir(own.parent)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert terminal.program() == "./bdlm"
    monkeypatch.chdir(other.parent)
    assert terminal.program() == f"'{own}'"
    own.unlink()
    assert terminal.program() == f"'{own.with_name('python')}' -m bdlm"


def test_the_last_lines_of_the_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = script(tmp_path / ".venv" / "bin" / "bdlm", '"$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(own)])
    folder = Path("runs [1]") / ("long " * 20) / "demo-1"
    demo._close(folder, f"{folder}/model", terminal.console())
    lines = [line.split(":", 1)[-1].strip() for line in capsys.readouterr().out.splitlines()[-2:]]
    said = [
        subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout.strip()
        for line in lines
    ]
    assert said[0].startswith(f"generate --model {folder}/model --prompt KING LEAR")
    assert said[1] == f"train {folder}/config.json --max-minutes 10"


def test_a_pipe_is_written_into_not_replaced(tmp_path: Path) -> None:
    """A device is not replaced either: a file renamed over /dev/null would break other programs."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"content")
    assert os.read(reader, 100) == b"content" and pipe.is_fifo()
    os.close(reader)


def test_an_error_handler_for_other_errors_raises_them() -> None:
    terminal.prepare_streams()
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", errors="bdlm")
    assert "±█\ud800ü".encode("ascii", errors="bdlm") == b"+-#??"


def test_out_of_memory_is_an_error_that_the_user_can_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
        " to allocate 4 bytes"
    )
    for error in (MemoryError(), RuntimeError(said)):

        def command(name: str, error: Exception = error) -> Any:
            def refuse(words: Sequence[str]) -> None:
                raise error

            return SimpleNamespace(parse=refuse)

        monkeypatch.setattr(cli, "command", command)
        assert cli.run(["info"]) == 2 and "not enough memory" in capsys.readouterr().err
