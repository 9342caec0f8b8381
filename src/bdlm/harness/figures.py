"""The figures of a frontier: speed against quality, every decoder's points with error bars, the front drawn out and labelled.

In: a `Summary` and which speed. Out: a PNG that can stand alone. Knows nothing about models or files of a sweep.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bdlm.core.errors import ConfigError
from bdlm.harness.summary import BOUND, Row, Summary

MARKERS = "osD^vP*X<>hpd"
WINDOW = 12  # characters of a caption's line for each inch of the figure
SPEEDS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "calls": ("tokens per model call (more is faster →)", lambda r: r.tokens_per_call),
    "seconds": ("tokens per second of the engine, {batch} texts at once (more is faster →)", lambda r: r.tokens_per_second),
}


def draw(summary: Summary, speed: str, path: Path) -> Path:
    """Draw one figure; the file is made beside and renamed. speed: "calls" or "seconds". Returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if speed not in SPEEDS:
        raise ConfigError(f"speed is '{speed}'; use {' or '.join(SPEEDS)}")
    label, fast = SPEEDS[speed]
    figure: Any = Figure(figsize=(11, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    zero = summary.reference.quality.mean
    axes.axhline(zero, color="0.35", linewidth=0.9, linestyle="--", zorder=1)
    axes.axhspan(zero, zero + BOUND, color="0.5", alpha=0.18, linewidth=0, zorder=0)
    _curves(axes, summary.rows, fast)
    _front(axes, summary.rows, fast)
    axes.set_xlabel(label.format(batch=min(summary.settings["batch"], len(summary.settings["prompts"]) * summary.settings["seeds"])))
    axes.set_ylabel("log generative perplexity − entropy\n(nats per token of the judge; ↓ lower is better)")
    axes.set_title("Decoders of one model: speed against quality")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, title="decoder (swept option)")
    figure.text(0.01, -0.01, caption(summary, speed), fontsize=8.5, va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=120, format="png", bbox_inches="tight")
    part.replace(path)
    return path


def _curves(axes: Any, rows: Sequence[Row], fast: Callable[[Row], float]) -> None:
    """One colour and marker for each decoder and temperature, its points joined in order of speed."""
    from matplotlib import colormaps

    curves: dict[str, list[Row]] = {}
    for row in rows:
        swept = row.point.knob == "temperature"
        name = row.point.decoder + (f" ({row.point.knob})" if row.point.knob else "")
        curves.setdefault(name if swept or row.point.temperature == 1 else f"{name}, T {row.point.temperature:g}", []).append(row)
    palette = colormaps["tab10"]
    for i, (name, own) in enumerate(curves.items()):
        own = sorted(own, key=fast)
        axes.errorbar(
            [fast(r) for r in own],
            [r.quality.mean for r in own],
            yerr=[_error(r) for r in own],
            color=palette(i % 10),
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=0.9,
            elinewidth=0.9,
            capsize=2,
            alpha=0.85,
            label=name,
            zorder=2,
        )


def _error(row: Row) -> float:
    return row.quality.stderr_seeds or row.quality.stderr_texts or 0.0


def _front(axes: Any, rows: Sequence[Row], fast: Callable[[Row], float]) -> None:
    """The points that no other beats at this speed, ringed, joined and named."""
    from bdlm.harness.measures import front

    ahead = [rows[i] for i in front([(fast(r), r.quality.mean) for r in rows])]
    axes.plot(
        [fast(r) for r in ahead], [r.quality.mean for r in ahead], color="black", linewidth=1.6, marker="o", markersize=10,
        markerfacecolor="none", markeredgewidth=1.3, zorder=3, label="front: none as fast is better",
    )  # fmt: skip
    for i, row in enumerate(ahead):
        low = i % 2 == 0
        axes.annotate(
            row.label, (fast(row), row.quality.mean), xytext=(6, -12 if low else -24), textcoords="offset points", fontsize=8,
            va="top", ha="left", zorder=4, arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkB": 5},
        )  # fmt: skip


def caption(summary: Summary, speed: str) -> str:
    """What the figure shows, for a reader who has nothing else."""
    s, zero = summary.settings, summary.reference
    texts = len(s["prompts"]) * s["seeds"]
    measured = (
        "Speed: new tokens over all model calls that a text took part in, cache writes included."
        if speed == "calls"
        else f"Speed: new tokens of all texts over the engine's seconds ({s['device']}, {s['dtype']})."
    )
    words = (
        f"Each point is one setting of one decoder of {s['model']}, blocks of {s['block_size']}: {texts} texts of {s['max_new_tokens']} "
        f"tokens ({len(s['prompts'])} prompts x {s['seeds']} seeds). {measured} Quality: the judge's log perplexity of the text given its "
        f"prompt less the entropy of the text's own tokens, mean over texts; judge: {s['judge']}. Bars: one standard error over seeds for "
        f"these prompts. Dashed: first-hitting, the exact sampler, at temperature 1 ({zero.quality.mean:.3f}); grey band: up to {BOUND} "
        "nats above it. Black: the front. The entropy of a text stands in for the sampler's, so only points of this figure compare with "
        "each other."
    )
    return "\n".join(textwrap.wrap(words, 11 * WINDOW + 20))
