"""Generation with full-sequence models, block by block within one window under an approximate
cache; and how much the cache changes the result.

    generate_full_sequence(model, prompts, params, cache="dual")    results, with the computed share
    agreement(model, prompts, params, cache="dual")    the same compared with exact forward passes

The window is the prompt and every new cell. A block is filled before the next one is begun
(semi-autoregressive decoding), and every forward pass sees the whole window. One request at a time:
several in one forward pass would refresh each other's caches. Knows a model by the Denoiser
contract, and a cache by `generation.full_sequence.approximate_cache`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import BdlmError, ConfigError, DecoderError
from bdlm.core.threads import limit_threads, survive_fork
from bdlm.core.types import Commit, Denoiser, ModelSpec
from bdlm.generation.decoders.base import View
from bdlm.generation.decoders.exact import hitting_time
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.decode_step import NOT_NUMBERS
from bdlm.generation.full_sequence.approximate_cache import (
    ApproximateCache,
    Exact,
    Session,
    WindowInputs,
    Work,
    make_cache,
)
from bdlm.generation.sampling.logits_filters import (
    NEVER,
    clamp_temperature,
    forbid,
    log_prob,
    min_p,
    nucleus,
    temper,
    top_k,
)
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling_params import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    check_fits,
)
from bdlm.models.inference import num_weights

BLOCK = 32  # cells of a block, as published for LLaDA (Fast-dLLM)

_UNUSED = (
    "stop",
    "min_entropy",
    "retries",
    "known_tokens",
    "infill_mode",
    "logits_processor",
    "stopping_criteria",
    "guidance_scale",
    "negative_prompt_ids",
    "block_size",
)


@dataclass(frozen=True)
class FullSequenceOutput(RequestOutput):
    """A finished request. work: multiply-adds of the full and of the cached computation."""

    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Agreement:
    """How much a cache changes the results of some requests.

    tokens: the share of positions with the same token under the cache and without it (after the
    first difference the texts diverge). drawn: along the texts under the cache, the share of filled
    cells for which the exact predictions of the same canvas draw the same token. total_variation,
    kl: of those predictions, means over the queried cells; kl = KL(exact || cached), nats.
    share: the computed share of the exact multiply-adds per forward pass; parts: the same of each
    part. forward_passes: of a request, mean; exact_forward_passes: without the cache."""

    tokens: float
    drawn: float
    total_variation: float
    kl: float
    share: float
    parts: dict[str, float]
    forward_passes: float
    exact_forward_passes: float


def generate_full_sequence(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    cache: str | ApproximateCache = "prefix",
    *,
    options: dict[str, Any] | None = None,
    block: int = BLOCK,
) -> list[FullSequenceOutput]:
    """Generate for each prompt under a cache of `CACHES` (or an object), one after the other.

    prompts: lists of token ids. params: one for all (prompt r then takes seed + r) or one each;
    `SamplingParams.block_size` must be None. options: the cache's parameters. block: cells that are
    filled before the next ones are begun, >= 1. Raises ConfigError or UnsupportedError before any
    forward pass."""
    kept = make_cache(cache, options)
    survive_fork()
    weights = num_weights(model)
    results: list[FullSequenceOutput] = []
    for prompt, own in _validated(model.spec, prompts, params, kept, block):
        with limit_threads(weights, len(prompt) + own.max_new_tokens):
            results.append(_Generation(model, prompt, own, kept, block).run())
    return results


def agreement(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    cache: str | ApproximateCache = "prefix",
    *,
    options: dict[str, Any] | None = None,
    block: int = BLOCK,
) -> Agreement:
    """Generate every request under the cache and exactly, and compare. Arguments and errors as
    `generate_full_sequence`."""
    kept, meter = make_cache(cache, options), _Meter()
    work, same, positions = Work(), 0, 0
    forward_passes, exact_forward_passes = 0, 0
    for prompt, own in _validated(model.spec, prompts, params, kept, block):
        cached = _Generation(model, prompt, own, kept, block, meter).run()
        exact = _Generation(model, prompt, own, Exact(), block).run()
        same += sum(a == b for a, b in zip(cached.token_ids, exact.token_ids))
        positions += max(len(cached.token_ids), len(exact.token_ids))
        forward_passes += cached.forward_passes
        exact_forward_passes += exact.forward_passes
        work = _sum(work, cached.work)
    cells, filled, count = max(meter.cells, 1), max(meter.filled, 1), max(len(prompts), 1)
    return Agreement(
        same / max(positions, 1),
        meter.agreed / filled,
        meter.variation / cells,
        meter.kl / cells,
        work.share(),
        {part: work.share(part) for part in work.counts},
        forward_passes / count,
        exact_forward_passes / count,
    )


def _sum(a: Work, b: Work) -> Work:
    return Work(
        b.weights, a.full + b.full, {part: a.counts[part] + b.counts[part] for part in a.counts}
    )


def _validated(
    spec: ModelSpec,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    cache: ApproximateCache,
    block: int,
) -> list[tuple[list[int], SamplingParams]]:
    """Pair prompts and params. Raises ConfigError or UnsupportedError for what does not fit."""
    each = (
        [params.with_(seed=params.seed + i) for i in range(len(prompts))]
        if isinstance(params, SamplingParams)
        else list(params)
    )
    if len(each) != len(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts came with {len(each)} params; give one for all or one each"
        )
    if block < 1:
        raise ConfigError(f"block is {block}; use 1 or more cells")
    cache.check(spec)
    plain = {f.name: f.default for f in fields(SamplingParams)} | {"known_tokens": {}}
    for prompt, own in zip(prompts, each, strict=True):
        for name in _UNUSED:
            if getattr(own, name) != plain[name]:
                raise ConfigError(
                    f"{name} is {getattr(own, name)!r}, which generation under a cache does not"
                    " take; leave it out"
                )
        check_fits(own, list(prompt), spec)
        own.decoder_object.check(min(block, own.max_new_tokens), spec)
        foreign = own.decoder_object.needs - {"filled"}
        if foreign:
            raise ConfigError(
                f"decoder {type(own.decoder_object).__name__} needs {', '.join(sorted(foreign))},"
                " which caches do not give; use 'threshold'"
            )
    first = [] if spec.first_token is None else [spec.first_token]
    return [(list(prompt) or first, own) for prompt, own in zip(prompts, each, strict=True)]


class _Generation:
    """One request: its window, the block being denoised, and the session of its cache."""

    def __init__(
        self,
        model: Denoiser,
        prompt: list[int],
        params: SamplingParams,
        cache: ApproximateCache,
        block: int,
        meter: _Meter | None = None,
    ) -> None:
        self.spec, self.params, self.block, self.meter = model.spec, params, block, meter
        self.first, self.length = len(prompt), len(prompt) + params.max_new_tokens
        self.device = _device(model)
        self.ids = torch.full((1, self.length), self.spec.mask_id, device=self.device)
        self.ids[0, : self.first] = torch.tensor(prompt, device=self.device)
        self.masked = torch.arange(self.length, device=self.device)[None] >= self.first
        self.draws = torch.zeros_like(self.ids)
        of_model = self.spec.stop_token is not None and not params.ignore_eos
        self.stops = [*params.stop_token_ids, *([self.spec.stop_token] if of_model else [])]
        self.banned = torch.tensor(_banned(params, self.spec), dtype=torch.long, device=self.device)
        self.session: Session = cache.start(model, self.length)
        self.exact: Session | None = None if meter is None else Exact().start(model, self.length)
        self.forward_passes = 0
        self.lost: Tensor | None = None  # cells of the block that got a banned token

    @torch.inference_mode()
    def run(self) -> FullSequenceOutput:
        """Fill all blocks, or those up to the first stop token."""
        started, scores = time.perf_counter(), list[float]()
        reason: FinishReason = "length"
        for start in range(self.first, self.length, self.block):
            stop = min(start + self.block, self.length)
            scores += self._fill(start, stop)
            tokens = self.ids[0, self.first : stop].tolist()
            floor = self.params.min_new_tokens
            ends = [i for i, t in enumerate(tokens) if t in self.stops and i >= floor]
            if ends:
                tokens, reason = tokens[: ends[0]], "stop_token"
                break
        return FullSequenceOutput(
            tokens,
            scores[: len(tokens)],
            self.forward_passes,
            self.forward_passes,
            time.perf_counter() - started,
            reason,
            work=self.session.work,
        )

    def _fill(self, start: int, stop: int) -> list[float]:
        """Fill the cells [start, stop). Returns their log-probabilities."""
        decoder, blocks = self.params.decoder_object, self._open(start, stop)
        number, self.lost = 0, None
        while not bool(blocks.full[0]):
            if number >= decoder.bound(stop - start):
                raise DecoderError(
                    f"the decoder {type(decoder).__name__} took more decisions than its bound"
                )
            planned = decoder.plan(blocks.masked, blocks.noise())
            query_mask = blocks.masked if planned is None else planned
            if "filled" in decoder.needs:
                query_mask = query_mask | blocks.filled
            self._decide(blocks, query_mask, self._inputs(query_mask, start, stop, number))
            self.ids[:, start:stop] = blocks.ids
            self.masked[:, start:stop] = blocks.masked
            self.draws[:, start:stop] = blocks.draw
            number, self.forward_passes = number + 1, self.forward_passes + 1
        if self.lost is not None and bool(self.lost.any()):
            place = int(blocks.position[self.lost].min()) - self.first
            raise ConfigError(
                f"no token can be written as new token {place}: banned_token_ids,"
                " allowed_token_ids or min_new_tokens leave none; ban fewer"
            )
        scores: list[float] = blocks.log_prob[0].tolist()
        if any(math.isnan(x) for x in scores):
            raise BdlmError(NOT_NUMBERS)
        return scores

    def _open(self, start: int, stop: int) -> BlockState:
        """A blank block of the cells [start, stop)."""
        blocks = BlockState(1, stop - start, self.spec.mask_id, self.spec.context, self.device)
        blocks.seed[0] = self.params.seed
        row, every = torch.zeros(1, dtype=torch.long, device=self.device), ~blocks.masked
        blocks.open(row, blocks.start + start, every, blocks.ids, ~every)
        return blocks

    def _inputs(self, query_mask: Tensor, start: int, stop: int, number: int) -> WindowInputs:
        """The forward pass that predicts `query_mask`, bool [1, n], of the block."""
        in_window, time = torch.zeros_like(self.masked), None
        in_window[:, start:stop] = query_mask
        if self.spec.time_conditioned:
            position = torch.arange(self.length, device=self.device)[None]
            seed = torch.full_like(position[:, 0], self.params.seed)
            time = hitting_time(self.masked, CellNoise(seed, position, self.draws)).float()
        return WindowInputs(
            self.ids, in_window, time, self.first, start, stop, self.forward_passes, number
        )

    def _decide(self, blocks: BlockState, query_mask: Tensor, inputs: WindowInputs) -> None:
        """Make one forward pass under the cache, and apply the decoder's decision."""
        view = self._view(blocks, query_mask, self.session.predict(inputs))
        commit = self.params.decoder_object.choose(view)
        changed = blocks.check(commit, self.spec.vocab_size)
        lost = view.impossible(commit, changed)
        self.lost = lost if self.lost is None else self.lost | lost
        seen = changed & query_mask
        scores = torch.zeros_like(blocks.log_prob).masked_scatter_(
            seen, log_prob(view.raw[seen[query_mask]], commit.ids[seen])
        )
        if self.meter is not None and self.exact is not None:
            exact = self._view(blocks, query_mask, self.exact.predict(inputs))
            self.meter.compare(view, exact, commit)
        blocks.apply(commit, scores, changed=changed)

    def _view(self, blocks: BlockState, query_mask: Tensor, logits: Tensor) -> View:
        """What the decoder sees of a forward pass."""
        params, raw = self.params, forbid(logits, self.spec.mask_id)
        model = raw.index_fill(1, self.banned, NEVER)
        early = (blocks.position < self.first + params.min_new_tokens)[query_mask]
        for token in self.stops:
            model[early, token] = NEVER
        temperature = torch.full(
            (1,), clamp_temperature(params.temperature), dtype=torch.float32, device=self.device
        )

        def cut(logits: Tensor, _query_mask: Tensor) -> Tensor:
            logits = top_k(temper(logits, temperature.expand(len(logits))), params.top_k)
            return min_p(nucleus(logits, params.top_p, params.nucleus == "reference"), params.min_p)

        return View(
            blocks.masked,
            blocks.filled,
            query_mask,
            blocks.ids,
            cut(model, query_mask),
            raw,
            temperature,
            blocks.step,
            blocks.noise(),
            state=blocks.state,
            mask_id=self.spec.mask_id,
            model=model,
            cut=cut,
        )


def _device(model: Denoiser) -> torch.device:
    """The device of a model's weights; the CPU for a model without weights."""
    weights = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((w.device for w in weights), torch.device("cpu"))


def _banned(params: SamplingParams, spec: ModelSpec) -> list[int]:
    """The ids that the request must not write, besides the mask token."""
    return [
        t
        for t in range(spec.vocab_size)
        if t in params.banned_token_ids
        or (params.allowed_token_ids and t not in params.allowed_token_ids)
    ]


@dataclass
class _Meter:
    """Sums over forward passes: queried cells, their total variation and KL; filled cells, and
    those for which the exact predictions draw the same token."""

    cells: int = 0
    variation: float = 0.0
    kl: float = 0.0
    filled: int = 0
    agreed: int = 0

    def compare(self, cached: View, exact: View, commit: Commit) -> None:
        p, q = (v.raw.double().log_softmax(-1) for v in (exact, cached))
        self.cells += len(p)
        self.variation += float((p.exp() - q.exp()).abs().sum()) / 2
        self.kl += float((p.exp() * (p - q)).nan_to_num(0.0).sum())
        cells = commit.cells & cached.query_mask
        self.filled += int(cells.sum())
        self.agreed += int((exact.drawn(cells) == commit.ids)[cells].sum())
