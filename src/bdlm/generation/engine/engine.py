"""The sampler: requests in, events out, block by block, many rows in one call.

    while there are rows:
        join     free rows go to waiting requests; a prompt's blocks wait to be committed
        plan     which cells will be filled (known from the seed for the paper's samplers)
        call     commit the blocks that wait and predict the planned cells, in one call (`core.forward.advance`)
        choose   the decoder's decision; the canvas applies it
        finish   full blocks go to the text, wait to be committed, and the row's next block opens; ended rows leave

Rows join and leave at their own block borders; a row's text depends on its prompt, its parameters
and its seed alone. A request that fails (a decoder that breaks the rules, a processor that raises,
a model that raises or gives NaN) ends alone. Knows a model only by the Denoiser contract, text only
by a `decode` function for stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, DecoderError
from bdlm.core.threads import fed, survive_fork
from bdlm.core.types import Denoiser, Out
from bdlm.generation.decoders.base import Decoder, DraftCanvases
from bdlm.generation.decoders.exact import hitting_time
from bdlm.generation.engine.decode_step import Group, decide, state_of
from bdlm.generation.engine.draft_canvases import concatenate, merge
from bdlm.generation.engine.model_runner import (
    ForwardInputs,
    find_failing_requests,
    forward,
    one_by_one,
)
from bdlm.generation.engine.request import Event, Request
from bdlm.generation.engine.retirement import Finished, finished
from bdlm.generation.engine.scheduler import Scheduler
from bdlm.generation.engine.stopping import Decode
from bdlm.generation.sampling.guidance import guided
from bdlm.generation.sampling.sampler import forbid
from bdlm.generation.sampling_params import RequestOutput, SamplingParams
from bdlm.models.inference import fold, weights_of

# cells of a call up to which reading 8 bits of a large head, and all of it later for many cells, is
# quicker than reading all now
FEW = 6


class Engine:
    """Writes the texts of many requests over one model and one cache.

    rows: how many requests are written at once (guided ones count twice). capacity: cached cells a
    row, default the training length.
    memory: most bytes of the cache, which may mean fewer rows. window: most cells a row may look
    back on; None keeps everything, and longer texts slide (exact until the first drop). block_size:
    of requests that name none, default the model's. queue: most requests that may wait. drafts:
    also report every step of the active blocks. bitwise: a text is the same to the last bit in any
    company, at the price of one forward a row and of prompts that are not shared. compile: the
    native model's layers by torch.compile, a graph for each number of cells. Raises ConfigError for
    what does not fit."""

    def __init__(
        self,
        model: Denoiser,
        rows: int = 16,
        *,
        capacity: int | None = None,
        window: int | None = None,
        block_size: int | None = None,
        queue: int = 4096,
        memory: int | None = None,
        decode: Decode | None = None,
        drafts: bool = False,
        bitwise: bool = False,
        compile: bool = False,
    ) -> None:
        survive_fork()
        size = block_size or model.spec.block_size
        if rows < 1:
            raise ConfigError(f"rows is {rows}; use 1 or more")
        longest = model.spec.max_length
        # before memory is taken for blocks of it
        if block_size is not None and block_size > longest:
            raise ConfigError(
                f"block_size is {block_size}, but the model's window has {longest} cells; use 1 to"
                f" {longest}"
            )
        if window is not None and window < 2 * size:
            raise ConfigError(f"window is {window} cells; use at least two blocks ({2 * size})")
        self.model, self.decode, self.drafts = fold(model, compile), decode, drafts
        self.spec = self.model.spec
        self.bitwise = bitwise
        # what a decoder may need that makes calls which are not packed: no room for draft canvases
        # is sure within a budget
        self._unpacked = frozenset(
            {"attention"} if memory is None else {"attention", "draft_canvases"}
        )
        if bitwise and ("ragged_batching" not in self.spec.supports or self.spec.noise == "none"):
            raise ConfigError(
                "bitwise is True, but only native models of masked tokens without time conditioning"
                " pack; leave it out"
            )
        self.scheduler = Scheduler(
            self.model, rows, size, capacity, window, queue, memory, share=not bitwise
        )
        self._weights = weights_of(self.model)
        never = sorted(self.spec.never_written)
        self._never = torch.tensor(never, dtype=torch.long, device=self.scheduler.device)
        self.engine_steps = 0
        self._groups: list[Group] = []
        self._unconditional: tuple[Tensor, Tensor, Tensor] | None = None
        # whether no decoder needs more than draws, which bounds of the logits allow
        self._draws = False
        self._seen = -1
        self._slid: set[int] = set()
        # draft canvases of each row's request
        self._tried = torch.zeros(self.rows, dtype=torch.long, device=self.scheduler.device)

    @property
    def rows(self) -> int:
        """Requests that are written at once."""
        return self.scheduler.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the texts: what the engine holds besides the model."""
        return self.scheduler.nbytes

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self.scheduler.queue)

    @property
    def busy(self) -> bool:
        return self.waiting > 0 or not self.scheduler.slots.empty

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request; returns its number. Raises ConfigError if it cannot be served, before
        any forward pass."""
        if self.bitwise and params.decoder_object.needs & self._unpacked:
            raise ConfigError(
                f"decoder {params.decoder!r} makes calls that are not packed (for attention, or"
                " draft canvases within a memory budget); use another decoder, or leave out"
                " bitwise"
            )
        return self.scheduler.submit(prompt, params, self.engine_steps)

    @torch.inference_mode()
    def cancel(self, request: int) -> list[Event]:
        """End a request now; its result holds what was written."""
        waiting = self.scheduler.queue.remove(request)
        if waiting is not None:
            return [Event(request, "end", result=waiting.result([], [], "cancelled", None))]
        rows = [i for i in self.scheduler.slots.taken if self._request(i).number == request]
        return self._leave([Finished(i, *self._written(i), "cancelled") for i in rows])

    def run(self) -> Iterator[Event]:
        """Events until nothing is left to write."""
        while self.busy:
            yield from self.step()

    def _request(self, row: int) -> Request:
        request = self.scheduler.slots.requests[row]
        assert request is not None
        return request

    # -- one call ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let requests join, make one call, and apply the decoders' decisions."""
        self.engine_steps += self.scheduler.admit(self.engine_steps)
        with fed(self._weights, self.scheduler.cells):
            return self._step()

    def _step(self) -> list[Event]:
        events: list[Event] = []
        # until a call succeeds: the next to join may copy from any row, so all prompts are
        # committed by then
        while True:
            if self._seen != self.scheduler.version:
                self._regroup()
            if not self._groups:
                return events
            failed: dict[int, Exception] = {}
            asked, drafts = self._plan(failed)
            answer = None if failed else self._call(asked, drafts, failed)
            if answer is not None:
                break
            events += self._fail(failed)
        out, wide = answer
        given = out.logits if out.logit_bounds is None else out.logit_bounds.upper
        assert given is not None
        logits = forbid(given, self._never)
        if self._unconditional is not None:
            logits, wide = guided(logits, wide, *self._unconditional)
        decide(self.scheduler, self._groups, logits, wide, drafts, out, failed)
        if self._unconditional is not None:
            self.scheduler.block_state.follow(
                self._unconditional[0],
                self._unconditional[1],
                self.scheduler.buffer.prompt[self._unconditional[0]],
            )
        events += self._fail(failed)
        if self.drafts:
            events += self._drafts()
        return events + self._finish()

    def _regroup(self) -> None:
        """Rows by decoder; done when a request took or left a slot."""
        slots = self.scheduler.slots
        rows: dict[Decoder, list[int]] = {}
        for i in slots.taken:
            rows.setdefault(self._request(i).params.decoder_object, []).append(i)
        self._groups = []
        for decoder, own in rows.items():
            row_mask = None
            if len(rows) > 1 or slots.unconditional_rows:
                row_mask = torch.zeros(self.rows, dtype=torch.bool, device=self.scheduler.device)
                row_mask[own] = True
            self._groups.append(Group(decoder, own, row_mask))
            index = torch.tensor(own, device=self.scheduler.device)
            self.scheduler.bound[index] = decoder.bound(self.scheduler.block_state.cells)
        self._unconditional = None
        if slots.unconditional_rows:
            leaders, unconditional = (
                torch.tensor(list(x), device=self.scheduler.device)
                for x in (slots.unconditional_rows.keys(), slots.unconditional_rows.values())
            )
            weight = torch.tensor(
                [self._request(i).params.guidance_scale for i in slots.unconditional_rows],
                dtype=torch.float32,
                device=self.scheduler.device,
            )
            self._unconditional = leaders, unconditional, weight
        self._draws = (
            all(decoder.only_draws for decoder in rows)
            and not slots.unconditional_rows
            and not self.bitwise
            and "logit_bounds" in self.spec.supports
        )
        self._seen = self.scheduler.version

    def _plan(self, failed: dict[int, Exception]) -> tuple[Tensor, DraftCanvases | None]:
        """Cells whose predictions this call needs, bool [R, n], and draft canvases. failed: rows
        whose decoder raised, or has no end."""
        block_state, asked = self.scheduler.block_state, None
        tried: list[tuple[Tensor | None, DraftCanvases]] = []
        noise = block_state.keys()
        for group in self._groups:
            try:
                planned = group.decoder.plan(block_state.masked, noise)
                if "draft_canvases" in group.decoder.needs:
                    state = state_of(block_state, group.decoder)
                    more = group.decoder.draft_canvases(
                        block_state.masked, block_state.filled, block_state.ids, noise, state
                    )
                    tried += [] if more is None else [(group.mine, more)]
            except Exception as error:
                failed.update(dict.fromkeys(group.rows, error))
                continue
            row_mask = block_state.masked if planned is None else planned
            if "filled" in group.decoder.needs:
                row_mask = row_mask | block_state.filled
            if group.mine is not None:
                row_mask = row_mask & group.mine[:, None]
            asked = row_mask if asked is None else asked | row_mask
        if asked is None:
            return torch.zeros_like(block_state.masked), None
        endless = block_state.real.any(1) & (
            ~asked.any(1) | (block_state.step >= self.scheduler.bound)
        )
        if self._unconditional is not None:
            endless[self._unconditional[1]] = False
        if bool(endless.any()):
            for i in endless.nonzero()[:, 0].tolist():
                name = type(self._request(i).params.decoder_object).__name__
                failed.setdefault(
                    i,
                    DecoderError(
                        f"the decoder {name} planned no cell, or took more decisions than its bound"
                    ),
                )
        if self._unconditional is not None:
            asked[self._unconditional[1]] = asked[self._unconditional[0]]
        return asked, merge(tried)

    def _call(
        self, query_mask: Tensor, drafts: DraftCanvases | None, failed: dict[int, Exception]
    ) -> tuple[Out, Tensor] | None:
        """One forward for all rows: commits what waits, predicts what is asked. Returns the
        answers, and which cells they are of.

        None if the model raised; `failed` then says for which rows, and nothing has changed.
        """
        scheduler = self.scheduler
        mask_prob = (
            hitting_time(scheduler.block_state.masked, scheduler.block_state.keys())
            if self.spec.time_conditioned
            else None
        )
        previous = (
            scheduler.buffer.previous() if self.spec.shift or self.spec.noise == "none" else None
        )
        canvas = scheduler.block_state.canvas(previous, mask_prob)
        answer = (
            "logit_bounds"
            if self._draws and scheduler.logits_processors.bounds and int(query_mask.sum()) <= FEW
            else "logits"
        )
        outputs = frozenset({answer}).union(
            *(group.decoder.needs & {"attention", "hidden"} for group in self._groups)
        )
        if drafts is not None:
            canvas = concatenate(canvas, drafts, scheduler.block_state.keys(), self.spec.mask_id)
            query_mask = torch.cat((query_mask, drafts.query_mask.flatten(1)), 1)
        waits = None if scheduler.cache is None else scheduler.buffer.waiting()
        if waits is not None:
            self._note_slides(scheduler.make_room())
        call = ForwardInputs(canvas, query_mask, waits, outputs)
        try:
            out = (
                one_by_one(self.model, call, scheduler.cache, self._present())
                if self.bitwise
                else forward(self.model, call, scheduler.cache)
            )
        except Exception as error:
            parties = [
                [
                    i,
                    *(
                        [scheduler.slots.unconditional_rows[i]]
                        if i in scheduler.slots.unconditional_rows
                        else []
                    ),
                ]
                for i in scheduler.slots.taken
            ]
            failed.update(find_failing_requests(self.model, call, scheduler.cache, parties, error))
            return None
        self.engine_steps += 1
        if drafts is not None:
            self._tried += drafts.query_mask.any(2).sum(1)
        if waits is not None:
            scheduler.buffer.commit()
        return out, query_mask

    def _present(self) -> list[int]:
        """Rows with a text, unconditional rows included."""
        return sorted(
            [*self.scheduler.slots.taken, *self.scheduler.slots.unconditional_rows.values()]
        )

    def _note_slides(self, slid: Tensor) -> None:
        for i in slid.nonzero()[:, 0].tolist():
            request = self.scheduler.slots.requests[i]
            if request is not None and i not in self._slid:
                self._slid.add(i)
                sent = int(self.scheduler.buffer.sent[i])
                request.notes.append(
                    f"the window slid after {sent} tokens; later blocks are conditioned on the last"
                    f" {self.scheduler.capacity}"
                )

    # -- block borders -----------------------------------------------------------------------------

    def _finish(self) -> list[Event]:
        """Full blocks become text; their rows end, or wait to commit them and open the next
        block."""
        full = self.scheduler.block_state.full
        if not bool(full.any()):
            return []
        going, ended, events = finished(self.scheduler, full.nonzero()[:, 0], self.decode)
        self.scheduler.deferred.settle(self.scheduler.buffer, must=False)
        events += self._leave(ended)
        if going.numel():
            self.scheduler.open(going)
        return events

    def _written(self, row: int) -> tuple[list[int], slice]:
        """New tokens of a row that are final, and where they stand."""
        buffer, first = self.scheduler.buffer, len(self._request(row).prompt)
        cells = slice(first, max(first, int(buffer.done[row])))
        return buffer.ids[row, cells].tolist(), cells

    def _fail(self, failed: dict[int, Exception]) -> list[Event]:
        for i, error in failed.items():
            self._request(i).notes.append(f"failed: {type(error).__name__}: {error}")
        return self._leave([Finished(i, *self._written(i), "error", e) for i, e in failed.items()])

    def _leave(self, ended: list[Finished]) -> list[Event]:
        """Free the rows of requests that ended; those that are to be written anew go back to the
        queue."""
        events = []
        if ended:
            self.scheduler.deferred.settle(self.scheduler.buffer, must=True)
        for end in ended:
            request = self._request(end.row)
            request.num_draft_canvases += int(self._tried[end.row])
            self._tried[end.row] = 0
            if end.reason == "low_entropy" and request.attempt < request.params.retries:
                request.attempt += 1
                request.spent += (self.engine_steps - request.joined_at) * request.params.num_rows
                self.scheduler.queue.back(request)
                events.append(Event(request.number, "retry"))
            else:
                told = int(self.scheduler.buffer.told[end.row]) - end.cells.start
                if end.tokens[told:]:
                    events.append(Event(request.number, "commit", end.tokens[told:]))
                log_probs = self.scheduler.buffer.log_prob[end.row, end.cells].tolist()
                result = request.result(end.tokens, log_probs, end.reason, self.engine_steps)
                events.append(Event(request.number, "end", result=result, error=end.error))
        if ended:
            rows = [end.row for end in ended]
            self.scheduler.release(rows, self._slid)
            self._slid.difference_update(rows)
        return events

    def _drafts(self) -> list[Event]:
        block_state = self.scheduler.block_state
        ids, masked, real = (
            block_state.ids.tolist(),
            block_state.masked.tolist(),
            block_state.real.sum(1).tolist(),
        )
        known = (self.scheduler.buffer.prompt - block_state.start).clamp(min=0).tolist()
        return [
            Event(
                self._request(i).number,
                "draft",
                [],
                ids[i][: real[i]],
                masked[i][: real[i]],
                known[i],
            )
            for i in self.scheduler.slots.taken
        ]


def generate(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    rows: int | None = None,
    context_window: int | None = None,
    decode: Decode | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RequestOutput]:
    """Write a text for each prompt; row r of the result belongs to prompt r.

    prompts: lists of token ids (an empty one starts from the model's first token). params: one for
    all (row r then takes seed + r) or one each. rows: requests written at once, default all. Raises
    ConfigError before any forward pass; if a request fails later, what it failed on."""
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
    capacity = max(
        max(len(p), 1) + own.max_new_tokens for p, own in zip(prompts, each, strict=True)
    )
    slots = sum(own.num_rows for own in each) if rows is None else rows
    sizes = {own.block_size for own in each}
    size = sizes.pop() if len(sizes) == 1 else None
    engine = Engine(
        model,
        slots,
        capacity=capacity,
        window=context_window,
        block_size=size,
        decode=decode,
        queue=len(prompts),
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
    """The events of one text, as they happen. Raises what the request fails on."""
    capacity = max(len(prompt), 1) + params.max_new_tokens
    engine = Engine(
        model,
        params.num_rows,
        capacity=capacity,
        window=context_window,
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
