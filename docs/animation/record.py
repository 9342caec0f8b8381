"""Record a real run of the packaged model and draw it as an animated SVG.

    python -m docs.animation.record

writes `docs/animation/live.svg`: the draft and text events of `lm.stream(..., drafts=True)`, one
frame each, slowed down to a speed at which one can follow them. The SVG is animated by SMIL, which
browsers also run inside an `<img>`; a viewer without animation shows the finished text.
"""

from __future__ import annotations

import argparse
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "ROMEO:\nBut, soft! what light"
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 62,
    "decoder": "interleaved",
    "gap": 4,
    "temperature": 0.7,
    "top_p": 0.9,
    "seed": 13,
}
COMMAND = (  # the same run on the command line, as the picture shows it
    "bdlm generate --model shakespeare --prompt $'ROMEO:\\nBut, soft! what light' \\",
    "    --max-new-tokens 62 --decoder interleaved --option gap=4 \\",
    "    --temperature 0.7 --top-p 0.9 --seed 13 --live",
)
COLUMNS = 82
CHARACTER, LINE, MARGIN = 8.4, 20, 20  # pixels
FRAME, PAUSE, REST = 0.28, 1.0, 4.0  # seconds: of a frame, before the first one, after the last one
MASK_WIDTH = 2  # columns of a masked cell
STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
.shell { fill: #8b949e } .prompt { fill: #e6edf3; font-weight: 600 } .text { fill: #e6edf3 }
.old { fill: #7ee787 } .new { fill: #0d1117 } .lit { fill: #7ee787 } .mask { fill: #484f58 }
"""


@dataclass(frozen=True)
class Cell:
    """A cell of the block being written. text: None while masked. new: filled in this frame."""

    text: str | None
    new: bool


@dataclass(frozen=True)
class Frame:
    """What the screen holds: the final text so far, the active block, and the last line."""

    text: str
    cells: tuple[Cell, ...] = ()
    summary: str = ""


def record(lm: Any, prompt: str, **options: Any) -> list[Frame]:
    """Run `lm.stream` and return one frame for each event that changes the screen."""
    text, before, frames = "", (), []
    for chunk in lm.stream(prompt, drafts=True, **options):
        if chunk.kind == "draft":
            old = before if len(before) == len(chunk.cells) else (None,) * len(chunk.cells)
            cells = (Cell(now, was is None) for now, was in zip(chunk.cells, old, strict=True))
            frames.append(Frame(text, tuple(cells)))
            before = chunk.cells
        elif chunk.kind == "text":
            text, before = text + chunk.text, ()
            frames.append(Frame(text))
        else:
            done = chunk.result
            counts = f"{done.tokens} tokens in {done.forward_passes} forward passes"
            rate = f"{done.tokens_per_forward:.2f} tokens per forward"
            frames.append(Frame(text, (), f"{counts} ({rate})"))
    return frames


def draw(prompt: str, frames: list[Frame], command: tuple[str, ...] = COMMAND) -> str:
    """The frames as one looping SVG. Each frame is a group that is visible for its share of it."""
    starts = [PAUSE + FRAME * i for i in range(len(frames))]
    total = starts[-1] + REST
    top = len(command) + 1  # the first row of the text
    body = [_shell(("$ " if i == 0 else "  ") + line, i) for i, line in enumerate(command)]
    body += _lines(prompt, "prompt", 0, top)[0]
    rows, shown, place = top, "", _after(prompt, 0, top)
    for i, frame in enumerate(frames):
        last = i + 1 == len(frames)
        end = total if last else starts[i + 1]
        if added := frame.text[len(shown) :]:
            lines, place = _lines(added, "text", *place)
            body.append(_visible(lines, starts[i], total, total, kept=True))
            shown = frame.text
        if frame.cells:
            cells, lowest = _cells(frame.cells, *place)
            body.append(_visible(cells, starts[i], end, total))
            rows = max(rows, lowest)
        if frame.summary:
            rows = max(rows, place[1] + 2)
            body.append(_visible([_shell(frame.summary, rows)], starts[i], total, total, kept=True))
    return _document(body, rows + 1, command)


def _document(body: list[str], rows: int, command: tuple[str, ...]) -> str:
    width, height = 2 * MARGIN + COLUMNS * CHARACTER, 2 * MARGIN + rows * LINE
    box = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">',
            "<title>A block diffusion model writing: each block of eight tokens fills in any order"
            "</title>",
            # two hyphens may not stand in an XML comment
            f"<!-- {' '.join(command).replace('--', '- -')}",
            "     recorded and drawn by: python -m docs.animation.record -->",
            f"<style>{STYLE}</style>",
            '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
            *body,
            "</svg>\n",
        ]
    )


def _visible(parts: list[str], start: float, end: float, total: float, kept: bool = False) -> str:
    """A group that shows from `start` to `end` of each loop. kept: also shown without animation."""
    times, values = [0.0, start / total], ["hidden", "visible"]
    if end < total:
        times.append(end / total)
        values.append("hidden")
    keys = ";".join(f"{time:.4f}".rstrip("0").rstrip(".") or "0" for time in times)
    animation = (
        f'<animate attributeName="visibility" calcMode="discrete" values="{";".join(values)}" '
        f'keyTimes="{keys}" dur="{total:.2f}s" repeatCount="indefinite"/>'
    )
    state = "visible" if kept else "hidden"
    return f'<g visibility="{state}">{animation}{"".join(parts)}</g>'


def _cells(cells: tuple[Cell, ...], column: int, row: int) -> tuple[list[str], int]:
    """The active block from a place of the screen on; also the last row that it reaches."""
    parts = []
    for cell in cells:
        shown = None if cell.text is None else cell.text.replace("\n", "⏎")
        width = MASK_WIDTH if shown is None else len(shown)
        if column + width > COLUMNS:
            column, row = 0, row + 1
        x, y = MARGIN + column * CHARACTER, MARGIN + row * LINE
        if shown is None or cell.new:
            inset = 1 if shown is None else 0
            size = f'x="{x + inset:.1f}" y="{y + 1}" width="{width * CHARACTER - 2 * inset:.1f}"'
            kind = "mask" if shown is None else "lit"
            parts.append(f'<rect class="{kind}" {size} height="{LINE - 3}" rx="2"/>')
        if shown:
            parts.append(_word(shown, "new" if cell.new else "old", column, row))
        column += width
    return parts, row


def _lines(text: str, kind: str, column: int, row: int) -> tuple[list[str], tuple[int, int]]:
    """Final text from a place of the screen on, a word at a time, and the place after it."""
    parts = []
    for i, line in enumerate(text.split("\n")):
        if i:
            column, row = 0, row + 1
        while line:
            room = max(COLUMNS - column, 1)
            piece, line = line[:room], line[room:]
            if piece.strip():
                parts.append(_word(piece, kind, column, row))
            column += len(piece)
            if line:
                column, row = 0, row + 1
    return parts, (column, row)


def _after(text: str, column: int, row: int) -> tuple[int, int]:
    return _lines(text, "text", column, row)[1]


def _shell(line: str, row: int) -> str:
    return _word(line, "shell", 0, row)


def _word(text: str, kind: str, column: int, row: int) -> str:
    """A run of characters, forced to the width of its columns in any font."""
    x, y = MARGIN + column * CHARACTER, MARGIN + row * LINE + 15
    length = f'textLength="{len(text) * CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
    head = f'<text class="{kind}" x="{x:.1f}" y="{y}" {length} xml:space="preserve">'
    return f"{head}{html.escape(text, quote=False)}</text>"


def main() -> None:
    import bdlm

    parser = argparse.ArgumentParser(description="Record a run as an animated SVG.")
    parser.add_argument("--model", default="shakespeare")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("live.svg"))
    chosen = parser.parse_args()
    frames = record(bdlm.load(chosen.model), PROMPT, **OPTIONS)
    chosen.out.write_text(draw(PROMPT, frames), encoding="utf-8")
    print(f"{chosen.out}: {len(frames)} frames, {chosen.out.stat().st_size / 1024:.0f} kB")
    print(PROMPT + frames[-1].text)


if __name__ == "__main__":
    main()
