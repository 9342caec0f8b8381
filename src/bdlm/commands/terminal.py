"""Prepare the terminal for the commands: streams that accept any text, consoles that print it
unchanged, and the name of the program.

In: the process's standard streams and how it was started. Out: the same streams made safe, a rich
`Console`, and what to type to run the program again. Knows nothing about what is printed."""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from bdlm.core.errors import DataError

PLAIN = {  # replacements for characters that the encoding does not have
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "×": "x",
    "█": "#",
    "▓": ":",
    "░": ".",
    "·": ".",
    "⏎": "/",
    "…": "...",
    "’": "'",
    "–": "-",
    "β": "b",
    "ω": "w",
    "²": "2",
    "─": "-",
    "━": "-",
    "│": "|",
    "╭": "+",
    "╮": "+",
    "╰": "+",
    "╯": "+",
}
SHOW_CURSOR = "\x1b[?25h"


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that cannot be encoded, by a similar one or a question mark (an error
    handler for streams)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return (
        "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]),
        error.end,
    )


def prepare_streams() -> None:
    """Make standard output and standard error writable in any encoding, and even when closed.
    Standard input is not changed."""
    codecs.register_error("bdlm", _replaced)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the process started, as by `>&-`
            devnull = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open until the end)
            setattr(sys, name, devnull)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="bdlm")


def read_input(option: str) -> str:
    """Read all of standard input as text.

    option: the option that asks for it, for messages. Raises DataError if the input is closed or
    not UTF-8."""
    if sys.stdin is None or sys.stdin.closed:
        raise DataError(
            f"{option} reads standard input, which is closed; give the text itself, or pipe it in"
        )
    raw = getattr(sys.stdin, "buffer", None)
    if raw is None:
        return sys.stdin.read()
    try:
        text: str = raw.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not valid UTF-8 text (byte {error.start}); convert it, for example"
            " with iconv -f latin1 -t utf-8"
        ) from None
    return text.replace("\r\n", "\n")


def drop_unwritten() -> None:
    """Write buffered output before the process ends, and drop it where the stream is closed.

    Otherwise the interpreter would print an error of its own at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_cursor() -> None:
    """Make the terminal's cursor visible: an interrupted live view or progress bar leaves it
    hidden."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream.isatty() and os.environ.get("TERM") != "dumb":
                stream.write(SHOW_CURSOR)
                stream.flush()
                return


def console(stderr: bool = False) -> Any:
    """Make a rich console that prints text unchanged: square brackets are not markup, and colons
    are not emoji. Set styles with `rich.text.Text`."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def program() -> str:
    """Find what to type in this folder to run the command again: `bdlm` if the shell finds it,
    otherwise its path."""
    typed = Path(sys.argv[0] if sys.argv else "")
    script = typed if typed.stem == "bdlm" else Path(sys.executable).with_name("bdlm")
    found = shutil.which("bdlm")
    if found is not None and Path(found).resolve() == script.resolve():
        return "bdlm"
    if script.is_file():
        return shlex.quote(near(script))
    return f"{shlex.quote(near(Path(sys.executable)))} -m bdlm"


def near(path: Path) -> str:
    """Write a path relative to the current folder if it is inside it, otherwise in full; always
    with a slash, so that a shell reads it as a path."""
    whole = Path(os.path.abspath(path))  # does not follow links, since .venv may be one
    here = Path.cwd()
    if here not in whole.parents:
        return str(whole)
    inside = str(whole.relative_to(here))
    return inside if os.sep in inside else os.path.join(".", inside)
