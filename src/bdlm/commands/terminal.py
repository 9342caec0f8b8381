"""What the commands share about the terminal: streams that can always be written to, consoles that
print text as it is, our own name.

In: the process's standard streams and how it was started. Out: the same streams made safe, a rich
`Console`, a word to type. Knows nothing about what is printed."""

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

PLAIN = {  # what stands for our signs where the encoding does not have them
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
    """Error handler of the standard streams: a sign that cannot be encoded becomes one that can, or
    a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return (
        "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]),
        error.end,
    )


def prepare_streams() -> None:
    """Make standard output and error writable in any encoding, and where they are closed. Standard
    input is left as it is."""
    codecs.register_error("bdlm", _replaced)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before we started, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for as long as we run)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="bdlm")


def read_input(option: str) -> str:
    """All of standard input as text. option: which asked for it. Raises DataError where it is
    closed or not UTF-8."""
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
            f"standard input is not UTF-8 text (byte {error.start}); convert it, e.g. iconv -f"
            " latin1 -t utf-8"
        ) from None
    return text.replace("\r\n", "\n")


def drop_unwritten() -> None:
    """Before the process ends: write out what is buffered; what nobody takes is dropped, so that
    the interpreter does not complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_cursor() -> None:
    """Make the terminal's cursor visible: a live view or a bar hides it, and may have been
    interrupted before it could show it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream.isatty() and os.environ.get("TERM") != "dumb":
                stream.write(SHOW_CURSOR)
                stream.flush()
                return


def console(stderr: bool = False) -> Any:
    """A rich console that prints text as it is: square brackets are no markup, colons no emoji.
    Styles are set by `rich.text.Text`."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def program() -> str:
    """What to type to run this command again, from this folder: `bdlm` where the shell finds it,
    else its path."""
    typed = Path(sys.argv[0] if sys.argv else "")
    script = typed if typed.stem == "bdlm" else Path(sys.executable).with_name("bdlm")
    found = shutil.which("bdlm")
    if found is not None and Path(found).resolve() == script.resolve():
        return "bdlm"
    if script.is_file():
        return shlex.quote(near(script))
    return f"{shlex.quote(near(Path(sys.executable)))} -m bdlm"


def near(path: Path) -> str:
    """A path from the current folder, if it lies in it, else whole; with a slash, so that a shell
    takes it for a path."""
    whole = Path(os.path.abspath(path))  # without following links: .venv may be one
    here = Path.cwd()
    if here not in whole.parents:
        return str(whole)
    inside = str(whole.relative_to(here))
    return inside if os.sep in inside else os.path.join(".", inside)
