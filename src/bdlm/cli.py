"""The `bdlm` command: find the sub-command, read its options, run it, and turn an error into one
line and an exit code.

Exit codes: 0 success, 1 internal error, 2 an error that the user can fix, 130 interrupted, 141 the
output was closed by its reader. BDLM_DEBUG=1 shows whole tracebacks. A command's module is imported
only when that command runs; `bdlm --help` imports none."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from bdlm.commands.arguments import parse
from bdlm.commands.terminal import drop_unwritten, prepare_streams, show_cursor
from bdlm.core.errors import BdlmError, BdlmWarning, ConfigError, nearest

COMMANDS = {
    "demo": "train a small model, measure it, and watch the packaged model write",
    "generate": "generate text from a prompt, block by block",
    "eval": "measure the likelihood of a text under a model, with error bars",
    "train": "train a model from a recipe",
    "recipes": "list the packaged training recipes, or print one",
    "data": "show what a model will see of a text, or write the Shakespeare corpus",
    "info": "show what a model is, or draw its attention mask",
    "frontier": "compare decoders of a model: speed against judged quality",
    "variance": "measure the variance of the loss and gradient under mask distributions",
    "measure": "measure entropy, variety, repetition, copying and perplexity of texts",
    "experiment": "run plans of training runs and measurements, with reports and figures",
    "lm-eval": "run tasks of the EleutherAI evaluation harness (optional package lm-eval)",
    "bench": "compare speed and memory with the plain published algorithm",
}


def main() -> None:
    """Run the installed command and exit with its code."""
    wait_passively()
    prepare_streams()
    code = run(sys.argv[1:])
    drop_unwritten()
    sys.exit(code)


def wait_passively() -> None:
    """Make waiting threads sleep, unless the user chose otherwise: on a busy machine, threads that
    spin slow down the very threads that they wait for.

    OpenMP reads these settings when torch is loaded.
    """
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    if not {*settings, "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(settings)


def run(words: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit code."""
    try:
        code = _run(list(words))
        sys.stdout.flush()  # here, where a failure can still be reported
        return code
    except BrokenPipeError:
        return 141  # what a shell reports for a program that a closed pipe ended
    except KeyboardInterrupt:
        show_cursor()
        _say("bdlm: interrupted")
        return 130
    except BdlmError as error:
        return _report(str(error), 2)
    except OSError as error:
        where = (
            f"'{os.fsdecode(error.filename)}': " if isinstance(error.filename, str | bytes) else ""
        )
        return _report(
            f"{where}{error.strerror or error}; check the path, its permissions and the space on"
            " the disk",
            2,
        )
    except Exception as error:
        if _out_of_memory(error):
            return _report(
                "not enough memory; use a smaller model, batch or length, or fewer texts",
                2,
            )
        return _report(
            f"internal error: {type(error).__name__}: {error} (BDLM_DEBUG=1 shows where)", 1
        )


def _out_of_memory(error: Exception) -> bool:
    """Recognise the errors that Python, torch on CPUs and torch on accelerators raise when memory
    runs out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _run(words: list[str]) -> int:
    try:
        return _command(words)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise ConfigError(stop.code) from None
        return stop.code or 0


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"bdlm {version('bdlm')}")
        return 0
    module = command(words[0])
    own = getattr(module, "parse", None)
    options = own(words[1:]) if own else parse(module.Options, words[1:], f"bdlm {words[0]}")
    with _short_warnings():
        module.run(options)
    sys.stdout.flush()  # here a closed output can still be handled
    return 0


def command(name: str) -> ModuleType:
    """Import the module of a command. Raises ConfigError with the nearest name."""
    if name.startswith("-"):
        raise ConfigError(f"bdlm has no option '{name}'{nearest(name, ['--help', '--version'])}")
    if name not in COMMANDS:
        raise ConfigError(f"bdlm has no command '{name}'{nearest(name, COMMANDS)}")
    return importlib.import_module(f"bdlm.commands.{name.replace('-', '_')}")


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print this package's warnings in one line, and those of other packages unchanged."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: Any = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, BdlmWarning):
                with suppress(OSError):  # a closed error stream is not a reason to stop
                    _say(f"bdlm: {message}")
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _report(message: str, code: int) -> int:
    show_cursor()
    if os.environ.get("BDLM_DEBUG") == "1":
        raise
    # a value that the user typed may be of any length
    short = re.sub(r"(\S{100})\S{300,}(\S{40})", r"\1...\2", message)
    _say(f"bdlm: {' '.join(short.split())}")
    return code


def _say(line: str) -> None:
    """Print a line to standard error; where that is closed, the exit code has to do."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "bdlm - block diffusion language models: train, measure, sample",
            "",
            "usage: bdlm COMMAND [options]      (bdlm COMMAND --help describes the options)",
            "",
            *lines,
            "",
            (
                "start with:  bdlm demo    or    bdlm generate --model shakespeare --prompt 'KING"
                " LEAR' --decoder eb --temperature 0.7 --live"
            ),
        ]
    )
