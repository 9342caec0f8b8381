"""Approximate caches for whole-sequence models: which activations of the last calls are used again,
and when they are refreshed.

In: the calls of one text, written block by block within one window
(`generation.full_sequence.engine`). Out: logits of the asked cells, and the work that it took. A
cache is a frozen class with its parameters; `start` opens a session for one text. Prefix and dual
cache stand on the Denoiser contract alone; the others need the native backbone's `layer_reuse`.
Knows nothing about decoders.

Approximate, all of them: kept activations have not seen what was written since. Block diffusion
models need none of this: the keys and values of their committed blocks are exact."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, UnsupportedError, nearest, pick
from bdlm.core.types import CLEAN, Denoiser, ModelSpec, Step
from bdlm.core.validation import coerce, hints
from bdlm.models.dit import DiT
from bdlm.models.layer_reuse import ByQuery, ByValue, Memo, Rule, Whole, Work, reuse_step


@dataclass(frozen=True)
class WindowInputs:
    """One call of a text. L cells of the window, all of which see each other.

    ids: int64 [1, L], what each cell holds now. at: bool [1, L], cells whose predictions are
    wanted, all in the active block.
    time: float [1, 1], mask probability, for models that are told it. prompt: cells of the prompt.
    start, stop: the active block.
    number: calls of this text before this one; inside: those of this block."""

    ids: Tensor
    at: Tensor
    time: Tensor | None
    prompt: int
    start: int
    stop: int
    number: int
    inside: int

    def step(self) -> Step:
        """The whole window as one block of noisy cells: the exact call."""
        cells = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        one = torch.zeros_like(cells)
        time = None if self.time is None else self.time.expand(self.ids.shape)
        return Step(
            self.ids, cells, one, one, one, one, query_mask=self.at, time=time, full_attention=True
        )


class Session(Protocol):
    """One text under a cache, and the work so far."""

    @property
    def work(self) -> Work: ...

    def predict(self, call: WindowInputs) -> Tensor:
        """Logits of `call.at`, [M, V]."""
        ...


@dataclass(frozen=True)
class ApproximateCache:
    """A cache and its parameters. needs: what a model's `supports` must hold."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError if the model is of another kind."""
        name = next((n for n, kind in CACHES.items() if kind is type(self)), type(self).__name__)
        if spec.streams != 1 or spec.noise != "mask":
            raise UnsupportedError(
                f"cache '{name}' is for full-sequence models (MDLM, SEDD); this model caches exactly;"
                " leave cache out"
            )
        lacking = self.needs - spec.supports
        if lacking:
            raise UnsupportedError(
                f"cache '{name}' needs {', '.join(sorted(lacking))}, which this model does not"
                " support; use 'none'"
            )

    def start(self, model: Denoiser, length: int) -> Session:
        """A session for one window of `length` cells."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(ApproximateCache):
    """Nothing is kept: the whole window at every call."""

    def start(self, model: Denoiser, length: int) -> Session:
        return _Exact(model)


class _Exact:
    def __init__(self, model: Denoiser) -> None:
        self.model, self.work = model, Work()

    def predict(self, call: WindowInputs) -> Tensor:
        self.work.full += call.ids.shape[1]
        self.work.add(call.ids.shape[1])
        logits = self.model.step(call.step()).logits
        return _present(logits)


# -- Fast-dLLM: keys and values outside the active block, on the Denoiser contract -----------------


@dataclass(frozen=True)
class Prefix(ApproximateCache):
    """Fast-dLLM's prefix cache: within a block, the keys and values of the cells before it are
    those of its first call.

    refresh: a full pass also every so many calls of a block; 0 = at block borders alone, as
    published; 1 is exact. Source: arXiv 2505.22618."""

    needs: ClassVar[frozenset[str]] = frozenset({"cache", "overwrite"})
    suffix: ClassVar[bool] = False
    refresh: int = 0

    def __post_init__(self) -> None:
        at_least("cache", "refresh", self.refresh, 0)

    def start(self, model: Denoiser, length: int) -> Session:
        return _Slots(model, length, self)


@dataclass(frozen=True)
class Dual(Prefix):
    """Fast-dLLM's dual cache: as `Prefix`, and those of the masked cells after the block are kept
    too; the block alone is computed."""

    suffix: ClassVar[bool] = True


class _Slots:
    """Slot i of the model's cache holds cell i. Cells are given as clean ones of one rank, so that
    all see all and may be written."""

    def __init__(self, model: Denoiser, length: int, cache: Prefix) -> None:
        self.model, self.cache, self.work = model, cache, Work()
        self.slots = model.new_cache(1, length)

    def predict(self, call: WindowInputs) -> Tensor:
        length, every = call.ids.shape[1], self.cache.refresh
        full = call.inside % every == 0 if every else call.inside == 0
        start, stop = (
            (0, length) if full else (call.start, call.stop if self.cache.suffix else length)
        )
        if full:
            self.slots.slots.drop(slice(None))
        self.work.full += length
        self.work.add(stop - start)
        logits = self.model.step(_clean(call, start, stop, full), self.slots).logits
        return _present(logits)


def _clean(call: WindowInputs, start: int, stop: int, full: bool) -> Step:
    """Cells [start, stop) of the window, each written onto its own slot."""
    place = torch.arange(start, stop, device=call.ids.device)[None]
    one = torch.zeros_like(place)
    time = None if call.time is None else call.time.expand(1, stop - start)
    return Step(
        call.ids[:, start:stop],
        place,
        one,
        torch.full_like(place, CLEAN),
        one,
        one,
        write=place,
        query_mask=call.at[:, start:stop],
        time=time,
        full_attention=full,
    )


# -- dLLM-Cache and DARE: layer by layer, on the native backbone -----------------------------------


@dataclass(frozen=True)
class LayerCache(ApproximateCache):
    """A cache that decides in every layer; leaves say which cells go through the layers at a call,
    and by which rule."""

    needs: ClassVar[frozenset[str]] = frozenset({"layer_reuse"})

    def visit(self, call: WindowInputs, changed: Tensor) -> tuple[Tensor, Rule]:
        """Cells int64 [m], ascending, and the rule for them. changed: bool [L], cells that hold
        another token than at the last call."""
        raise NotImplementedError

    def start(self, model: Denoiser, length: int) -> Session:
        if not isinstance(model, DiT):
            raise UnsupportedError(
                f"this cache works inside the native backbone, not in {type(model).__name__}; use"
                " cache 'none'"
            )
        return _Layers(model, length, self)


class _Layers:
    def __init__(self, model: DiT, length: int, cache: LayerCache) -> None:
        self.model, self.cache, self.memo = model, cache, Memo(model, length)
        self.seen: Tensor | None = None

    @property
    def work(self) -> Work:
        return self.memo.work

    def predict(self, call: WindowInputs) -> Tensor:
        changed = torch.ones_like(call.at[0]) if self.seen is None else (call.ids != self.seen)[0]
        self.seen = call.ids.clone()
        cells, rule = self.cache.visit(call, changed)
        logits = reuse_step(self.model, call.step(), self.memo, cells, rule).logits
        return _present(logits)


@dataclass(frozen=True)
class Adaptive(LayerCache):
    """dLLM-Cache: the prompt anew every `prompt_every` calls, what is written every `every`; in
    between, in each layer, the share `rho` of the written cells whose values turned most.

    Intervals count calls of the text, the first of which is full. Defaults: Kp 50, Kr 7 and rho
    0.25, as published for LLaDA on GSM8K (Kr 2 to 8 elsewhere). Exact end: prompt_every 1 with
    every 1 or rho 1. Source: arXiv 2506.06295 and its code."""

    prompt_every: int = 50
    every: int = 7
    rho: float = 0.25

    def __post_init__(self) -> None:
        at_least("cache", "prompt_every", self.prompt_every, 1)
        at_least("cache", "every", self.every, 1)
        if not 0 < self.rho <= 1:
            raise ConfigError(f"cache.rho is {self.rho}; use a share in (0, 1]")

    def visit(self, call: WindowInputs, changed: Tensor) -> tuple[Tensor, Rule]:
        prompt_due, due = (call.number % n == 0 for n in (self.prompt_every, self.every))
        cells = torch.arange(0 if prompt_due else call.prompt, len(changed), device=changed.device)
        return cells, Whole() if due else ByValue(self.rho, call.prompt if prompt_due else 0)


@dataclass(frozen=True)
class DareKV(LayerCache):
    """DARE-KV: in each layer, a cell whose query has turned little since its last refresh keeps its
    key and value.

    tau: least 1 - cosine of a refresh; 0 is exact. every: calls between full passes. Cells that
    hold another token than at the last call are always refreshed. Source: arXiv 2605.08134, its
    abstract; the threshold form and both defaults are inferred."""

    output: ClassVar[bool] = False
    tau: float = 0.005
    every: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 2:
            raise ConfigError(f"cache.tau is {self.tau}; use 1 - cosine, in [0, 2]")
        at_least("cache", "every", self.every, 1)

    def visit(self, call: WindowInputs, changed: Tensor) -> tuple[Tensor, Rule]:
        cells = torch.arange(len(changed), device=changed.device)
        return cells, (
            Whole() if call.number % self.every == 0 else ByQuery(self.tau, self.output, changed)
        )


@dataclass(frozen=True)
class DareOutput(DareKV):
    """DARE-O: by the same test, a cell keeps its attention's output; keys, values and the first
    layer are computed for all (inferred)."""

    output: ClassVar[bool] = True


def _present(logits: Tensor | None) -> Tensor:
    """The logits of a call. Raises UnsupportedError for a model that gave none."""
    if logits is None:
        raise UnsupportedError("the model's `step` was asked for logits and gave none; give them")
    return logits


def make_cache(
    cache: str | ApproximateCache, options: dict[str, Any] | None = None
) -> ApproximateCache:
    """The cache of a registered name with its options, or the object itself. Raises ConfigError
    with the nearest name."""
    if isinstance(cache, ApproximateCache):
        return cache
    kind = pick("cache", cache, CACHES)
    owner: Any = kind
    known = {f.name: hints(owner)[f.name] for f in fields(kind)}
    given = dict(options or {})
    for option, value in given.items():
        if option not in known:
            raise ConfigError(
                f"cache '{cache}' has no option"
                f" '{option}'{nearest(option, known) if known else '; it has none'}"
            )
        given[option] = coerce(f"cache.{option}", value, known[option])
    return kind(**given)


def at_least(owner: str, name: str, value: int, low: int) -> None:
    """Raise ConfigError unless value >= low."""
    if value < low:
        raise ConfigError(f"{owner}.{name} is {value}; use {low} or more")


CACHES: dict[str, type[ApproximateCache]] = {
    "none": Exact,
    "prefix": Prefix,
    "dual": Dual,
    "dllm": Adaptive,
    "dare-kv": DareKV,
    "dare-o": DareOutput,
}
