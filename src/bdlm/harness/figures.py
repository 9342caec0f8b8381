"""The figures of a frontier: speed against quality, and entropy against perplexity; every decoder's
points with error bars, labelled.

In: a `Summary` and the name of a figure. Out: a self-contained PNG. Knows nothing about models or
the files of a sweep."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdlm.core.errors import pick
from bdlm.data.files import write_figure
from bdlm.harness.frontier_statistics import MeanWithErrors, front
from bdlm.harness.summary import BOUND, Summary, SummaryRow

MARKERS = "osD^vP*X<>hpd"
WIDTH, LINE = 11.0, 150  # inches of a figure, characters of a line of its caption
# shown: at most so many nats above the reference, at least this share of its entropy
TALL, NARROW = 1.5, 0.85
# of the axes: points of the front closer than this to the last one named are not named
NEAR = 0.045


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure. across, up: the values of a row on the axes. named: whether the front is
    drawn and named."""

    across: Callable[[SummaryRow], float]
    up: Callable[[SummaryRow], MeanWithErrors]
    x: str
    y: str
    title: str
    about: str
    named: bool = True


QUALITY = "log generative perplexity − entropy\n(nats per token of the judge; ↓ lower is better)"
MADE_OF = (
    "Quality: the judge's log perplexity of a text given its prompt less the entropy of the text's"
    " own tokens, mean over texts."
)
FIGURES: dict[str, FigureKind] = {
    "forward-passes": FigureKind(
        lambda r: r.tokens_per_forward,
        lambda r: r.quality,
        "tokens per forward pass (→ more is faster)",
        QUALITY,
        "Decoders of one model: tokens per forward against quality",
        "Speed: new tokens over all forward passes that a text took part in, cache writes"
        f" included. {MADE_OF}",
    ),
    "seconds": FigureKind(
        lambda r: r.tokens_per_second,
        lambda r: r.quality,
        "tokens per second of the engine (→ more is faster)",
        QUALITY,
        "Decoders of one model: tokens per second against quality",
        f"Speed: new tokens of all texts over the engine's seconds. {MADE_OF}",
    ),
    "entropy": FigureKind(
        lambda r: r.entropy.mean,
        lambda r: r.log_perplexity,
        "entropy of a text's tokens (nats; → more is more varied)",
        "log generative perplexity\n(nats per token of the judge; ↓ lower is more likely)",
        "Decoders of one model: variety against likelihood",
        "Perplexity: under the judge, given the prompt. Black: first-hitting, the exact sampler,"
        " from cold to warm; texts of a point below the black line are more likely than exact"
        " samples that vary as much, above it less.",
        named=False,
    ),
}


