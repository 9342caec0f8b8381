"""The engine: requests in, events out, block by block, many rows in one forward pass.

One step, `Engine.step`:

    admit      free rows go to waiting requests; long prompts are committed to the cache by
               forward passes of their own, the end of a prompt with the request's first step
    schedule   the running rows, by decoder
    plan       the cells that each decoder needs (known from the seed for the paper's samplers)
    run        one forward pass: commit finished blocks, and predict the planned cells
    decode     each decoder's decision, applied to the blocks
    retire     full blocks become text; requests end, or continue with their next block

A row's text depends on its prompt, its parameters and its seed, not on the other rows. A request
that fails (a decoder that breaks the rules, a processor or a model that raises, logits that are not
numbers) ends alone. Knows a model by the Denoiser contract, and text by a `decode` function for
stop strings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from bdlm.core.errors import ConfigError
from bdlm.core.threads import limit_threads, survive_fork
from bdlm.core.types import Denoiser
from bdlm.core.validation import validated
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.decode_step import DecodeStep
from bdlm.generation.engine.logits_processors import LogitsProcessors
from bdlm.generation.engine.model_runner import ModelRunner
from bdlm.generation.engine.prefill import Prefill
from bdlm.generation.engine.request import Event
from bdlm.generation.engine.row_cache import allocate
from bdlm.generation.engine.scheduler import Scheduler
from bdlm.generation.engine.slots import SlotPool
from bdlm.generation.engine.stopping import Decode, StopTokens
from bdlm.generation.engine.token_buffer import TokenBuffer
from bdlm.generation.sampling_params import RequestOutput, SamplingParams
from bdlm.models.inference import for_inference, num_weights

LOGGER = logging.getLogger("bdlm.engine")
LOGGER.addHandler(logging.NullHandler())


class Engine:
    """Generates for many requests at once, with one model and one cache.

    Rows of different lengths, decoders and parameters share each forward pass. Requests may be
    submitted and cancelled between steps. Errors that end one request, or that the engine recovers
    from, are also logged to `logging.getLogger("bdlm.engine")`. An engine is for one thread.

    Example (a small table of exact probabilities stands in for a model):

    >>> from bdlm.generation.engine.engine import Engine
    >>> from bdlm.generation.sampling_params import SamplingParams
    >>> from bdlm.models.toy import Inconsistent, toy_spec
    >>> engine = Engine(Inconsistent(toy_spec(4, 16)), max_num_seqs=2)
    >>> first = engine.submit([1], SamplingParams(max_new_tokens=6, seed=1))
    >>> second = engine.submit([2, 0], SamplingParams(max_new_tokens=3, decoder="threshold"))
    >>> outputs = {event.request: event.result for event in engine.run() if event.kind == "end"}
    >>> len(outputs[first].token_ids), len(outputs[second].token_ids)
    (6, 3)
    >>> outputs[second].finish_reason
    'length'
    """

    @validated()
    def __init__(
        self,
        model: Denoiser,
        max_num_seqs: int = 16,
        *,
        capacity: int | None = None,
        context_window: int | None = None,
        block_size: int | None = None,
        max_waiting: int = 4096,
        max_cache_bytes: int | None = None,
        decode: Decode | None = None,
        drafts: bool = False,
        bitwise: bool = False,
        compile: bool = False,
    ) -> None:
        """Allocate the rows and their cache.

        model: any `Denoiser`; the native model is replaced by its inference form
            (`models.inference`).
        max_num_seqs: rows, the requests that run at once, >= 1. A guided request takes two.
        capacity: cells that a row of the cache holds, >= 1; default the model's training length.
        context_window: the most cells that a row may look back on, at least two blocks; longer
            texts slide, which is exact until the first cells are dropped. None keeps everything.
        block_size: the block size of requests that name none, 1 to the training length; default
            the model's own.
        max_waiting: the most requests that may wait for a row, >= 1.
        max_cache_bytes: the most bytes of the cache, which may mean fewer rows than asked for (the
            property `max_num_seqs` gives their number); None for no limit.
        decode: from token ids to text, which requests with stop strings need.
        drafts: also report the open blocks after every step, as "draft" events.
        bitwise: a request's result is the same to the last bit whatever runs with it, at the price
            of one forward pass for each row and of prompts that are not shared. Native models of
            masked tokens without time conditioning only.
        compile: run the native model's layers through torch.compile, one graph for each number of
            cells.

        Raises ConfigError for arguments that are out of range or do not fit the model, and
        UnsupportedError for a budget on a cache that has no fixed size."""
        survive_fork()
        _check_options(model, max_num_seqs, capacity, block_size, context_window)
        model = for_inference(model, compile)
        spec = model.spec
        if bitwise and ("ragged_batching" not in spec.supports or spec.noise == "none"):
            raise ConfigError(
                "bitwise is True, but only native models of masked tokens without time conditioning"
                " run rows of unequal length without padding; leave it out"
            )
        self.bitwise = bitwise
        # decoders that need these cannot be run bitwise: attention pads the rows to one length, and
        # so do draft canvases where the cache's budget may leave no room for them
        self._not_bitwise = (
            {"attention"} if max_cache_bytes is None else {"attention", "draft_canvases"}
        )
        size = block_size or spec.block_size
        device = getattr(model, "device", None) or torch.device("cpu")
        limits = [n for n in (context_window, capacity) if n is not None]
        held = min(limits, default=spec.max_length)
        cache, rows = allocate(model, max_num_seqs, held, size, max_cache_bytes, device)
        tokens = TokenBuffer(rows, spec.context, device)
        cells = min(size, held) if cache.exists else 1
        blocks = BlockState(rows, cells, spec.mask_id, spec.context, device)
        slots = SlotPool(rows, shares=cache.can_copy and not bitwise)
        processors = LogitsProcessors(rows, spec.vocab_size, spec.mask_id, device)
        stops = StopTokens(rows, device)
        self.scheduler = Scheduler(
            spec,
            block_size=size,
            context_window=context_window,
            max_waiting=max_waiting,
            draft_events=drafts,
            bounds="logit_bounds" in spec.supports and not bitwise,
            slots=slots,
            tokens=tokens,
            blocks=blocks,
            processors=processors,
            stops=stops,
            cache=cache,
            prefill=Prefill(model, cache, tokens, row_by_row=bitwise),
            decode=decode,
            device=device,
        )
        self.runner = ModelRunner(model, cache, tokens, blocks, row_by_row=bitwise)
        self.decoding = DecodeStep(spec, tokens, blocks, processors, stops, device)
        self._cache, self._tokens, self._num_weights = cache, tokens, num_weights(model)

    @property
    def max_num_seqs(self) -> int:
        """Rows, the requests that run at once; fewer than the argument where `max_cache_bytes`
        limits them."""
        return self.scheduler.num_rows

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._cache.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the tokens: what the engine holds besides the model."""
        return self._cache.nbytes + self._tokens.nbytes

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return self.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return self.scheduler.num_running

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.busy

    @property
    def engine_steps(self) -> int:
        """Steps with a forward pass so far, and passes for prompts. With `bitwise` a step makes one
        pass for each row."""
        return self.scheduler.engine_steps

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request and return its number, by which events name it.

        prompt: token ids; an empty one stands for the model's first token. Raises ConfigError,
        before any forward pass, for a request that does not fit the model or the engine, and when
        `max_waiting` requests wait."""
        needs = params.decoder_object.needs
        if self.bitwise and needs & self._not_bitwise:
            raise ConfigError(
                f"decoder {params.decoder!r} makes forward passes that pad the rows to one length"
                " (for attention, or draft canvases within max_cache_bytes); use another decoder,"
                " or leave out bitwise"
            )
        return self.scheduler.submit(prompt, params)

    @torch.inference_mode()
    def cancel(self, request: int) -> list[Event]:
        """End a request now, and return its last events.

        Its result has finish reason "cancelled" and holds the tokens of the finished blocks. A
        request that is unknown or has ended gives no events."""
        return self.scheduler.cancel(request)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Make one forward pass for all running requests, after those that new long prompts need,
        and return what happened.

        Does nothing if no request waits or runs. A request that fails ends with an "end" event that
        holds the error; the others are not affected. What a broken cache or device raises outside a
        request is not caught."""
        events: list[Event] = []
        self.scheduler.admit()
        with limit_threads(self._num_weights, self.scheduler.num_cells):
            # a request that fails is dropped and the pass is made again without it; the step ends
            # only after a pass that succeeded, since newcomers may then copy committed prompts
            while batch := self.scheduler.schedule():
                self.decoding.plan(batch)
                outputs = self.runner.run(batch)
                if outputs is None:
                    events += self.scheduler.drop_failed(batch)
                    continue
                self.decoding.decode(batch, outputs)
                return events + self.scheduler.retire(batch)
        return events

    def run(self) -> Iterator[Event]:
        """Step until every request has ended; yields the events as they happen."""
        while self.busy:
            yield from self.step()


