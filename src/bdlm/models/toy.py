"""Toy denoisers with exact probabilities, on which every estimator, sampler and decoder is tested
first.

In: a `Step`, read by visibility alone (who sees whom decides what a cell knows). Out: float64
logits. `JointTable` gives the exact conditionals of an explicit joint distribution, in every
convention that a `ModelSpec` can state; `Inconsistent` gives conditionals of no joint distribution.
Both have a cache, so they run wherever a network runs. Knows nothing about attention, training or
sampling."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bdlm.core.blockmap import BlockMap, Contiguous, Permuted
from bdlm.core.cache_slots import CacheSlots
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.randomness import bits, uniform
from bdlm.core.types import CLEAN, Denoiser, ModelSpec, Out, Step
from bdlm.core.visibility import Cells, join, sees

UNKNOWN = -1  # in evidence: no token is known at that place
MASK_LOGIT = 0.3  # raw logit of the mask token: finite, so that forgetting to forbid it is detected
MAX_MASK_PROB = 1 - 1e-3  # as `core.objectives.MAX_MASK_PROB`


class TokenCache:
    """Hold committed tokens by slot: all that a toy remembers. Raises ConfigError for a capacity
    below 1."""

    def __init__(self, rows: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.slots = CacheSlots(rows, capacity, device)
        self.tokens = torch.zeros(rows, capacity, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tokens."""
        return self.tokens.numel() * self.tokens.element_size()

    def store(self, step: Step) -> None:
        """Keep the tokens that `step.write` places. Raises ConfigError beyond the capacity."""
        if step.write is None:
            return
        row, cell = (step.write >= 0).nonzero(as_tuple=True)
        slot = step.write[row, cell]
        if slot.numel() and int(slot.max()) >= self.slots.capacity:
            raise ConfigError(
                f"the cache holds {self.slots.capacity} cells a row; allocate more or use a sliding"
                " window"
            )
        self.tokens[row, slot] = step.ids[row, cell]
        self.slots.record(step)

    def copy_prefix(self, source: Tensor, rows: Tensor, rank: Tensor, position: Tensor) -> None:
        """Copy a prefix, as `KVCache.copy_prefix`."""
        count = rank.shape[1]
        self.tokens[rows, :count] = self.tokens[source, :count]
        self.slots.restore(rows, rank, position)

    def drop_first(self, count: int, rows: Tensor) -> None:
        """Drop the first `count` slots of the marked rows, bool [R] (sliding window)."""
        self.tokens[rows, : self.slots.capacity - count] = self.tokens[rows, count:]
        self.slots.shift(count, rows)


@dataclass(frozen=True)
class Evidence:
    """Hold what M cells know.

    place: int64 [M], the place to predict.
    ids: int64 [M, P], token known at each place or UNKNOWN.
    noisy: bool [M, P], the token was in a noisy cell.
    time: float64 [M], mask probability of the cell's block, or None."""

    place: Tensor
    ids: Tensor
    noisy: Tensor
    time: Tensor | None


