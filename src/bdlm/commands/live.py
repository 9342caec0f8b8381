"""Show a text in the terminal while it is generated: final text plain, the active block as cells,
with masked cells dim and new ones highlighted.

In: an `LM` and a request. Out: the screen, and the record of the finished text. Where the output is
not a terminal, only final text is streamed. Knows nothing about how a text is generated."""

from __future__ import annotations

from typing import Any

from bdlm.commands.terminal import console

MASKED = "░░"


def show(lm: Any, prompt: str, **request: Any) -> Any:
    """Show one text as it is generated; returns its `RequestOutput`."""
    from rich.live import Live

    screen = console()
    if not screen.is_terminal:
        return _plain(lm, prompt, **request)
    page, result = Page(prompt), None
    with Live(console=screen, auto_refresh=False, vertical_overflow="visible") as live:
        for chunk in lm.stream(prompt, drafts=True, **request):
            if chunk.kind == "end":
                result = chunk.result
                continue
            lines = page.add(chunk)
            live.update(page.rest(), refresh=True)
            if lines is not None:
                live.console.print(lines, end="", soft_wrap=True)
    return result


def _plain(lm: Any, prompt: str, **request: Any) -> Any:
    print(prompt, end="", flush=True)
    result = None
    for chunk in lm.stream(prompt, drafts=False, **request):
        print(chunk.text, end="", flush=True)
        result = chunk.result or result
    print()
    return result


class Page:
    """Hold what is on the screen: the unfinished last line and the active block.

    Finished lines are returned once, by `add`."""

    def __init__(self, prompt: str) -> None:
        from rich.text import Text

        self._line = Text().append(prompt, style="bold")
        self._cells: tuple[str | None, ...] = ()
        self._before: tuple[str | None, ...] = ()

    def add(self, chunk: Any) -> Any:
        """Add a chunk; returns the lines that it finished, or None."""
        if chunk.kind == "draft":
            same = len(chunk.cells) == len(self._cells)
            self._before, self._cells = (
                (self._cells if same else (None,) * len(chunk.cells)),
                chunk.cells,
            )
            return None
        self._cells = self._before = ()
        self._line.append(chunk.text)
        cut = self._line.plain.rfind("\n") + 1
        if not cut:
            return None
        done, self._line = self._line.divide([cut])
        return done

    def rest(self) -> Any:
        """Render the unfinished line and the active block."""
        from rich.text import Text

        page: Text = self._line.copy()
        for now, before in zip(self._cells, self._before, strict=True):
            if now is None:
                page.append(MASKED, style="grey42")
            else:
                page.append(
                    now.replace("\n", "⏎"),
                    style="black on bright_green" if before is None else "green",
                )
        return page
