"""Evaluate a model on a text: the bound, the exact likelihood, or a bound between them, with error
bars.

In: any `Denoiser`, windows of token ids (in the forms that `rows_of` takes). Out: a `Score`. AR,
MDLM, SEDD and block diffusion are scored on the same positions of the same windows. Knows nothing
about files; of tokenizers it knows only how many bytes a token stands for. Source: arXiv
2503.09573, Eq. 8, 17-21, App. C.4 (protocol); arXiv 2502.09992 (count form)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bdlm.core.blockmap import Contiguous
from bdlm.core.counts import CountDistribution
from bdlm.core.errors import ConfigError
from bdlm.core.estimators import LARGEST
from bdlm.core.threads import fork_safe_lock, limit_threads, survive_fork
from bdlm.core.types import Denoiser, Layout, ModelSpec
from bdlm.core.validation import AtLeast, Count, validated
from bdlm.likelihood.importance import fit_counts as fit
from bdlm.likelihood.methods import Draw, Method, method_for
from bdlm.likelihood.rows import Rows, rows_of
from bdlm.likelihood.score import Score, by_position, combine
from bdlm.models.inference import num_weights

Progress = Callable[[int, int], None]  # (windows done, windows expected)

# number of evaluations in progress of each model that was in training mode
_inside: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_counting = fork_safe_lock()


@validated()
def evaluate(
    model: Denoiser,
    windows: Any,
    *,
    block_size: Count | None = None,
    method: str = "nelbo",
    estimator: str = "count",
    schedule: str = "linear",
    replicates: Count = 4,
    orders: Count = 16,
    counts: CountDistribution | None = None,
    batch_size: Count = 16,
    seed: int = 0,
    target_stderr: (
        Annotated[float, AtLeast(0, "use a number of nats per token, 0 for max_replicates draws")]
        | None
    ) = None,
    max_replicates: Count = 256,
    max_tokens: Count | None = None,
    largest: int = LARGEST,
    tokenizer: Any = None,
    unit: str = "auto",
    positions: Count | None = None,
    keys: Tensor | None = None,
    progress: bool | Progress = False,
) -> Score:
    """Compute the likelihood of windows under a model, in nats per token.

    windows: see `rows.rows_of`; `rows.whole_documents` and `rows.sliding` make them from documents.
    block_size: default the model's; any for models of two streams (weights do not depend on it).
    Block size 1 and autoregressive models are exact in one pass ("nll"), whatever the method.

    method: "nelbo" (Monte-Carlo bound), "nelbo-exact" (all masked sets of a block), "exact" (the
    distribution of first-hitting sampling at temperature 1), "k-orders" (a tighter bound by
    `orders` random orders, any block size). estimator, schedule, counts: for "nelbo", see
    `methods.Nelbo`. replicates: independent draws, two or more for a Monte-Carlo error.

    target_stderr: draw more, up to max_replicates, until the Monte-Carlo error is at most this
    (nats per token); a score that stopped above it says so. max_tokens: score about this many.
    largest: most cells of a block that is enumerated. unit: "auto", "document" or "window", the
    sampling unit of the error over text. positions: also score runs of this many positions. keys:
    int64 [N], one number per window that keys its noise instead of the window's index (indices
    spread noise evenly over all windows); a window's score then does not depend on what else is
    scored.

    Noise depends on seed, replicate and window alone: scores of one seed are equal for every
    batch_size, up to rounding. Raises ConfigError, DataError or UnsupportedError for what does not
    fit."""
    survive_fork()
    spec = model.spec
    rows = rows_of(windows, max_tokens, unit).checked(spec.vocab_size, spec.mask_id)
    size = block_size_of(spec, block_size, rows.length)
    if keys is not None and keys.shape != (len(rows),):
        raise ConfigError(
            f"keys has the shape {tuple(keys.shape)}; give one for each of the {len(rows)} windows"
        )
    scoring_method = method_for(spec, method, size, estimator, schedule, orders, counts, largest)
    limit = replicates if target_stderr is None else max(replicates, max_replicates)
    with _shown(progress) as report_progress:
        totals, nats = _replicate(
            model,
            rows,
            size,
            scoring_method,
            batch_size,
            seed,
            replicates,
            limit,
            target_stderr,
            report_progress,
            keys,
        )
    count = _by_unit(rows.scored.double(), rows)
    result = combine(totals, count, scoring_method.random)
    bytes_ = None if tokenizer is None else scored_bytes(rows, tokenizer)
    return Score(
        nats_per_token=result.mean,
        stderr=result.stderr,
        perplexity=math.exp(min(result.mean, 700.0)),
        bits_per_byte=result.mean * rows.tokens / math.log(2) / bytes_ if bytes_ else None,
        tokens=rows.tokens,
        method=scoring_method.name,
        estimator=scoring_method.estimator,
        block_size=size,
        replicates=len(totals),
        stderr_units=result.units,
        stderr_monte_carlo=result.monte_carlo,
        unit=rows.kind,
        units=result.count,
        bytes=bytes_,
        passes=scoring_method.passes(min(size, rows.length)) * len(totals),
        seed=seed,
        target_stderr=target_stderr,
        unit_nats=tuple(totals.mean(0).tolist()),
        unit_tokens=tuple(count.long().tolist()),
        positions=(
            ()
            if positions is None
            else by_position(nats, rows.scored, _places(rows), rows.unit, positions)
        ),
    )


def block_size_of(spec: ModelSpec, requested: int | None, length: int) -> int:
    """Return the block size with which a model is scored on windows of `length`.

    Autoregressive models have 1, models of one stream have one block that holds the window. Raises
    ConfigError for another requested size."""
    if requested is not None and requested > max(spec.max_length, length):
        raise ConfigError(
            f"block_size is {requested}, but the model's window has {spec.max_length} cells; use 1"
            f" to {spec.max_length}"
        )
    if spec.streams == 2 and spec.noise != "none":
        return spec.block_size if requested is None else requested
    own = 1 if spec.noise == "none" else max(length, spec.block_size)
    if requested is not None and min(requested, length) != min(own, length):
        kind = (
            "an autoregressive model has blocks of 1"
            if own == 1
            else f"a model of one stream writes the window as one block of {own}"
        )
        raise ConfigError(f"block_size is {requested} but {kind}; leave block_size out")
    return own


@validated()
def fit_counts(
    model: Denoiser,
    windows: Any,
    *,
    block_size: Count | None = None,
    seed: int = 0,
    draws: Count = 4,
    batch_size: Count = 16,
    floor: float = 0.1,
    max_tokens: Count | None = 32_768,
) -> CountDistribution:
    """Fit counts for `evaluate(estimator="importance")`. Fit them on other text than is scored.
    max_tokens: use about this many tokens of it."""
    spec = model.spec
    rows = rows_of(windows, max_tokens).checked(spec.vocab_size, spec.mask_id)
    rows = rows.to(device_of(model))
    layout = rows.layout(Contiguous(block_size_of(spec, block_size, rows.length)), spec.context)
    with evaluating(model):
        return fit(model, rows, layout, seed=seed, draws=draws, batch_size=batch_size, floor=floor)


def _replicate(
    model: Denoiser,
    rows: Rows,
    size: int,
    scoring_method: Method,
    batch_size: int,
    seed: int,
    least: int,
    most: int,
    target: float | None,
    progress: Progress,
    keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Draw noise until the error is small enough. Returns nats of each unit in each replicate [K,
    U], and the mean nats of each cell [N, L]."""
    totals: list[Tensor] = []
    mean = torch.zeros(rows.ids.shape, dtype=torch.float64)
    size_tokens = rows.tokens
    with evaluating(model):
        while True:
            nats = _one_draw(
                model,
                rows,
                size,
                scoring_method,
                batch_size,
                seed,
                len(totals),
                progress,
                least if scoring_method.random else 1,
                keys,
            )
            mean += (nats - mean) / (len(totals) + 1)
            totals.append(_by_unit(nats, rows))
            if not scoring_method.random or len(totals) >= most:
                break
            if len(totals) >= least and (target is None or _noise(totals, size_tokens) <= target):
                break
    return torch.stack(totals), mean


