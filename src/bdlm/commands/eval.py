"""`bdlm eval`: how likely a model finds a text, with an error bar."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields

from bdlm.core.validation import Size


@dataclass(frozen=True)
class Options:
    """Likelihood of a text under a model: nats per token with a standard error, perplexity, bits
    per byte.

    The figure is an upper bound for methods nelbo, nelbo-exact and (in expectation) k-orders, and
    exact for method exact, at block size 1, and for autoregressive models."""

    model: str
    """Name or folder of a model."""
    data: tuple[str, ...]
    """Text files, JSONL, folders, or hf:name[:config][:split][:field]."""
    method: str = "nelbo"
    """nelbo, nelbo-exact, exact, k-orders."""
    block_size: int | None = None
    """Default the model's own; the weights do not depend on it."""
    estimator: str = "count"
    """Of nelbo: count, time (the paper's), complementary, importance (needs --fit-on)."""
    schedule: str = "linear"
    """Noise schedule of estimator time; the bound does not depend on it, its variance does."""
    fit_on: tuple[str, ...] = ()
    """Other data, to fit the counts of estimator importance on."""
    replicates: int = 4
    """Independent draws of the noise."""
    target_stderr: float | None = None
    """Go on drawing until the Monte-Carlo error is at most this, in nats per token, or
    --max-replicates are drawn."""
    max_replicates: int = 256
    """Most draws for --target-stderr."""
    max_tokens: int | None = None
    """Score about so many tokens."""
    length: Size | None = None
    """Cells of a window; default the training length."""
    orders: int = 16
    """Of k-orders."""
    view: str = "packed"
    """packed windows as in training, a sliding window over each document, or whole documents."""
    stride: int | None = None
    """Of a sliding window; default half of it."""
    document_tokens: int | None = None
    """In views sliding and documents: keep so many cells from the start of each document, an
    opening token among them."""
    unit: str = "auto"
    """What the error over text is over: document, window, or auto (documents where there are
    30)."""
    positions: int | None = None
    """Also report by runs of so many places of the text."""
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
    document_mask: bool = False
    """Documents of one window do not see each other."""
    batch_size: int = 16
    """Windows of one forward."""
    seed: int = 0
    """Of the noise: the same seed gives the same report."""
    device: str = "cpu"
    """cpu, cuda, auto."""
    dtype: str | None = None
    """float32, bfloat16, ...; default that of the stored weights."""
    json: bool = False
    """Print JSON."""


# the rest goes to `LM.evaluate` under the same name
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
            f"  places {run.first}-{run.last}: {run.nats_per_token:.4f}{error} ({run.tokens}"
            " tokens)"
        )
