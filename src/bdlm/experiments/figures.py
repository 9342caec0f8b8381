"""The figures of experiments: one value per row with its error over runs, or a curve per row, from
records alone.

In: a `Figure` of a plan and the records of each row. Out: a PNG with axes, units and a legend.
Knows nothing about plans beyond the figure."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from bdlm.core.errors import ConfigError
from bdlm.data.files import write_figure
from bdlm.experiments.plan import Figure
from bdlm.experiments.run_statistics import collect, error

MARKERS = "osD^vP*X<>"


def draw(figure: Figure, rows: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Draw the figure; the file is written atomically. rows: label -> records. Raises ConfigError
    for an unknown kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    if figure.kind not in KINDS:
        raise ConfigError(
            f"figure '{figure.name}' is of kind '{figure.kind}'; use {' or '.join(KINDS)}"
        )
    canvas: Any = Canvas(figsize=(8.0, 4.8), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    KINDS[figure.kind](axes, figure, {label: found for label, found in rows.items() if found})
    axes.set(xlabel=figure.x, ylabel=figure.y, title=figure.title)
    if figure.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    write_figure(path, canvas)
    return path


def _points(axes: Any, figure: Figure, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Plot the mean over runs of one value, or of several ("bound=test.nats, exact=exact.nats"),
    with twice its standard error."""
    series = {
        name.strip(): value_path.strip()
        for name, _, value_path in (part.rpartition("=") for part in figure.value.split(","))
    }
    for number, (name, value_path) in enumerate(series.items()):
        found = [
            (place, collect(records, value_path)) for place, records in enumerate(rows.values())
        ]
        places = [
            place + 0.12 * (number - (len(series) - 1) / 2) for place, values in found if values
        ]
        kept = [values for _, values in found if values]
        bars = [2 * (error(values) or 0.0) for values in kept]
        axes.errorbar(
            places,
            list(map(fmean, kept)),
            yerr=bars,
            fmt=MARKERS[number],
            capsize=3,
            label=name or None,
        )
    axes.set_xticks(range(len(rows)), list(rows))
    if len(series) > 1:
        axes.legend()


def _lines(axes: Any, figure: Figure, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Plot a curve for each run, one colour per row. value: "measure.list:x:y[:error]", a list of
    mappings in the record."""
    value_path, x, y, *spread = figure.value.split(":")
    for number, (label, records) in enumerate(rows.items()):
        for nth, record in enumerate(records):
            points: Any = record["measures"]
            for key in value_path.split("."):
                points = points[key]
            bars = (
                {"yerr": [2 * (p[spread[0]] or 0.0) for p in points], "capsize": 2}
                if spread
                else {}
            )
            axes.errorbar(
                [p[x] for p in points],
                [p[y] for p in points],
                color=f"C{number}",
                marker=MARKERS[number % len(MARKERS)],
                markersize=3.5,
                linewidth=1.2,
                label=label if nth == 0 else None,
                **bars,
            )
    axes.legend()


KINDS = {"points": _points, "lines": _lines}
