"""Approximate caches for full-sequence models: which activations of earlier forward passes are used
again, and when they are refreshed.

In: the forward passes of one request, written block by block within one window
(`generation.full_sequence.engine`). Out: logits of the queried cells, and the computed share of the
activations. A cache is a frozen class with its parameters; `start` opens a session for one request.
The prefix and dual caches stand on the Denoiser contract alone; the others need the native model's
`layer_reuse`. Knows nothing about decoders.

All are approximate: reused activations do not reflect what was written since. Block diffusion
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
from bdlm.models.layer_reuse import (
    ByQuery,
    ByValue,
    FullRefresh,
    Rule,
    WindowState,
    Work,
    reuse_step,
)


@dataclass(frozen=True)
class WindowInputs:
    """One forward pass of a request. L cells of the window, all of which see each other.

    ids: int64 [1, L], the token of each cell. query_mask: bool [1, L], cells to predict, all in the
    active block. time: float [1, 1], the mask probability, for time-conditioned models. prompt:
    cells of the prompt. start, stop: the active block. number: forward passes of this request
    before this one; number_in_block: those of this block."""

    ids: Tensor
    query_mask: Tensor
    time: Tensor | None
    prompt: int
    start: int
    stop: int
    number: int
    number_in_block: int

    def step(self) -> Step:
        """Return the whole window as one block of noisy cells: the exact forward pass."""
        cells = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        one = torch.zeros_like(cells)
        time = None if self.time is None else self.time.expand(self.ids.shape)
        return Step(
            self.ids,
            cells,
            one,
            one,
            one,
            one,
            query_mask=self.query_mask,
            time=time,
            full_attention=True,
        )


class Session(Protocol):
    """One request under a cache, and the work so far."""

    @property
    def work(self) -> Work: ...

    def predict(self, inputs: WindowInputs) -> Tensor:
        """Return the logits of the cells of `inputs.query_mask`, [M, V]."""
        ...


@dataclass(frozen=True)
class ApproximateCache:
    """Base class of caches: frozen dataclasses with their parameters as fields. needs: what the
    `supports` of a model must hold."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError if the cache does not work with the model."""
        name = next((n for n, kind in CACHES.items() if kind is type(self)), type(self).__name__)
        if spec.streams != 1 or spec.noise != "mask":
            raise UnsupportedError(
                f"cache '{name}' is for full-sequence models (MDLM, SEDD); this model caches"
                " exactly; leave cache out"
            )
        lacking = self.needs - spec.supports
        if lacking:
            raise UnsupportedError(
                f"cache '{name}' needs {', '.join(sorted(lacking))}, which this model does not"
                " support; use 'none'"
            )

    def start(self, model: Denoiser, length: int) -> Session:
        """Open a session for one window of `length` cells."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(ApproximateCache):
    """Caches nothing: computes the whole window in every forward pass."""

    def start(self, model: Denoiser, length: int) -> Session:
        return _ExactSession(model)


class _ExactSession:
    def __init__(self, model: Denoiser) -> None:
        self.model, self.work = model, Work()

    def predict(self, inputs: WindowInputs) -> Tensor:
        self.work.full += inputs.ids.shape[1]
        self.work.add(inputs.ids.shape[1])
        logits = self.model.step(inputs.step()).logits
        return _present(logits)


# -- Fast-dLLM: keys and values outside the active block, on the Denoiser contract -----------------


@dataclass(frozen=True)
class Prefix(ApproximateCache):
    """Fast-dLLM's prefix cache: within a block, the keys and values of the cells before it are
    those of its first forward pass.

    refresh: a full pass also every so many forward passes of a block; 0 = at block borders alone,
    as published; 1 is exact. Source: arXiv 2505.22618."""

    needs: ClassVar[frozenset[str]] = frozenset({"cache", "overwrite"})
    suffix: ClassVar[bool] = False
    refresh: int = 0

    def __post_init__(self) -> None:
        at_least("cache", "refresh", self.refresh, 0)

    def start(self, model: Denoiser, length: int) -> Session:
        return _SlotSession(model, length, self)


@dataclass(frozen=True)
class Dual(Prefix):
    """Fast-dLLM's dual cache: as `Prefix`, and the keys and values of the masked cells after the
    block are cached too; only the block is computed."""

    suffix: ClassVar[bool] = True


class _SlotSession:
    """A session on the model's cache, with cell i in slot i. Cells are given as clean ones of one
    rank, so that all see all and may be written."""

    def __init__(self, model: Denoiser, length: int, cache: Prefix) -> None:
        self.model, self.cache, self.work = model, cache, Work()
        self.kept = model.new_cache(1, length)

    def predict(self, inputs: WindowInputs) -> Tensor:
        length, every = inputs.ids.shape[1], self.cache.refresh
        full = inputs.number_in_block % every == 0 if every else inputs.number_in_block == 0
        start, stop = (
            (0, length) if full else (inputs.start, inputs.stop if self.cache.suffix else length)
        )
        if full:
            self.kept.slots.drop(slice(None))
        self.work.full += length
        self.work.add(stop - start)
        logits = self.model.step(_clean(inputs, start, stop, full), self.kept).logits
        return _present(logits)


def _clean(inputs: WindowInputs, start: int, stop: int, full: bool) -> Step:
    """A step of the cells [start, stop) of the window, each written to its own slot."""
    place = torch.arange(start, stop, device=inputs.ids.device)[None]
    one = torch.zeros_like(place)
    time = None if inputs.time is None else inputs.time.expand(1, stop - start)
    return Step(
        inputs.ids[:, start:stop],
        place,
        one,
        torch.full_like(place, CLEAN),
        one,
        one,
        write=place,
        query_mask=inputs.query_mask[:, start:stop],
        time=time,
        full_attention=full,
    )


# -- dLLM-Cache and DARE: layer by layer, on the native model --------------------------------------


@dataclass(frozen=True)
class LayerCache(ApproximateCache):
    """Base class of caches that decide in every layer: subclasses say which cells go through the
    layers in a forward pass, and by which rule."""

    needs: ClassVar[frozenset[str]] = frozenset({"layer_reuse"})

    def visit(self, inputs: WindowInputs, changed: Tensor) -> tuple[Tensor, Rule]:
        """Return the cells to compute, int64 [m], ascending, and the rule for them. changed: bool
        [L], cells with another token than in the last forward pass."""
        raise NotImplementedError

    def start(self, model: Denoiser, length: int) -> Session:
        if not isinstance(model, DiT):
            raise UnsupportedError(
                f"this cache works inside the native model, not in {type(model).__name__}; use"
                " cache 'none'"
            )
        return _LayerSession(model, length, self)


class _LayerSession:
    def __init__(self, model: DiT, length: int, cache: LayerCache) -> None:
        self.model, self.cache, self.memo = model, cache, WindowState(model, length)
        self.seen: Tensor | None = None

    @property
    def work(self) -> Work:
        return self.memo.work

    def predict(self, inputs: WindowInputs) -> Tensor:
        changed = (
            torch.ones_like(inputs.query_mask[0])
            if self.seen is None
            else (inputs.ids != self.seen)[0]
        )
        self.seen = inputs.ids.clone()
        cells, rule = self.cache.visit(inputs, changed)
        logits = reuse_step(self.model, inputs.step(), self.memo, cells, rule).logits
        return _present(logits)


@dataclass(frozen=True)
class Adaptive(LayerCache):
    """dLLM-Cache: computes the prompt every `prompt_every` forward passes and the new cells every
    `every`; in between, in each layer, the share `rho` of the new cells with the values that turned
    most.

    Intervals count the forward passes of a request, the first of which is full. Defaults: Kp 50, Kr
    7 and rho 0.25, as published for LLaDA on GSM8K (Kr 2 to 8 elsewhere). Exact end: prompt_every 1
    with every 1 or rho 1. Source: arXiv 2506.06295 and its code."""

    prompt_every: int = 50
    every: int = 7
    rho: float = 0.25

    def __post_init__(self) -> None:
        at_least("cache", "prompt_every", self.prompt_every, 1)
        at_least("cache", "every", self.every, 1)
        if not 0 < self.rho <= 1:
            raise ConfigError(f"cache.rho is {self.rho}; use a share in (0, 1]")

    def visit(self, inputs: WindowInputs, changed: Tensor) -> tuple[Tensor, Rule]:
        prompt_due, due = (inputs.number % n == 0 for n in (self.prompt_every, self.every))
        cells = torch.arange(
            0 if prompt_due else inputs.prompt, len(changed), device=changed.device
        )
        return cells, FullRefresh() if due else ByValue(
            self.rho, inputs.prompt if prompt_due else 0
        )


@dataclass(frozen=True)
class DareKV(LayerCache):
    """DARE-KV: in each layer, a cell keeps its key and value while its query has turned little
    since its last refresh.

    tau: the 1 - cosine from which a cell is refreshed, in [0, 2]; 0 is exact. every: forward passes
    between full ones. Cells with another token than in the last forward pass are always refreshed.
    Source: arXiv 2605.08134, its abstract; the threshold form and both defaults are inferred."""

    output: ClassVar[bool] = False
    tau: float = 0.005
    every: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 2:
            raise ConfigError(f"cache.tau is {self.tau}; use 1 - cosine, in [0, 2]")
        at_least("cache", "every", self.every, 1)

    def visit(self, inputs: WindowInputs, changed: Tensor) -> tuple[Tensor, Rule]:
        cells = torch.arange(len(changed), device=changed.device)
        return cells, (
            FullRefresh()
            if inputs.number % self.every == 0
            else ByQuery(self.tau, self.output, changed)
        )


@dataclass(frozen=True)
class DareOutput(DareKV):
    """DARE-O: by the same test, a cell keeps the output of its attention; keys, values and the
    first layer are computed for all cells (inferred)."""

    output: ClassVar[bool] = True


def _present(logits: Tensor | None) -> Tensor:
    """The logits of a forward pass. Raises UnsupportedError for a model that gave none."""
    if logits is None:
        raise UnsupportedError("the model's `step` was asked for logits and gave none; give them")
    return logits


def make_cache(
    cache: str | ApproximateCache, options: dict[str, Any] | None = None
) -> ApproximateCache:
    """Make the cache of a registered name with its options, or return the object itself. Raises
    ConfigError for an unknown name or option, with the nearest known one."""
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
