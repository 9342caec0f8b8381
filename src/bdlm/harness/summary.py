"""The summary of a sweep: a row for each point, the front, AUP, the fastest decoder at no
measurable loss; as JSON and as a Markdown page.

In: measured points and their settings. Out: a `Summary`, plain values, text. Knows nothing about
models; the figures are in `figures`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from bdlm.core.errors import DataError
from bdlm.harness.frontier import MeasuredPoint
from bdlm.harness.frontier_statistics import (
    MeanWithErrors,
    PairedDifference,
    accuracy,
    at_equal_entropy,
    aup,
    front,
    mean_of,
    paired,
)
from bdlm.harness.sweeps import REFERENCE, SweepPoint

BOUND = 0.05  # nats per judge token: a loss below this counts as none


@dataclass(frozen=True)
class SummaryRow:
    """One point. quality = log_perplexity - entropy, nats per judge token, lower is better; excess:
    over the reference, paired.

    tokens_per_forward: tokens over forward passes, of all texts. tokens_per_second: of the engine
    with all texts of a batch together. at_equal_entropy: log perplexity less that of first-hitting
    at the temperature of the same entropy (`frontier_statistics.at_equal_entropy`). tokens: mean
    length. forward_passes: mean of a text. accuracy: `frontier_statistics.accuracy`, for AUP."""

    point: SweepPoint
    tokens_per_forward: float
    tokens_per_second: float
    log_perplexity: MeanWithErrors
    entropy: MeanWithErrors
    quality: MeanWithErrors
    excess: PairedDifference
    at_equal_entropy: float | None
    accuracy: float
    distinct_2: float
    repetition_4: float
    tokens: float
    forward_passes: float
    finish: dict[str, int]
    on_front: bool = False

    @property
    def label(self) -> str:
        return f"{self.point.decoder} {self.point.setting}{self._cold}".rstrip()

    @property
    def curve(self) -> str:
        """The decoder, and the temperature where that is neither 1 nor swept: points of one curve
        differ in its knob alone."""
        return f"{self.point.decoder}{self._cold}"

    @property
    def _cold(self) -> str:
        return (
            ""
            if self.point.knob == "temperature" or self.point.temperature == 1
            else f" T {self.point.temperature:g}"
        )


@dataclass(frozen=True)
class Summary:
    """The results of a sweep. rows: in order of decoder. aup: of each decoder. best: the fastest
    row whose excess has an upper bound of at most `BOUND`."""

    settings: dict[str, Any]
    rows: list[SummaryRow]
    aup: dict[str, float]
    best: SummaryRow | None
    left_out: list[str]

    @property
    def reference(self) -> SummaryRow:
        return next(r for r in self.rows if r.point.key == REFERENCE.key)

    @property
    def front(self) -> list[SummaryRow]:
        """The rows on the front, slowest first."""
        return sorted((r for r in self.rows if r.on_front), key=lambda r: r.tokens_per_forward)

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(r), "point": r.point.to_json()} for r in self.rows]
        return {
            "settings": self.settings,
            "bound": BOUND,
            "best": self.best and self.best.label,
            "front": [r.label for r in self.front],
            "aup": self.aup,
            "points": rows,
            "left_out": self.left_out,
        }


def summarise(
    measured: Sequence[MeasuredPoint], settings: dict[str, Any], left_out: Sequence[str] = ()
) -> Summary:
    """Summarise measured points. Raises DataError if the reference is not among them."""
    prompts = len(settings["prompts"])
    zero = next((m for m in measured if m.point.key == REFERENCE.key), None)
    if zero is None:
        raise DataError(
            "the sweep holds no point of first-hitting at temperature 1; every other point is"
            " compared with it"
        )
    exact = [m for m in measured if m.point.decoder == REFERENCE.decoder and not m.point.options]
    line = [(_mean(m.grid(m.entropy, prompts)), _mean(m.log_perplexity(prompts))) for m in exact]
    rows = [_row(m, zero, line, prompts) for m in measured]
    ahead = front([(r.tokens_per_forward, r.quality.mean) for r in rows])
    rows = [SummaryRow(**{**vars(r), "on_front": i in ahead}) for i, r in enumerate(rows)]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        # a colder sampler is not faster, so it is not on a curve of speed
        if row.point.knob != "temperature" or row.point.temperature == 1:
            curves.setdefault(row.curve, []).append((row.tokens_per_forward, row.accuracy))
    top = max(r.accuracy for r in rows)
    areas = {name: aup(curve, top) for name, curve in curves.items()}
    good = [
        r
        for r in rows
        if r.point.key == REFERENCE.key or (r.excess.upper is not None and r.excess.upper <= BOUND)
    ]
    best = max(good, key=lambda r: r.tokens_per_forward, default=None)
    return Summary(
        settings, rows, dict(sorted(areas.items(), key=lambda a: -a[1])), best, list(left_out)
    )


def _mean(values: Tensor) -> float:
    return mean_of(values).mean


def _row(
    m: MeasuredPoint, zero: MeasuredPoint, line: Sequence[tuple[float, float]], prompts: int
) -> SummaryRow:
    """Make the row of a point. line: (entropy, log perplexity) of first-hitting at its
    temperatures."""
    quality = m.quality(prompts)
    entropy = m.grid(m.entropy, prompts)
    crossed = m.log_perplexity(prompts)
    excess = paired(quality, zero.quality(prompts))
    return SummaryRow(
        point=m.point,
        tokens_per_forward=sum(m.tokens) / max(sum(m.forward_passes), 1),
        tokens_per_second=sum(m.tokens) / max(m.seconds, 1e-9),
        log_perplexity=mean_of(crossed),
        entropy=mean_of(entropy),
        quality=mean_of(quality),
        excess=excess,
        at_equal_entropy=at_equal_entropy(_mean(entropy), _mean(crossed), line),
        accuracy=accuracy(excess.mean),
        distinct_2=m.distinct_2,
        repetition_4=m.repetition_4,
        tokens=sum(m.tokens) / len(m.tokens),
        forward_passes=sum(m.forward_passes) / len(m.forward_passes),
        finish=m.finish,
    )


# -- the page --------------------------------------------------------------------------------------

COLUMNS = (
    "decoder",
    "knob",
    "T",
    "tokens / forward",
    "tokens / s",
    "log gen. perplexity",
    "entropy",
    "quality",
    "± texts",
    "± seeds",
    "excess",
    "95 % below",
    "at equal entropy",
    "distinct-2",
    "repeated 4-grams",
    "front",
)


def page(summary: Summary, command: str = "", figures: Sequence[str] = ()) -> str:
    """Write the whole result as self-contained Markdown. command: the command that made it.
    figures: files next to the page."""
    s = summary.settings
    size = (
        f"{len(s['prompts'])} prompts x {s['seeds']} seeds = {len(s['prompts']) * s['seeds']} texts"
        f" of {s['max_new_tokens']} tokens"
    )
    cells = [_cells(r) for r in summary.rows]
    parts = [
        "# Decoders of one model: speed against quality",
        (
            f"Model: {s['model']}, blocks of {s['block_size']}, {s['dtype']}, {s['device']}. Judge:"
            f" {s['judge']}. {size} a point, {s['batch']} at once."
        ),
        *([f"Made by `{command}`."] if command else []),
        verdict(summary),
        *[f"![{name}]({name})" for name in figures],
        HOW,
        _table(COLUMNS, cells),
        "## Area under accuracy against parallelism (AUP)",
        AUP,
        _table(("decoder", "AUP"), [(name, f"{area:.1f}") for name, area in summary.aup.items()]),
    ]
    if summary.left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in summary.left_out)]
    return "\n\n".join(parts) + "\n"


HOW = (
    "Quality = log generative perplexity of the new tokens given the prompt less the entropy of"
    " each text's own tokens, both in nats per token of the judge; lower is better. Excess ="
    " quality less that of first-hitting at temperature 1 (the exact sampler) on the same prompts"
    " and seeds; `95 % below` is the upper end of a one-sided interval, the prompt being the unit."
    " `± texts` is one standard error had other prompts been drawn, `± seeds` had other seeds been"
    " drawn for these prompts. Tokens per forward count every forward pass that a text took part"
    " in; tokens per second are of the whole engine with all texts of a batch together. The entropy"
    " of a text's tokens replaces that of the sampler, which is unknown: compare decoders of"
    " this table with each other, not with other models. Sampling colder lowers this quality too"
    " (see first-hitting at T below 1), so `at equal entropy` is the log perplexity less that of"
    " first-hitting at the temperature that has the same entropy, interpolated, `-` outside its"
    " temperatures: below 0 the decoder is better than a colder exact sampler. A decoder that"
    " repeats itself shows in the last columns. The front: no other point is as fast and better."
    " The best of many points looks better than it is, because it was chosen: measure it again on"
    " other seeds (`--front-only --seed N`)."
)
AUP = (
    "Area under accuracy over tokens per forward, as d3LLM defines it for tasks. The"
    " accuracy used here is ours: 100 exp(-excess), 100 where the excess is negative; the"
    " published weight exp(-3 (1 - y / best)) and the cut of 5 % below a decoder's slowest point"
    " are kept (how the flat part up to that point is weighted is inferred). Higher is better."
)


def verdict(summary: Summary) -> str:
    """Name the fastest point at no measurable loss in one sentence."""
    best = summary.best
    assert best is not None  # the reference is always good
    if best.point.key == REFERENCE.key:
        return (
            f"No point but the reference ({best.tokens_per_forward:.2f} tokens per forward) has an"
            f" excess of at most {BOUND} nats at 95 %."
        )
    return (
        f"Fastest with an excess of at most {BOUND} nats at 95 %: **{best.label}**,"
        f" {best.tokens_per_forward:.2f} tokens per forward (first-hitting:"
        f" {summary.reference.tokens_per_forward:.2f}); excess {best.excess.mean:+.3f}, at equal"
        f" entropy {_number(best.at_equal_entropy, '+.3f')}."
    )


def _cells(r: SummaryRow) -> tuple[str, ...]:
    return (
        r.point.decoder,
        r.point.setting if r.point.knob != "temperature" else "",
        f"{r.point.temperature:g}",
        f"{r.tokens_per_forward:.2f}",
        f"{r.tokens_per_second:,.0f}",
        f"{r.log_perplexity.mean:.3f}",
        f"{r.entropy.mean:.3f}",
        f"{r.quality.mean:.3f}",
        _number(r.quality.stderr_texts),
        _number(r.quality.stderr_seeds),
        f"{r.excess.mean:+.3f}",
        _number(r.excess.upper, "+.3f"),
        _number(r.at_equal_entropy, "+.3f"),
        f"{r.distinct_2:.3f}",
        f"{r.repetition_4:.3f}",
        "yes" if r.on_front else "",
    )


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