def _one_draw(
    model: Denoiser,
    rows: Rows,
    size: int,
    scoring_method: Method,
    batch_size: int,
    seed: int,
    replicate: int,
    progress: Progress,
    least: int,
    keys: Tensor | None,
) -> Tensor:
    """Compute nats of every cell under one draw of the noise, float64 [N, L] on CPU."""
    device = device_of(model)
    weights = num_weights(model)
    nats = torch.zeros(rows.ids.shape, dtype=torch.float64)
    for first, whole in rows.batches(batch_size):
        part = whole.trimmed().to(device)
        layout = _layout(model.spec, part, size)
        with limit_threads(weights, part.ids.numel() * model.spec.streams):
            found = scoring_method.nats(
                model, part, layout, Draw(seed, replicate, len(rows), first, keys)
            )
        nats[first : first + len(part), : part.length] = found.cpu()
        progress(replicate * len(rows) + first + len(part), max(replicate + 1, least) * len(rows))
    return nats


def _layout(spec: ModelSpec, part: Rows, size: int) -> Layout:
    return part.layout(Contiguous(size), spec.context)


def _noise(totals: list[Tensor], tokens: int) -> float:
    """Compute the Monte-Carlo standard error of the mean so far; infinite before two replicates."""
    if len(totals) < 2:
        return math.inf
    means = torch.stack([t.sum() / tokens for t in totals])
    return float(means.std()) / math.sqrt(len(means))


def _by_unit(values: Tensor, rows: Rows) -> Tensor:
    """Sum over the scored cells of each unit, float64 [U]."""
    out = torch.zeros(rows.units, dtype=torch.float64)
    return out.index_add_(0, rows.unit[rows.scored], values.double()[rows.scored])


def _places(rows: Rows) -> Tensor:
    """Return the position of each cell in its text, int64 [N, L]."""
    return rows.start[:, None] + torch.arange(rows.length)


def scored_bytes(rows: Rows, tokenizer: Any) -> int:
    """Count the UTF-8 bytes of text that the scored tokens stand for; special tokens count as
    none."""
    kinds, times = torch.unique(rows.ids[rows.scored], return_counts=True)
    return sum(
        n * int(t) for n, t in zip(tokenizer.byte_lengths(kinds.tolist()), times, strict=True)
    )


def device_of(model: Any) -> torch.device:
    """Return the device of a model's weights; CPU for models without weights."""
    first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Disable dropout and gradients inside a `with` block; the last of several concurrent threads
    restores the model's mode."""
    with _counting:
        counted = isinstance(model, nn.Module) and (model.training or model in _inside)
        if counted:
            _inside[model] = _inside.get(model, 0) + 1
            model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if counted:
            with _counting:
                _inside[model] -= 1
                if not _inside[model]:
                    del _inside[model]
                    model.train()


@contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    """Yield the function to call after each batch; the progress bar is removed however the
    evaluation ends."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
