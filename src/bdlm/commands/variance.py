"""`bdlm variance`: measure how much the loss and its gradient vary under mask distributions, and
search over intervals of mask rates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bdlm.core.errors import ConfigError
from bdlm.core.paths import user_path
from bdlm.core.validation import AtLeast, Count, Size
from bdlm.data.files import write_figure

if TYPE_CHECKING:
    from bdlm.likelihood.variance import BootstrapInterval, IntervalMap, VarianceEstimate


@dataclass(frozen=True)
class Options:
    """Measure the variance of a block's loss and of its gradient (Eq. 10 of the paper) under mask
    distributions, with bootstrap intervals.

    A mask distribution is an estimator, with a schedule if it has one: time, time:cosine,
    time:clipped:0.3,0.8, count, count:clipped:0.3,0.8, complementary, importance (the adaptive
    distribution of training, fitted on --fit-on), or all (every token masked). Clipped
    distributions are meant for training: the mean of their loss is not the bound."""

    model: str
    """A model folder, or the name of a packaged model."""
    data: tuple[str, ...]
    """Files (text, JSONL, JSON, CSV, TSV, Parquet), folders, or datasets as
    hf:name[:config][:split][:field]."""
    distributions: tuple[str, ...] = ("time", "count", "complementary")
    """Mask distributions to compare. The first one is the reference for the others."""
    fit_on: tuple[str, ...] = ()
    """Data to fit the counts of distribution importance on, other than --data."""
    batches: Count = 30
    """Number of batches for the variance of the loss, 1 or more."""
    gradient_batches: Annotated[int, AtLeast(0)] = 0
    """Number of batches for the variance of the gradient, an even number; each costs a backward
    pass. 0 leaves the gradient out."""
    batch_size: Size = 16
    """Windows of a batch, 1 to 2^24."""
    block_size: Count | None = None
    """Tokens of a block; default the model's own. The weights do not depend on it."""
    search: bool = False
    """Compare the paper's 36 intervals of mask rates in place of --distributions."""
    heat_map: str | None = None
    """Compare all intervals on a grid of 0.1 in place of --distributions, and draw them to this PNG
    file."""
    length: Size | None = None
    """Tokens of a window, 1 to 2^24; default the training length."""
    field: str = "text"
    """Where the text is: a key of JSON records (meta.body if nested), or a column of a CSV or TSV
    file (a name or number; 2+3 joins two)."""
    split: str = "file"
    """Where a text file is cut into documents: file (nowhere), line, paragraph, article (of
    WikiText), or any other separator, given as text."""
    bad_records: float = 0.01
    """How many broken records (null, empty or not readable) may be left out, 0 or more: a share of
    all records if below 1, else their number."""
    detokenizer: str = "none"
    """Detokenizer of the corpus, as in the paper: wikitext, ptb, lm1b, lambada or
    scientific_papers; none changes nothing."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same figures."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, cuda:N, or auto (cuda if there is one)."""
    json: bool = False
    """Print the table as JSON."""


def run(options: Options) -> None:
    """Print the table."""
    from bdlm.api import load
    from bdlm.data.packing import Packing, prepare
    from bdlm.likelihood import variance
    from bdlm.likelihood.bound import fit_counts

    if options.search and options.heat_map:
        raise ConfigError(
            "--search and --heat-map each choose a set of intervals; give only one of them"
        )
    lm = load(options.model, device=options.device)
    packing = Packing(
        lm.spec.max_length if options.length is None else options.length,
        lm.tokenizer.eos_id is not None,
    )
    read = lambda names: prepare(
        list(names),
        lm.tokenizer,
        packing,
        field=options.field,
        split=options.split,
        detokenizer=options.detokenizer,
        bad_records=options.bad_records,
    )
    windows, shared = (
        read(options.data),
        {name: getattr(options, name) for name in ("block_size", "batches", "batch_size", "seed")},
    )
    if options.search or options.heat_map:
        grid: dict[str, Any] = (
            {"widths": [w / 10 for w in range(1, 10)], "step": 0.1} if options.heat_map else {}
        )
        _show_intervals(options, variance.search(lm.model, windows, **shared, **grid))
        return
    counts = (
        fit_counts(lm.model, read(options.fit_on), block_size=options.block_size)
        if options.fit_on
        else None
    )
    _show_distributions(
        options,
        variance.variance(
            lm.model,
            windows,
            options.distributions,
            gradient_batches=options.gradient_batches,
            counts=counts,
            **shared,
        ),
    )


def _show_distributions(options: Options, spreads: list[VarianceEstimate]) -> None:
    if options.json:
        print(json.dumps([spread.to_json() for spread in spreads]))
        return
    print(
        "variance of the loss of a block"
        + (" and of the gradient" if spreads[0].gradient else "")
        + " [95 %], x at equal passes"
    )
    for spread in spreads:
        bands = [(spread.loss, spreads[0].loss), (spread.gradient, spreads[0].gradient)]
        cells = [
            f"{band!s:<28} x {_share(spread, band, first, spreads[0]):<8.3f}"
            for band, first in bands
            if band and first
        ]
        print(
            f"{spread.distribution:<24} {'' if spread.unbiased else 'biased':<8} "
            + " ".join(cells).rstrip()
        )


def _share(
    spread: VarianceEstimate,
    band: BootstrapInterval,
    first: BootstrapInterval,
    reference: VarianceEstimate,
) -> float:
    """Divide a variance by that of the first distribution, each times its forward passes."""
    return band.value * spread.passes / (first.value * reference.passes)


def _show_intervals(options: Options, found: IntervalMap) -> None:
    if options.heat_map:
        heat_map(found, user_path(options.heat_map, "--heat-map"))
    if options.json:
        print(json.dumps(found.to_json()))
        return
    for (low, high), band in found.bands.items():
        print(
            f"[{low:.3f}, {high:.3f}]  {band}" + ("  <- least" if (low, high) == found.best else "")
        )
    if options.heat_map:
        print(f"heat map written to {options.heat_map}")


def heat_map(found: IntervalMap, path: Path) -> None:
    """Draw the variance of the loss over [beta, omega] to a PNG file, written whole or not at
    all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = zip(*found.bands, strict=True)
    drawn = axes.scatter(
        low,
        high,
        c=[b.value for b in found.bands.values()],
        norm=LogNorm(),
        marker="s",
        s=420,
        cmap="viridis_r",
    )
    axes.plot(
        *found.best,
        marker="*",
        markersize=14,
        color="white",
        markeredgecolor="black",
        linestyle="none",
        label="least",
    )
    axes.set(
        xlabel="lowest mask rate β",
        ylabel="highest mask rate ω",
        xlim=(-0.08, 1.0),
        ylim=(0.0, 1.08),
    )
    axes.set_title("Variance of block losses under mask rates uniform in [β, ω]")
    axes.legend(loc="lower right")
    figure.colorbar(drawn, label="variance of a block's mean loss (nats²)")
    write_figure(path, figure)
