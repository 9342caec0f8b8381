"""The `bdlm` command: finds the sub-command, reads its options, runs it, and turns errors into one
line and an exit code.

Exit codes: 0 done, 1 an internal error, 2 something the user can mend, 130 interrupted, 141 nobody
reads the output any more. BDLM_DEBUG=1 shows whole tracebacks. Loads a command's file only when it
is asked for; `bdlm --help` loads none."""

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
    "demo": "train a small model live, measure it, watch the shipped one write",
    "generate": "write text, block by block",
    "eval": "likelihood of a text: nats per token with a standard error, perplexity, bits per byte",
    "frontier": (
        "decoders of one model compared: tokens per forward and per second against judged quality"
    ),
    "variance": "how much the loss and its gradient vary under distributions of noise",
    "experiment": "plans of training runs and measurements, resumable, with reports and figures",
    "measure": "entropy, variety, repetition, copying, perplexity of texts",
    "lm-eval": "tasks of the EleutherAI evaluation harness (optional package lm-eval)",
    "train": "train a model from a recipe",
    "recipes": "the training recipes that come with the package",
    "info": "what a model is; --mask draws who may see whom",
    "data": "inspect: what a model will see of a text",
    "bench": "speed and memory beside the plain published algorithm",
}


def main() -> None:
    """Entry point of the installed command."""
    wait_passively()
    prepare_streams()
    code = run(sys.argv[1:])
    drop_unwritten()
    sys.exit(code)


def wait_passively() -> None:
    """Let threads that wait for others sleep: spinning takes a busy machine's time from what they
    wait for. Settings of the user stand.

    OpenMP reads them when torch is loaded.
    """
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    if not {*settings, "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(settings)


def run(words: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit code."""
    try:
        code = _run(list(words))
        sys.stdout.flush()  # here, where a failure can still be told
        return code
    except BrokenPipeError:
        return 141  # as a shell tells it of a program that a closed pipe ended
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
                "there is not enough memory; use a smaller model, batch or length, or fewer texts",
                2,
            )
        return _report(
            f"an internal error: {type(error).__name__}: {error} (BDLM_DEBUG=1 shows where)", 1
        )


def _out_of_memory(error: Exception) -> bool:
    """Python, torch on CPUs and torch on accelerators each say it in their own way."""
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
    sys.stdout.flush()  # here a reader that has gone is still ours to deal with
    return 0


def command(name: str) -> ModuleType:
    """The file of a command; an unknown name is a `ConfigError` with the nearest one."""
    if name.startswith("-"):
        raise ConfigError(f"bdlm has no option '{name}'{nearest(name, ['--help', '--version'])}")
    if name not in COMMANDS:
        raise ConfigError(f"bdlm has no command '{name}'{nearest(name, COMMANDS)}")
    return importlib.import_module(f"bdlm.commands.{name.replace('-', '_')}")


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Our own warnings in one line; those of other packages as they are."""
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
                with suppress(OSError):  # nobody reads it any more, which is no reason to stop
                    _say(f"bdlm: {message}")
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _report(message: str, code: int) -> int:
    show_cursor()
    if os.environ.get("BDLM_DEBUG") == "1":
        raise
    # a value of any length was typed
    short = re.sub(r"(\S{100})\S{300,}(\S{40})", r"\1...\2", message)
    _say(f"bdlm: {' '.join(short.split())}")
    return code


def _say(line: str) -> None:
    """A line for people; if nobody can be told, the exit code has to do."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "bdlm - block diffusion language models: train, measure, sample",
            "",
            "usage: bdlm COMMAND [options]      bdlm COMMAND --help shows a command's options",
            "",
            *lines,
            "",
            (
                "start with:  bdlm demo    or    bdlm generate --model shakespeare --prompt 'KING"
                " LEAR' --decoder eb --top-p 0.9 --live"
            ),
        ]
    )
