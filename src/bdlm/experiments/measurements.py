"""The kinds of measurement of a run: each is a function of a model and plain options that returns
plain values for JSON.

In: an `LM` (None where the measurement makes its own) and the options of the plan. Out: a dict.
Data is named by path and read as `LM.evaluate` reads it. To add one, write a function and a line in
`MEASUREMENTS`. Knows nothing about plans, folders or reports."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from bdlm.api import LM, load
from bdlm.core.errors import ConfigError, nearest, pick
from bdlm.data.packing import Packing, prepare
from bdlm.data.sources import documents as read
from bdlm.data.sources import open_sources
from bdlm.experiments.language import language
from bdlm.experiments.passes import passes
from bdlm.likelihood import variance as loss_variance
from bdlm.likelihood.bound import evaluate, fit_counts
from bdlm.likelihood.rows import sliding, stride_of, whole_documents
from bdlm.likelihood.text_statistics import (
    generative_perplexity,
    semantics,
    text_entropy,
    text_statistics,
)

LARGEST = 4  # words of the longest n-grams
CHUNK = 40  # words of a chunk; neighbouring chunks are compared by meaning


def likelihood(lm: LM | None, *, data: str, **options: Any) -> dict[str, Any]:
    """Run `LM.evaluate`: its score, and the nats of each unit for paired comparisons."""
    score = _need(lm).evaluate(data, **options)
    return {
        **score.to_json(),
        "unit_nats": list(score.unit_nats),
        "unit_tokens": list(score.unit_tokens),
    }


def variance(
    lm: LM | None,
    *,
    data: str,
    distributions: list[str],
    fit_on: str | None = None,
    length: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure loss and gradient variance by mask distribution (`likelihood.variance`)."""
    model, windows = _need(lm).model, _reader(_need(lm), length)
    counts = (
        fit_counts(model, windows(fit_on), block_size=options.get("block_size")) if fit_on else None
    )
    return {
        s.distribution: s.to_json()
        for s in loss_variance.variance(
            model, windows(data), distributions, counts=counts, **options
        )
    }