def draw(summary: Summary, name: str, path: Path) -> Path:
    """Draw the figure of a name of `FIGURES`; the file is written atomically. Returns its path.
    Raises ConfigError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = pick("figure", name, FIGURES)
    figure: Any = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = _curves(summary.rows)
    _points(axes, curves, kind, summary.aup)
    cut = _cropped(axes, summary, kind)
    if kind.named:
        _reference(axes, summary.reference)
        _front(axes, summary.rows, kind)
    else:
        exact = sorted(curves["first-hitting (temperature)"], key=kind.across)
        axes.plot(
            [kind.across(r) for r in exact],
            [kind.up(r).mean for r in exact],
            color="black",
            linewidth=1.6,
            zorder=3,
        )
    axes.set(xlabel=kind.x, ylabel=kind.y, title=kind.title)
    axes.grid(alpha=0.25)
    title = "decoder (swept option), AUP" if kind.named else "decoder (swept option)"
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5, title=title
    )
    figure.text(0.01, -0.01, caption(summary, kind, cut), fontsize=8.5, va="top")
    write_figure(path, figure, tight=True)
    return path


def _cropped(axes: Any, summary: Summary, kind: FigureKind) -> int:
    """Crop points that are far worse than the rest, so that the rest stays readable. Returns the
    number of hidden points."""
    zero = summary.reference
    if kind.named:
        top = zero.quality.mean + TALL
        axes.set_ylim(top=min(axes.get_ylim()[1], top))
        return sum(r.quality.mean > top for r in summary.rows)
    least = zero.entropy.mean * NARROW
    shown, right = (
        [r.entropy.mean for r in summary.rows if r.entropy.mean >= least],
        axes.get_xlim()[1],
    )
    axes.set_xlim(left=min(shown) - 0.05 * (right - min(shown)))
    return sum(r.entropy.mean < least for r in summary.rows)


def _curves(rows: Sequence[SummaryRow]) -> dict[str, list[SummaryRow]]:
    """Group the rows by decoder and temperature, under the name in the legend."""
    curves: dict[str, list[SummaryRow]] = {}
    for row in rows:
        knob = f" ({row.point.knob})" if row.point.knob else ""
        curves.setdefault(row.curve + knob, []).append(row)
    return curves


def _points(
    axes: Any, curves: dict[str, list[SummaryRow]], kind: FigureKind, areas: dict[str, float]
) -> None:
    """Draw one colour and marker for each curve, its points joined in order of the knob."""
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    for i, (name, own) in enumerate(curves.items()):
        # the others are in order of their knob
        own = sorted(own, key=lambda r: r.point.temperature)
        style = {
            "color": palette(i * 2 % 20 + i // 10 % 2),
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
        }
        axes.errorbar(
            [kind.across(r) for r in own],
            [kind.up(r).mean for r in own],
            yerr=[_error(kind.up(r)) for r in own],
            linewidth=0.9,
            elinewidth=0.9,
            capsize=2,
            alpha=0.85,
            zorder=2,
            label=f"{name}, {areas[own[0].curve]:.0f}" if kind.named else name,
            **style,
        )


def _error(value: MeanWithErrors) -> float:
    return value.stderr_seeds or value.stderr_texts or 0.0


def _reference(axes: Any, zero: SummaryRow) -> None:
    axes.axhline(zero.quality.mean, color="0.35", linewidth=0.9, linestyle="--", zorder=1)
    axes.axhspan(
        zero.quality.mean, zero.quality.mean + BOUND, color="0.5", alpha=0.18, linewidth=0, zorder=0
    )


def _front(axes: Any, rows: Sequence[SummaryRow], kind: FigureKind) -> None:
    """Ring and join the points that no other beats at their speed; name them where there is
    room."""
    ahead = [rows[i] for i in front([(kind.across(r), kind.up(r).mean) for r in rows])]
    places = [(kind.across(r), kind.up(r).mean) for r in ahead]
    axes.plot(
        *zip(*places, strict=True),
        color="black",
        linewidth=1.6,
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgewidth=1.3,
        zorder=3,
        label="front: none as fast is better",
    )
    to_share = axes.transLimits.transform
    last = None
    # the fast end is what a reader looks for
    for row, place in reversed(list(zip(ahead, places, strict=True))):
        x, y = to_share(place)
        if y > 1:
            continue
        if last is not None and abs(x - last[0]) < 4 * NEAR and abs(y - last[1]) < NEAR:
            continue
        last = x, y
        left = x > 0.8
        axes.annotate(
            row.label,
            place,
            xytext=(-9 if left else 9, -9),
            textcoords="offset points",
            fontsize=8.5,
            va="top",
            ha="right" if left else "left",
            zorder=4,
        )


def caption(summary: Summary, kind: FigureKind, cut: int) -> str:
    """Describe the figure for a reader who has nothing else. cut: number of points outside it."""
    s, zero = summary.settings, summary.reference
    texts, over = (
        len(s["prompts"]) * s["seeds"],
        ("seeds for these prompts" if s["seeds"] > 1 else "prompts"),
    )
    size = (
        f"{texts} texts of {s['max_new_tokens']} tokens ({len(s['prompts'])} prompts x {s['seeds']}"
        " seeds)"
    )
    dashed = (
        f" Dashed: first-hitting, the exact sampler, at temperature 1 ({zero.quality.mean:.3f});"
        f" grey band: up to {BOUND} nats above it. Black: the front. AUP (legend): area of accuracy"
        " over tokens per forward, 100 exp(-nats above the dashed line) playing accuracy."
    )
    words = (
        f"Each point is one setting of one decoder of the model {s['model']}, blocks of"
        f" {s['block_size']}, on {s['device']}: {size}, {min(s['batch'], texts)} at once."
        f" {kind.about} Judge: {s['judge']}. Bars: one standard error over"
        f" {over}.{dashed if kind.named else ''} The entropy of a text stands in for the sampler's,"
        " so only points of this figure"
        f" compare.{f' Much worse points that lie outside: {cut}.' if cut else ''}"
    )
    return "\n".join(textwrap.wrap(words, LINE))