class Toy(ABC):
    """Predict from what each cell sees. Subclasses give `log_conditional`."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = replace(spec, supports=frozenset({"cache", "overwrite"}))

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def new_cache(self, rows: int, capacity: int) -> TokenCache:
        """Return an empty cache of `capacity` committed cells a row."""
        return TokenCache(rows, capacity)

    @abstractmethod
    def log_conditional(self, known: Evidence) -> Tensor:
        """Return log-probabilities of the real tokens at each place, float64 [M, V - 1] (the mask
        is the last id)."""

    def step(self, step: Step, cache: TokenCache | None = None) -> Out:
        if step.soft is not None or step.outputs - {"logits"}:
            raise UnsupportedError("a toy model takes no soft inputs and returns logits alone")
        num_queries = step.shape[1] if step.num_queries is None else step.num_queries
        query_mask = torch.zeros(step.shape, dtype=torch.bool, device=step.ids.device)
        query_mask[:, :num_queries] = (
            True if step.query_mask is None else step.query_mask[:, :num_queries]
        )
        logits = self._logits(step, cache, query_mask)
        if cache is not None:
            cache.store(step)
        if "logits" not in step.outputs:
            return Out()
        return Out(
            logits if step.query_mask is not None else logits.view(step.shape[0], num_queries, -1)
        )

    def _logits(self, step: Step, cache: TokenCache | None, query_mask: Tensor) -> Tensor:
        """Return raw logits of the queried cells, or their log-scores, [M, V]."""
        known, own = self._evidence(step, cache, query_mask), step.ids[query_mask]
        log = self.log_conditional(known)
        if self.spec.prediction == "tokens":
            return torch.cat((log, torch.full_like(log[:, :1], MASK_LOGIT)), 1)
        assert known.time is not None, "a score model needs Step.time"
        p = known.time.clamp(max=MAX_MASK_PROB)[:, None]
        scores = torch.cat((log + torch.log((1 - p) / p), torch.zeros_like(log[:, :1])), 1)
        return scores.scatter(1, own[:, None], 0.0)

    def _evidence(self, step: Step, cache: TokenCache | None, query_mask: Tensor) -> Evidence:
        row, cell = query_mask.nonzero(as_tuple=True)
        query = Cells(
            *(getattr(step, name)[row, cell][:, None] for name in ("rank", "group", "limit", "doc"))
        )
        key = Cells.of(step)
        ids = step.ids
        position = step.position
        if cache is not None and cache.slots.used:
            used = cache.slots.used
            key = join(cache.slots.cells(step), key)
            ids = torch.cat((cache.tokens[:, :used], ids), 1)
            position = torch.cat((cache.slots.position[:, :used], position), 1)
        size = int(position.max()) + 1
        key = Cells(*(getattr(key, name)[row] for name in ("rank", "group", "limit", "doc")))
        ids = ids[row]
        position = position[row]
        noisy = key.group != CLEAN
        known_here = sees(query, key)[:, 0] & (
            (ids != self.spec.mask_id) | (self.spec.noise == "uniform")
        )
        place = step.position[row, cell] + self.spec.shift
        # cells without information go into a spare column
        at_place = torch.where(known_here, position, size)
        known = torch.full(
            (len(row), size + 1), UNKNOWN, dtype=torch.long, device=ids.device
        ).scatter_(1, at_place, ids)
        flags = torch.zeros(known.shape, dtype=torch.bool, device=ids.device).scatter_(
            1, at_place, noisy
        )
        time = None if step.time is None else step.time[row, cell].double()
        return Evidence(place, known[:, :size], flags[:, :size], time)


class JointTable(Toy):
    """Predict the exact conditionals of an explicit joint distribution of `places` tokens over
    `tokens` kinds.

    log_joint: float64 [tokens] * places, normalised. Under mask noise a masked cell tells nothing;
    under uniform noise a noisy cell tells q(x_t | x_0) at its block's time."""

    def __init__(self, log_joint: Tensor, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.log_joint = log_joint
        self.tokens, self.places = log_joint.shape[0], log_joint.dim()
        self.texts = torch.tensor(list(itertools.product(range(self.tokens), repeat=self.places)))

    @classmethod
    def random(
        cls, spec: ModelSpec, places: int = 4, seed: int = 0, spread: float = 1.5
    ) -> JointTable:
        """Make a random distribution: log-probabilities are normal with standard deviation
        `spread`, up to the constant."""
        generator = torch.Generator().manual_seed(seed)
        log = (
            torch.randn((spec.vocab_size - 1,) * places, generator=generator, dtype=torch.float64)
            * spread
        )
        return cls(log - log.logsumexp(tuple(range(places))), spec)

    @property
    def entropy(self) -> float:
        """Return the entropy of whole texts, nats."""
        return float(-(self.log_joint.exp() * self.log_joint).sum())

    def log_prob(self, ids: Tensor) -> Tensor:
        """Return log p of whole texts. int64 [R, places] -> float64 [R]."""
        return self.log_joint[tuple(ids.unbind(1))]

    def sample(self, rows: int, seed: int) -> Tensor:
        """Draw texts from the distribution, int64 [rows, places]."""
        generator = torch.Generator().manual_seed(seed)
        return self.texts[
            torch.multinomial(
                self.log_joint.exp().flatten(), rows, replacement=True, generator=generator
            )
        ]

    def log_conditional(self, known: Evidence) -> Tensor:
        if len(known.place) and int(known.place.max()) >= self.places:
            raise ConfigError(
                f"place {int(known.place.max())} is requested of a distribution over {self.places}"
                " places"
            )
        log = self.log_joint.flatten() + self._likelihood(known)
        hit = self.texts[:, known.place].T[:, None, :] == torch.arange(self.tokens)[:, None]
        out = torch.where(hit, log[:, None, :], float("-inf")).logsumexp(-1)
        return out - out.logsumexp(-1, keepdim=True)

    def _likelihood(self, known: Evidence) -> Tensor:
        """Return log p(evidence | text), float64 [M, texts]."""
        ids, noisy = known.ids[:, None, : self.places], known.noisy[:, None, : self.places]
        texts = self.texts[:, : ids.shape[2]]
        same = torch.where(ids == texts, 0.0, float("-inf")).double()
        if self.spec.noise == "uniform":
            assert known.time is not None, "a uniform-noise toy needs Step.time"
            p = known.time[:, None, None]
            same = torch.where(noisy, torch.log((1 - p) * (ids == texts) + p / self.tokens), same)
        return torch.where(ids == UNKNOWN, 0.0, same).sum(-1)


class Inconsistent(Toy):
    """Predict random conditionals that belong to no joint distribution: logits are a hash of the
    place and of everything that the cell sees.

    Texts of any length. spread: standard deviation of the logits (0 = uniform)."""

    def __init__(self, spec: ModelSpec, seed: int = 0, spread: float = 1.5) -> None:
        super().__init__(spec)
        self.seed, self.spread = seed, spread

    def log_conditional(self, known: Evidence) -> Tensor:
        places = torch.arange(known.ids.shape[1], device=known.ids.device)
        seen = torch.where(known.ids == UNKNOWN, 0, bits(self.seed, places, known.ids)).sum(1)
        token = torch.arange(self.spec.vocab_size - 1, device=known.ids.device)
        u = uniform(self.seed, seen[:, None], known.place[:, None], token)
        return (torch.special.ndtri(u) * self.spread).log_softmax(-1)


TOKENS = 3  # real tokens of the toys below; the mask is the next id


def toy_spec(block_size: int = 2, max_length: int = 4) -> ModelSpec:
    """Return the convention of the plain toys: block diffusion under mask noise over `TOKENS`
    tokens."""
    return ModelSpec(TOKENS + 1, TOKENS, block_size, max_length)


@dataclass(frozen=True)
class World:
    """Describe a toy model: how to make it, and the block map to run it under. length: cells of a
    window that it can fill."""

    make: Callable[[], Denoiser]
    map: BlockMap
    length: int = 4


def _joint(size: int, **changes: object) -> World:
    spec: Any = toy_spec(size)
    return World(lambda: JointTable.random(replace(spec, **changes)), Contiguous(size))


TOYS: dict[str, World] = {
    "joint": _joint(2),
    "one_block": _joint(4, streams=1),
    "causal_context": _joint(2, context="causal"),
    "shifted": _joint(2, shift=True),
    "uniform": _joint(2, noise="uniform", time_conditioned=True),
    "score": _joint(4, prediction="log_score", time_conditioned=True, streams=1),
    "permuted": World(lambda: JointTable.random(toy_spec(2)), Permuted((1, 0, 1, 0))),
    "autoregressive": _joint(1, noise="none", shift=True, context="causal", streams=1),
    "inconsistent": World(lambda: Inconsistent(toy_spec(4, 16)), Contiguous(4), 16),
}
