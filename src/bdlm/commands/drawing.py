"""Draw attention masks: as characters for a terminal, or as a PNG file.

In: a boolean matrix, and where its clean copy begins. Out: text or a file. Knows nothing about how
visibility is decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bdlm.data.files import write_figure

CLEAN_KEY, NOISY_KEY, HIDDEN = "██", "▓▓", "· "


def text(visible: list[list[bool]], names: list[str], clean_from: int) -> str:
    """Draw the mask as characters, one line per query.

    visible: [queries][keys]. names: the label of each cell. clean_from: index of the first clean
    cell."""
    width = max(map(len, names))
    head = " " * (width + 1) + "".join(f"{n[-2:]:>2}" for n in names)
    rows = [head]
    for name, row in zip(names, visible, strict=True):
        cells = (
            CLEAN_KEY if k >= clean_from else NOISY_KEY if seen else HIDDEN
            for k, seen in enumerate(row)
        )
        rows.append(
            f"{name:>{width}} "
            + "".join(c if s else HIDDEN for c, s in zip(cells, row, strict=True))
        )
    return "\n".join(
        [
            *rows,
            "",
            (
                f"{NOISY_KEY} sees a noisy cell   {CLEAN_KEY} sees a clean cell   {HIDDEN.strip()}"
                " does not see the cell"
            ),
        ]
    )


def png(visible: list[list[bool]], clean_from: int, title: str, caption: str, path: Path) -> Path:
    """Write the mask to a PNG file, whole or not at all. Returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    kinds = [
        [(2 if k >= clean_from else 1) if seen else 0 for k, seen in enumerate(row)]
        for row in visible
    ]
    figure: Any = Figure(figsize=(6.4, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(
        kinds,
        cmap=ListedColormap(["#f4f4f2", "#e0a030", "#30608f"]),
        vmin=0,
        vmax=2,
        interpolation="nearest",
    )
    if 0 < clean_from < len(visible):
        axes.axhline(clean_from - 0.5, color="0.2", linewidth=0.8)
        axes.axvline(clean_from - 0.5, color="0.2", linewidth=0.8)
    axes.set_xlabel("key cell (noisy copy, then clean copy)" if clean_from else "key cell")
    axes.set_ylabel("query cell")
    axes.set_title(title)
    figure.text(0.01, -0.01, caption, fontsize=8, va="top", wrap=True)
    write_figure(path, figure, tight=True)
    return path