def _check_options(
    model: Denoiser,
    max_num_seqs: int,
    capacity: int | None,
    block_size: int | None,
    context_window: int | None,
) -> None:
    """Raise ConfigError for options out of range, before any memory is allocated for them."""
    if max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs is {max_num_seqs}; use 1 or more")
    if capacity is not None and capacity < 1:
        raise ConfigError(f"capacity is {capacity}; use 1 or more cells")
    longest = model.spec.max_length
    if block_size is not None and not 1 <= block_size <= longest:
        raise ConfigError(
            f"block_size is {block_size}, but the model's window has {longest} cells; use 1 to"
            f" {longest}"
        )
    size = block_size or model.spec.block_size
    if context_window is not None and context_window < 2 * size:
        raise ConfigError(
            f"context_window is {context_window} cells; use at least two blocks ({2 * size})"
        )


def generate(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    max_num_seqs: int | None = None,
    context_window: int | None = None,
    decode: Decode | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RequestOutput]:
    """Generate for each prompt; result r belongs to prompt r.

    prompts: lists of token ids (an empty one starts from the model's first token). params: one for
    all (prompt r then takes seed + r) or one each. max_num_seqs: requests that run at once, default
    all. context_window, decode: as in `Engine`. progress: called with the number of finished
    requests. Raises ConfigError before any forward pass; if a request fails later, what it failed
    on."""
    each = (
        [params.with_(seed=params.seed + i) for i in range(len(prompts))]
        if isinstance(params, SamplingParams)
        else list(params)
    )
    if len(each) != len(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts came with {len(each)} params; give one for all or one each"
        )
    if not prompts:
        return []
    lengths = [max(len(p), 1) + own.max_new_tokens for p, own in zip(prompts, each, strict=True)]
    sizes = {own.block_size for own in each}
    engine = Engine(
        model,
        sum(own.num_rows for own in each) if max_num_seqs is None else max_num_seqs,
        capacity=max(lengths),
        context_window=context_window,
        block_size=sizes.pop() if len(sizes) == 1 else None,
        decode=decode,
        max_waiting=len(prompts),
    )
    for prompt, own in zip(prompts, each, strict=True):
        engine.submit(prompt, own)
    results: dict[int, RequestOutput] = {}
    for event in engine.run():
        if event.error is not None:
            raise event.error
        if event.result is not None:
            results[event.request] = event.result
            if progress is not None:
                progress(len(results))
    return [results[i] for i in range(len(prompts))]


def stream(
    model: Denoiser,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    context_window: int | None = None,
    decode: Decode | None = None,
    drafts: bool = True,
) -> Iterator[Event]:
    """Generate for one prompt, and yield its events as they happen. Arguments as in `Engine`.

    Raises ConfigError before any forward pass; if the request fails later, what it failed on."""
    engine = Engine(
        model,
        params.num_rows,
        capacity=max(len(prompt), 1) + params.max_new_tokens,
        context_window=context_window,
        block_size=params.block_size,
        decode=decode,
        drafts=drafts,
    )
    engine.submit(prompt, params)
    for event in engine.run():
        if event.error is not None:
            raise event.error
        yield event


__all__ = ["Engine", "Event", "generate", "stream"]
