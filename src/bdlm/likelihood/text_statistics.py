"""Statistics of sampled text: entropies, variety, repetition, distance to held-out text, copying
from training text, generative perplexity.

In: texts as sequences of units (token ids, words or characters). Out: numbers, and a
`TextStatistics` with all of them. None of them measures quality alone: greedy text has a low
perplexity and a low entropy, so compare perplexities at equal entropy. Plug-in entropies and counts
of distinct n-grams grow with the amount of text: give every system the same number of units. The
judge is the reference model of generative perplexity: it says how likely a text is. Knows nothing
about how texts were generated. Source: arXiv 2605.12522 (entropies), 2604.02718 (why two numbers);
Li et al. 2016 (distinct-n)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, DataError
from bdlm.core.statistics import mean_estimate, ratio_estimate

Text = Sequence[Hashable]
Gram = tuple[Hashable, ...]
# added to every count of `ngram_kl`, so an n-gram missing on one side costs a finite amount
PRIOR = 0.5


def ngrams(text: Text, n: int) -> Iterator[Gram]:
    """Iterate over the n-grams of one text in order; none if it is shorter."""
    if n < 1:
        raise ConfigError(f"n is {n}; use n-grams of 1 or more units")
    return zip(*(text[i:] for i in range(n)))


def counts(texts: Sequence[Text], n: int) -> Counter[Gram]:
    """Count each n-gram over all texts. Raises DataError if there is none."""
    found = Counter(gram for text in texts for gram in ngrams(text, n))
    if not found:
        raise DataError(f"the texts hold no {n}-gram; give at least one text of {n} units")
    return found


def ngram_entropy(texts: Sequence[Text], n: int) -> float:
    """Compute the Shannon entropy of the n-grams of all texts together, plug-in estimate, nats."""
    return _entropy(counts(texts, n))


def text_entropy(texts: Sequence[Text]) -> float:
    """Compute the mean over texts of the entropy of each one's own units, nats: low where a text
    repeats itself."""
    return float(
        torch.tensor([_entropy(counts([text], 1)) for text in texts], dtype=torch.float64).mean()
    )


def _entropy(found: Counter[Gram]) -> float:
    p = torch.tensor(list(found.values()), dtype=torch.float64)
    p = p / p.sum()
    return float(-(p * p.log()).sum()) + 0.0  # not -0.0, for one kind of n-gram


def distinct(texts: Sequence[Text], n: int) -> float:
    """Divide the number of different n-grams by that of all n-grams, over all texts together, in
    (0, 1]."""
    found = counts(texts, n)
    return len(found) / found.total()


def repetition(texts: Sequence[Text], n: int) -> float:
    """Compute the share of n-grams that occurred earlier in the same text, over all texts together,
    in [0, 1)."""
    inside = [Counter(ngrams(text, n)) for text in texts]
    total = sum(c.total() for c in inside)
    if not total:
        raise DataError(f"the texts hold no {n}-gram; give at least one text of {n} units")
    return 1 - sum(map(len, inside)) / total


def ngram_kl(texts: Sequence[Text], held_out: Sequence[Text], n: int) -> float:
    """Compute KL(texts || held-out text) of their n-gram distributions, nats, with `PRIOR` added to
    the counts of every n-gram that either side has.

    It is not 0 for equal sources of finite size: compare it with the value for another human text
    of the same length."""
    ours, theirs = counts(texts, n), counts(held_out, n)
    every = ours.keys() | theirs.keys()
    p, q = (
        torch.tensor([c[g] + PRIOR for g in every], dtype=torch.float64) for c in (ours, theirs)
    )
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def overlap(texts: Sequence[Text], training: Sequence[Text], n: int = 6) -> float:
    """Compute the share of the texts' n-grams that occur word for word in the training texts, in
    [0, 1]. Memory grows with `texts` alone."""
    ours = counts(texts, n)
    copied = {gram for text in training for gram in ngrams(text, n) if gram in ours}
    return sum(ours[gram] for gram in copied) / ours.total()


# -- judged by a model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerativePerplexity:
    """How likely texts are under the judge. nats_per_token, stderr: ratio estimate over texts (None
    for one text). perplexity: its exp."""

    nats_per_token: float
    stderr: float | None
    perplexity: float
    tokens: int


def generative_perplexity(
    texts: Sequence[str], judge: Callable[[str], Any]
) -> GenerativePerplexity:
    """Compute the perplexity of sampled texts under the judge.

    judge: text -> (nats, tokens), or an object with `nats_per_token` and `tokens`, as `LM.score`
    returns. Pass `lm.score`, or `functools.partial(lm.score, block_size=1)` for the exact value."""
    if not texts:
        raise DataError("there is no text to judge; give at least one")
    pairs = torch.tensor([_judged(judge(text)) for text in texts], dtype=torch.float64)
    found = ratio_estimate(pairs[:, 0], pairs[:, 1])
    stderr = None if math.isnan(found.stderr) else found.stderr
    return GenerativePerplexity(
        found.mean, stderr, math.exp(min(found.mean, 700.0)), int(pairs[:, 1].sum())
    )


def _judged(judged: Any) -> tuple[float, float]:
    nats, tokens = (
        (judged.nats_per_token * judged.tokens, judged.tokens)
        if hasattr(judged, "nats_per_token")
        else judged
    )
    return float(nats), float(tokens)


# -- by embeddings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemanticScores:
    """coherence: mean cosine of neighbouring chunks of a text. diversity: 1 - mean cosine of
    different texts. Each with the standard error over texts; None where there are too few chunks or
    texts."""

    coherence: float | None
    coherence_stderr: float | None
    diversity: float | None
    diversity_stderr: float | None


def semantics(
    texts: Sequence[Sequence[str]], embed: Callable[[list[str]], Tensor]
) -> SemanticScores:
    """Compute coherence and diversity. texts: each a list of chunks (sentences, or runs of so many
    words). embed: chunks -> [chunks, width], of any norm."""
    pieces = [
        torch.nn.functional.normalize(embed(list(chunks)).double(), dim=1)
        for chunks in texts
        if chunks
    ]
    inner = torch.tensor(
        [float((p[1:] * p[:-1]).sum(1).mean()) for p in pieces if len(p) > 1], dtype=torch.float64
    )
    none = torch.zeros(0, 1, dtype=torch.float64)
    whole = (
        torch.nn.functional.normalize(torch.stack([p.mean(0) for p in pieces]), dim=1)
        if pieces
        else none
    )
    others = (whole @ whole.T).fill_diagonal_(0).sum(1) / max(len(whole) - 1, 1)
    near, far = _mean(inner, 1), _mean(1 - others, 2)
    # a text takes part in its own mean and in every other's
    return SemanticScores(*near, far[0], None if far[1] is None else 2 * far[1])


def _mean(values: Tensor, least: int) -> tuple[float | None, float | None]:
    if len(values) < least:
        return None, None
    found = mean_estimate(values)
    return found.mean, None if math.isnan(found.stderr) else found.stderr


# -- all together ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextStatistics:
    """All statistics of some texts. units: of all texts. entropy, distinct, repetition, kl: by n.
    overlap: of n = 6. kl, overlap: None without the texts to compare with."""

    texts: int
    units: int
    text_entropy: float
    entropy: dict[int, float]
    distinct: dict[int, float]
    repetition: dict[int, float]
    kl: dict[int, float] | None
    overlap: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def text_statistics(
    texts: Sequence[Text],
    held_out: Sequence[Text] | None = None,
    training: Sequence[Text] | None = None,
    largest: int = 4,
) -> TextStatistics:
    """Compute every statistic that needs no model, n = 1 .. `largest`. Raises DataError for texts
    without an n-gram of each length."""
    orders = range(1, largest + 1)
    return TextStatistics(
        texts=len(texts),
        units=sum(map(len, texts)),
        text_entropy=text_entropy([t for t in texts if len(t)]),
        entropy={n: ngram_entropy(texts, n) for n in orders},
        distinct={n: distinct(texts, n) for n in orders},
        repetition={n: repetition(texts, n) for n in orders},
        kl=None if held_out is None else {n: ngram_kl(texts, held_out, n) for n in orders},
        overlap=None if training is None else overlap(texts, training),
    )
