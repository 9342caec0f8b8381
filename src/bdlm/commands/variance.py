"""`bdlm variance`: how much the loss and its gradient vary under distributions of noise, and the
search over mask rates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdlm.core.errors import ConfigError
from bdlm.core.paths import user_path
from bdlm.core.validation import Size
from bdlm.data.files import write_figure

if TYPE_CHECKING:
    from bdlm.likelihood.variance import BootstrapInterval, IntervalMap, VarianceEstimate


@dataclass(frozen=True)
class Options:
    """Variance of the loss (per block, the search's statistic) and of its gradient (Eq. 10), with
    bootstrap intervals.

    A distribution is an estimator with a schedule: time, time:cosine, time:clipped:0.3,0.8, count,
    count:clipped:0.3,0.8, complementary, importance (the adaptive distribution of training, fitted
    on --fit-on), all. Clipped distributions are for training: their mean is not the bound."""

    model: str
    """Name or folder of a model."""
    data: tuple[str, ...]
    """Text files, JSONL, folders, or hf:name[:config][:split][:field]."""
    distributions: tuple[str, ...] = ("time", "count", "complementary")
    """Distributions of noise to compare; the first is what the others are compared with."""
    fit_on: tuple[str, ...] = ()
    """Other data, to fit the counts of distribution importance on."""
    batches: int = 30
    """Batches for the loss variance."""
    gradient_batches: int = 0
    """Batches for the gradient variance, an even number; each costs a backward pass."""
    batch_size: int = 16
    """Windows of a batch."""
    block_size: int | None = None
    """Default the model's own; the weights do not depend on it."""
    search: bool = False
    """Compare the 36 intervals of mask rates instead of distributions."""
    heat_map: str | None = None
    """Compare all intervals on a grid of 0.1 instead of distributions, and draw them into this
    PNG."""
    length: Size | None = None
    """Cells of a window; default the training length."""
    field: str = "text"
    """What holds the text: a field of records (meta.body: nested), or a column of a CSV or TSV file
    (its name or number; 2+3 joins two)."""
    split: str = "file"
    """How a text file falls into documents: file, line, paragraph, article (of WikiText), or any
    separator."""
    bad_records: float = 0.01
    """Records that may be null, broken or empty, and are left out: below 1 a share of all, else
    their number."""
    detokenizer: str = "none"
    """CacheRollback a corpus's tokenisation, as the paper does."""
    seed: int = 0
    """Of the noise: the same seed gives the same figures."""
    device: str = "cpu"
    """cpu, cuda, auto."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    """Print the table."""
    from bdlm.api import load
    from bdlm.data.packing import Packing, prepare
    from bdlm.likelihood import variance
    from bdlm.likelihood.bound import fit_counts

    if options.search and options.heat_map:
        raise ConfigError("--search and --heat-map are two sets of intervals; give one of them")
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
    """A variance in parts of the first distribution's, each times its passes."""
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
        print(f"drawn into {options.heat_map}")


def heat_map(found: IntervalMap, path: Path) -> None:
    """Draw loss variance over [beta, omega]; the file is made beside and renamed."""
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
