"""Texts of whole-sequence models, written block by block within one window under an approximate
cache, and how far the cache is off.

    generate_full_sequence(model, prompts, params, cache="dual")     the texts, with the share of activations that was computed
    agreement(model, prompts, params, cache="dual")       the same against the exact decoder, in tokens and in predictions

The window is the prompt and every new cell; a block is filled before the next one is begun
(semi-autoregressive decoding), and every call sees the whole window. One text at a time: texts in
one call would refresh each other's caches. Knows a model by the Denoiser contract, a cache by
`generation.full_sequence.approximate_cache`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import BdlmError, ConfigError, DecoderError
from bdlm.core.threads import fed, survive_fork
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
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling.sampler import (
    NEVER,
    forbid,
    log_prob,
    min_p,
    nucleus,
    temper,
    top_k,
    usable,
)
from bdlm.generation.sampling_params import RequestOutput, SamplingParams, check_fits
from bdlm.models.inference import weights_of

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
    """A text and the work that it took."""

    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Agreement:
    """How far a cache is off, over some texts.

    tokens: share of places at which the text written under the cache and the exact decoder's hold
    the same token (after the first difference they part). drawn: along the cache's own texts, the
    share of filled cells into which the exact predictions of the same canvas draw the same token.
    total_variation, kl: of those predictions, means over the asked cells; kl = KL(exact || cached),
    nats.
    share: computed share of the exact decoder's multiply-adds per call; parts: the same of each
    part. calls: a text, mean; exact_forward_passes: of the exact decoder."""

    tokens: float
    drawn: float
    total_variation: float
    kl: float
    share: float
    parts: dict[str, float]
    calls: float
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
    """Write a text for each prompt under a cache of `CACHES` (or an object), one after the other.

    params: one for all (row r then takes seed + r) or one each; `SamplingParams.block_size` stays
    None. options: the cache's parameters.
    block: cells that are written before the next ones are begun. Raises ConfigError or
    UnsupportedError before any forward pass."""
    kept = make_cache(cache, options)
    survive_fork()
    weights, texts = weights_of(model), []
    for prompt, own in _checked(model.spec, prompts, params, kept, block):
        with fed(weights, len(prompt) + own.max_new_tokens):
            texts.append(_Text(model, prompt, own, kept, block).write())
    return texts


def agreement(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    cache: str | ApproximateCache = "prefix",
    *,
    options: dict[str, Any] | None = None,
    block: int = BLOCK,
) -> Agreement:
    """Write every text under the cache and exactly, and compare. Arguments and errors as
    `generate_full_sequence`."""
    kept, meter = make_cache(cache, options), _Meter()
    work, same, places, calls, exact_forward_passes = Work(), 0, 0, 0, 0
    for prompt, own in _checked(model.spec, prompts, params, kept, block):
        text = _Text(model, prompt, own, kept, block, meter).write()
        exact = _Text(model, prompt, own, Exact(), block).write()
        same += sum(a == b for a, b in zip(text.token_ids, exact.token_ids))
        places += max(len(text.token_ids), len(exact.token_ids))
        calls, exact_forward_passes = (
            calls + text.forward_passes,
            exact_forward_passes + exact.forward_passes,
        )
        work = _sum(work, text.work)
    cells, filled, count = max(meter.cells, 1), max(meter.filled, 1), max(len(prompts), 1)
    return Agreement(
        same / max(places, 1),
        meter.agreed / filled,
        meter.variation / cells,
        meter.kl / cells,
        work.share(),
        {part: work.share(part) for part in work.counts},
        calls / count,
        exact_forward_passes / count,
    )


def _sum(a: Work, b: Work) -> Work:
    return Work(
        b.weights, a.full + b.full, {part: a.counts[part] + b.counts[part] for part in a.counts}
    )


def _checked(
    spec: ModelSpec,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    cache: ApproximateCache,
    block: int,
) -> list[tuple[list[int], SamplingParams]]:
    """Every prompt with its params, after all that can be wrong was looked at."""
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
                    f"{name} is {getattr(own, name)!r}, which writing under a cache does not take;"
                    " leave it out"
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


class _Text:
    """One text: its window, the block being written, and the session of its cache."""

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
        self.stops = [
            *params.stop_token_ids,
            *(
                [self.spec.stop_token]
                if self.spec.stop_token is not None and not params.ignore_eos
                else []
            ),
        ]
        self.banned = torch.tensor(_banned(params, self.spec), dtype=torch.long, device=self.device)
        self.session: Session = cache.start(model, self.length)
        self.exact: Session | None = None if meter is None else Exact().start(model, self.length)
        self.calls = 0
        self.lost: Tensor | None = None  # cells of the block that got a token which is forbidden

    @torch.inference_mode()
    def write(self) -> FullSequenceOutput:
        """All blocks, or those up to the first stop token."""
        started, scores, reason = time.perf_counter(), [], "length"
        for start in range(self.first, self.length, self.block):
            stop = min(start + self.block, self.length)
            scores += self._fill(start, stop)
            tokens = self.ids[0, self.first : stop].tolist()
            ends = [
                i
                for i, token in enumerate(tokens)
                if token in self.stops and i >= self.params.min_new_tokens
            ]
            if ends:
                tokens, reason = tokens[: ends[0]], "stop_token"
                break
        seconds, finish = time.perf_counter() - started, reason
        return FullSequenceOutput(
            tokens,
            scores[: len(tokens)],
            self.calls,
            self.calls,
            seconds,
            finish,
            work=self.session.work,
        )  # type: ignore[arg-type]

    def _fill(self, start: int, stop: int) -> list[float]:
        """Write the cells [start, stop). Returns their log-probabilities."""
        decoder, block_state, inside, self.lost = (
            self.params.decoder_object,
            self._board(start, stop),
            0,
            None,
        )
        while not bool(block_state.full[0]):
            if inside >= decoder.bound(stop - start):
                raise DecoderError(
                    f"the decoder {type(decoder).__name__} took more decisions than its bound"
                )
            planned = decoder.plan(block_state.masked, block_state.keys())
            asked = block_state.masked if planned is None else planned
            if "filled" in decoder.needs:
                asked = asked | block_state.filled
            call = self._call(asked, start, stop, inside)
            self._decide(block_state, asked, call)
            self.ids[:, start:stop], self.masked[:, start:stop], self.draws[:, start:stop] = (
                block_state.ids,
                block_state.masked,
                block_state.draw,
            )
            inside, self.calls = inside + 1, self.calls + 1
        if self.lost is not None and bool(self.lost.any()):
            place = int(block_state.position[self.lost].min()) - self.first
            raise ConfigError(
                f"no token can be written as new token {place}: forbidden, allowed or"
                " min_new_tokens leave none; forbid fewer"
            )
        scores: list[float] = block_state.log_prob[0].tolist()
        if any(math.isnan(x) for x in scores):
            raise BdlmError(NOT_NUMBERS)
        return scores

    def _board(self, start: int, stop: int) -> BlockState:
        block_state = BlockState(1, stop - start, self.spec.mask_id, self.spec.context, self.device)
        block_state.seed[0] = self.params.seed
        every = torch.ones_like(block_state.masked)
        block_state.open(
            torch.zeros(1, dtype=torch.long, device=self.device),
            block_state.start + start,
            every,
            block_state.ids,
            ~every,
        )
        return block_state

    def _call(self, query_mask: Tensor, start: int, stop: int, inside: int) -> WindowInputs:
        at, told = torch.zeros_like(self.masked), None
        at[:, start:stop] = query_mask
        if self.spec.time_conditioned:
            place = torch.arange(self.length, device=self.device)[None]
            told = hitting_time(
                self.masked,
                CellNoise(torch.full_like(place[:, 0], self.params.seed), place, self.draws),
            ).float()
        return WindowInputs(self.ids, at, told, self.first, start, stop, self.calls, inside)

    def _decide(self, block_state: BlockState, query_mask: Tensor, call: WindowInputs) -> None:
        """One forward pass under the cache, and the decoder's decision."""
        view = self._view(block_state, query_mask, self.session.predict(call))
        commit = self.params.decoder_object.choose(view)
        changed = block_state.check(commit, self.spec.vocab_size)
        lost = view.impossible(commit, changed)
        self.lost = lost if self.lost is None else self.lost | lost
        seen = changed & query_mask
        scores = torch.zeros_like(block_state.log_prob).masked_scatter_(
            seen, log_prob(view.raw[seen[query_mask]], commit.ids[seen])
        )
        if self.meter is not None:
            assert self.exact is not None
            self.meter.compare(
                view, self._view(block_state, query_mask, self.exact.predict(call)), commit
            )
        block_state.apply(commit, scores, changed=changed)

    def _view(self, block_state: BlockState, query_mask: Tensor, logits: Tensor) -> View:
        """What the decoder sees of a call."""
        params, raw = self.params, forbid(logits, self.spec.mask_id)
        model = raw.index_fill(1, self.banned, NEVER)
        early = (block_state.position < self.first + params.min_new_tokens)[query_mask]
        for token in self.stops:
            model[early, token] = NEVER
        heat = torch.full((1,), usable(params.temperature), dtype=torch.float32, device=self.device)

        def cut(logits: Tensor, _asked: Tensor) -> Tensor:
            logits = top_k(temper(logits, heat.expand(len(logits))), params.top_k)
            return min_p(nucleus(logits, params.top_p, params.nucleus == "reference"), params.min_p)

        return View(
            block_state.masked,
            block_state.filled,
            query_mask,
            block_state.ids,
            cut(model, query_mask),
            raw,
            heat,
            block_state.step,
            block_state.keys(),
            state=block_state.state,
            mask_id=self.spec.mask_id,
            model=model,
            cut=cut,
        )


def _device(model: Denoiser) -> torch.device:
    """Where a model's weights are; a model without weights counts on the CPU."""
    weights = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((w.device for w in weights), torch.device("cpu"))


def _banned(params: SamplingParams, spec: ModelSpec) -> list[int]:
    """Tokens that are never written, besides the mask."""
    return [
        t
        for t in range(spec.vocab_size)
        if t in params.banned_token_ids
        or (params.allowed_token_ids and t not in params.allowed_token_ids)
    ]


@dataclass
class _Meter:
    """Sums over calls: asked cells, their total variation and KL; filled cells, and those that the
    exact predictions fill alike."""

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
