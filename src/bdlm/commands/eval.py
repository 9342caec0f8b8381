"""`bdlm eval`: measure how likely a model finds a text, with an error bar."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from typing import Annotated

from bdlm.core.validation import AtLeast, Count, Size


@dataclass(frozen=True)
class Options:
    """Measure the likelihood of a text under a model: nats per token with a standard error,
    perplexity, and bits per byte.

    The methods nelbo, nelbo-exact and (in expectation) k-orders give an upper bound. The method
    exact, block size 1 and autoregressive models give the exact figure."""

    model: str
    """A model folder, or the name of a packaged model."""
    data: tuple[str, ...]
    """Files (text, JSONL, JSON, CSV, TSV, Parquet), folders, or datasets as
    hf:name[:config][:split][:field]."""
    method: str = "nelbo"
    """How to score: nelbo (Monte Carlo bound), nelbo-exact (the same bound, enumerated), exact
    (likelihood, enumerated), or k-orders (a bound between them)."""
    block_size: Count | None = None
    """Tokens of a block; default the model's own. The weights do not depend on it."""
    estimator: str = "count"
    """Estimator of method nelbo: count, time (the paper's), complementary, or importance (needs
    --fit-on)."""
    schedule: str = "linear"
    """Noise schedule of estimator time. It changes the variance of the bound, not its value."""
    fit_on: tuple[str, ...] = ()
    """Data to fit the counts of estimator importance on, other than --data."""
    replicates: Count = 4
    """Number of independent draws of the noise, 1 or more; 2 or more give a Monte Carlo error."""
    target_stderr: (
        Annotated[float, AtLeast(0, "use a number of nats per token, 0 for --max-replicates draws")]
        | None
    ) = None
    """Draw noise until the Monte Carlo error is at most this many nats per token, or until
    --max-replicates draws are made; default --replicates draws."""
    max_replicates: Count = 256
    """Largest number of draws for --target-stderr, 1 or more."""
    max_tokens: Count | None = None
    """Score about this many tokens, 1 or more; default all."""
    length: Size | None = None
    """Tokens of a window, 1 to 2^24; default the training length."""
    orders: Count = 16
    """Number of random orders for method k-orders, 1 or more."""
    view: str = "packed"
    """How documents become windows: packed (as in training), sliding (a window moves over each
    document), or documents (each whole)."""
    stride: int | None = None
    """Tokens by which the window of view sliding moves; default half of the window."""
    document_tokens: Count | None = None
    """Keep this many tokens from the start of each document, an opening token included, in views
    sliding and documents; default all."""
    unit: str = "auto"
    """Unit of the standard error over text: document, window, or auto (documents if there are at
    least 30)."""
    positions: Count | None = None
    """Also report the likelihood by position, in runs of this many tokens, 1 or more."""
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
    document_mask: bool = False
    """Keep documents of one window from seeing each other."""
    batch_size: Count = 16
    """Windows of one forward pass, 1 or more."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same report."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, cuda:N, or auto (cuda if there is one)."""
    dtype: str | None = None
    """Number type of the weights: float32, bfloat16, float16 or float64; default as stored."""
    json: bool = False
    """Print the report as JSON."""


# all other options go to `LM.evaluate` under the same name
OWN = ("model", "data", "device", "dtype", "json", "fit_on")


def run(options: Options) -> None:
    """Print the report."""
    from bdlm.api import load

    lm = load(options.model, device=options.device, dtype=options.dtype)
    chosen = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in OWN}
    score = lm.evaluate(
        options.data,
        fit_on=options.fit_on or None,
        progress=sys.stderr.isatty() and not options.json,
        **chosen,
    )
    if options.json:
        print(json.dumps(score.to_json()))
        return
    print(score)
    for run in score.positions:
        error = "" if run.stderr is None else f" ± {run.stderr:.4f}"
        print(
            f"  positions {run.first}-{run.last}: {run.nats_per_token:.4f}{error} ({run.tokens}"
            " tokens)"
        )