def zero_shot(
    lm: LM | None,
    *,
    data: str,
    field: str = "text",
    split: str = "file",
    detokenizer: str = "none",
    documents: int = 1000,
    max_tokens: int = 8000,
    replicates: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the first tokens of a set, packed as in training; a score model by its own estimator,
    time."""
    model, packing = (
        _need(lm),
        Packing(_need(lm).spec.max_length, _need(lm).tokenizer.eos_id is not None),
    )
    windows = prepare(
        [data],
        model.tokenizer,
        packing,
        field=field,
        split=split,
        detokenizer=detokenizer,
        limit=documents,
    )
    estimator = "time" if model.spec.prediction == "log_score" else "count"
    drawn: dict[str, Any] = {"estimator": estimator, "replicates": replicates, "seed": seed}
    score = evaluate(
        model.model,
        windows,
        max_tokens=max_tokens,
        batch_size=32,
        tokenizer=model.tokenizer,
        **drawn,
    )
    return score.to_json()


def places(
    lm: LM | None,
    *,
    data: str,
    length: int,
    articles: int,
    window: int | None = None,
    step: int = 256,
) -> dict[str, Any]:
    """Score by position in the first articles that have `length` tokens, cut there: the same cells
    for every model and window.

    window: cells of a window that moves by half of it; None: all earlier text is visible."""
    model, spec = _need(lm), _need(lm).spec
    given = spec.first_token is not None
    ids = (model.tokenizer.encode(text) for text in read(open_sources([data])))
    long = list(itertools.islice((i[: length - given] for i in ids if len(i) >= length), articles))
    if len(long) < articles:
        raise ConfigError(
            f"articles is {articles}, but '{data}' has {len(long)} of {length} tokens; ask for"
            " fewer, or shorter ones"
        )
    first, size = spec.first_token, spec.block_size
    rows = (
        whole_documents(long, first)
        if window is None
        else sliding(long, window, stride_of(window, size), first)
    )
    score = evaluate(
        model.model,
        rows,
        unit="document",
        positions=step,
        batch_size=2,
        replicates=2,
        tokenizer=model.tokenizer,
    )
    return {**score.to_json(), "unit_nats": list(score.unit_nats)}


def search(
    lm: LM | None, *, data: str, lengths: list[int], tokens: int, **options: Any
) -> dict[str, Any]:
    """Find the interval of least loss variance by length of the window; a batch has the same number
    of tokens at every length."""
    model = _need(lm).model
    found = {
        n: loss_variance.search(
            model, _reader(_need(lm), n)(data), batch_size=tokens // n, **options
        )
        for n in lengths
    }
    return {
        str(n): {
            "best": list(f.best),
            "variance": f.bands[f.best].value,
            "intervals": f.to_json()["intervals"],
        }
        for n, f in found.items()
    }


def texts(
    lm: LM | None,
    *,
    count: int,
    max_new_tokens: int,
    judge: str | None = None,
    meaning: bool = False,
    min_entropy: float | None = None,
    keep: int = 1,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Sample from scratch; report forward passes, lengths, entropies, variety, perplexity under a
    judge, coherence.

    judge: the reference model of generative perplexity, autoregressive or at block size 1, which
    gives exact likelihoods. min_entropy: also the share of texts that the published filter (arXiv
    2503.09573, App. C.5) would refuse. keep: number of texts kept in the record."""
    made = _need(lm).generate([""] * count, max_new_tokens=max_new_tokens, seed=seed, **options)
    lengths = [m.tokens for m in made]
    words = [m.text.split() for m in made]
    values: dict[str, Any] = {
        "texts": count,
        "tokens": sum(lengths),
        "length": sorted(lengths),
        "forward_passes": sum(m.forward_passes for m in made) / count,
        "tokens_per_forward": sum(lengths) / sum(m.forward_passes for m in made),
        "seconds": max(m.seconds for m in made),
        "token_entropy": [text_entropy([m.token_ids]) for m in made],
        "sample": [m.text for m in made[:keep]],
        "report": (
            text_statistics(long).to_json()
            if (long := [w for w in words if len(w) >= LARGEST])
            else None
        ),
    }
    values["mean_token_entropy"] = sum(values["token_entropy"]) / count
    values["mean_length"] = sum(lengths) / count
    if min_entropy is not None:
        values["refused"] = sum(h < min_entropy for h in values["token_entropy"]) / count
    if judge:
        nonempty = [m.text for m in made if m.text.strip()]
        values["judged"] = asdict(
            generative_perplexity(nonempty, partial(load(judge).score, block_size=1))
        )
    if meaning:
        from bdlm.likelihood.embeddings import minilm

        chunks = [[" ".join(w[i : i + CHUNK]) for i in range(0, len(w), CHUNK)] for w in words]
        values["meaning"] = asdict(semantics(chunks, minilm()))
    return values


def _reader(lm: LM, length: int | None) -> Callable[[str], Any]:
    packing = Packing(length or lm.spec.max_length, lm.tokenizer.eos_id is not None)
    return lambda data: prepare([data], lm.tokenizer, packing)


def _need(lm: LM | None) -> LM:
    if lm is None:
        raise ConfigError("this measure needs a model; give the run `train` or `model`")
    return lm


def check_measurement(kind: str = "", **options: Any) -> None:
    """Raise ConfigError for an unknown kind of measurement, or options that it does not have."""
    function = pick("kind", kind, MEASUREMENTS)
    taken = inspect.signature(function).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    known = [name for name, p in taken.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known and not free:
            raise ConfigError(f"measure '{kind}' has no option '{name}'{nearest(name, known)}")
    for name in known:
        if name not in options and taken[name].default is inspect.Parameter.empty:
            raise ConfigError(f"measure '{kind}' needs the option '{name}'")


def take_measurement(kind: str, lm: LM | None, options: dict[str, Any]) -> dict[str, Any]:
    """Measure by the name of a kind. Raises ConfigError for an unknown kind or option."""
    check_measurement(kind, **options)
    return MEASUREMENTS[kind](lm, **options)


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "likelihood": likelihood,
    "zero_shot": zero_shot,
    "places": places,
    "variance": variance,
    "search": search,
    "texts": texts,
    "passes": passes,
    "language": language,
}
