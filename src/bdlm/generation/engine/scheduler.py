"""Which requests run: waiting and running ones, admission, and retirement.

In: requests. Out: the `Batch` of the next forward pass, and events. Requests take and leave rows
only between steps, at the borders of their own blocks. A new row copies committed blocks of its
prompt from another row where it can. Knows nothing about how decoders choose or how the model
runs."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bdlm.core.blockmap import block_start
from bdlm.core.devices import check_memory
from bdlm.core.errors import ConfigError
from bdlm.core.types import ModelSpec
from bdlm.generation.decoders.base import Decoder
from bdlm.generation.engine.batch import Batch, Group, Guidance
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.logits_processors import LogitsProcessors
from bdlm.generation.engine.prefill import Prefill
from bdlm.generation.engine.request import Event, Request
from bdlm.generation.engine.retirement import Finished, Retirement
from bdlm.generation.engine.row_cache import RowCache
from bdlm.generation.engine.slots import Slot, SlotPool
from bdlm.generation.engine.stopping import Decode, StopTokens, stop_tokens_of
from bdlm.generation.engine.token_buffer import CELL_BYTES, TokenBuffer
from bdlm.generation.sampling_params import SamplingParams, block_of, check_fits

LOGGER = logging.getLogger("bdlm.engine")


class Scheduler:
    """Waiting and running requests.

    block_size: of requests that name none. context_window: cells that a row may look back on, or
    None. draft_events: whether `retire` reports the open blocks. bounds: whether the model's bounds
    of logits may be used. decode: from ids to text, for stop strings. The other arguments are the
    parts in which a request takes and leaves its rows."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        block_size: int,
        context_window: int | None,
        max_waiting: int,
        draft_events: bool,
        bounds: bool,
        slots: SlotPool,
        tokens: TokenBuffer,
        blocks: BlockState,
        processors: LogitsProcessors,
        stops: StopTokens,
        cache: RowCache,
        prefill: Prefill,
        decode: Decode | None,
        device: torch.device,
    ) -> None:
        self.spec, self.block_size, self.context_window = spec, block_size, context_window
        self.draft_events, self.bounds = draft_events, bounds
        self.slots, self.tokens, self.blocks, self.stops = slots, tokens, blocks, stops
        self.processors, self.cache = processors, cache
        self.prefill, self.device = prefill, device
        self.retirement = Retirement(slots, tokens, blocks, stops, decode)
        if max_waiting < 1:
            raise ConfigError(f"max_waiting is {max_waiting}; use 1 or more requests")
        self.max_waiting = max_waiting
        self._waiting: deque[Request] = deque()
        self.num_rows = len(slots.requests)
        self.engine_steps = 0  # forward passes so far
        self._num_submitted = 0
        self._batch: Batch | None = None  # None after a request took or left its row
        self._slid: set[int] = set()  # rows with a cache that no longer begins with the prompt
        # draft canvases of each row's request
        self._num_drafts = torch.zeros(self.num_rows, dtype=torch.long, device=device)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self.slots.taken)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or not self.slots.empty

    @property
    def num_cells(self) -> int:
        """Cells of the next forward pass on a CPU: those of the open blocks, and those to commit.
        0 on other devices, where reading the number would take time."""
        if self.device.type != "cpu":
            return 0
        to_commit = self.tokens.num_to_commit().sum() if self.cache.exists else 0
        return int(self.blocks.real.sum() + to_commit)

    # -- submission --------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request and return its number. Raises ConfigError if it cannot be served."""
        ids = list(prompt)
        check_fits(params, ids, self.spec)
        if not ids:
            assert self.spec.first_token is not None, "check_fits refuses an empty prompt"
            ids = [self.spec.first_token]
        sized = replace(params, block_size=params.block_size or self.block_size)
        size = block_of(sized, len(ids), self.spec)
        request = Request(self._num_submitted, ids, params, size, self.engine_steps)
        self._check_room(request)
        what = f"a text of {request.length} cells; lower max_new_tokens"
        check_memory(self.device, request.length * CELL_BYTES, what)
        unseen = request.num_unseen_known_tokens
        if unseen:
            request.notes.append(
                f"{unseen} known tokens lie in later blocks than cells before them: forced when"
                " reached, nothing is conditioned on them (infill_mode='gap' or 'text' conditions)"
            )
        if len(self._waiting) >= self.max_waiting:
            raise ConfigError(
                f"the queue is full ({self.max_waiting} requests wait); try again later, or raise"
                " the engine's max_waiting"
            )
        self._waiting.append(request)
        self._num_submitted += 1
        return request.number

    def _check_room(self, request: Request) -> None:
        """Raise ConfigError for a request that no row of this engine can hold."""
        size, window, capacity = request.block_size, self.context_window, self.cache.capacity
        if request.params.num_rows > self.num_rows:
            raise ConfigError(
                f"guidance takes two rows, but this engine has {self.num_rows}; raise max_num_seqs"
            )
        committed = block_start(request.length - 1, size)
        if not self.cache.exists or committed == 0:
            return
        if window is None and committed > capacity:
            raise ConfigError(
                f"prompt and max_new_tokens need {committed} cells, but a row holds {capacity};"
                " raise capacity or set a context_window"
            )
        if window is not None and len(request.prompt) > capacity:
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, but the window holds {capacity};"
                " shorten it or raise context_window"
            )
        if window is not None and window < 2 * size:
            raise ConfigError(
                f"context_window is {window} cells; use at least two blocks ({2 * size})"
            )

    def cancel(self, number: int) -> list[Event]:
        """End a request now and return its events; none for an unknown or ended one."""
        for request in self._waiting:
            if request.number == number:
                self._waiting.remove(request)
                output = request.output([], [], "cancelled", None)
                return [Event(number, "end", result=output)]
        rows = [row for row in self.slots.taken if self.slots.request(row).number == number]
        return self._leave(
            [Finished(row, *self.retirement.final_tokens(row), "cancelled") for row in rows]
        )

    # -- admission ---------------------------------------------------------------------------------

    def admit(self) -> None:
        """Give free rows to waiting requests, commit most of their prompts and open their first
        blocks."""
        requests = self._take_waiting() if self._waiting else []
        if not requests:
            return
        now = time.perf_counter()
        slots = self.slots.assign(requests)
        for slot in slots:
            slot.request.admitted_at, slot.request.started = self.engine_steps, now
        self.blocks.widen(max(slot.request.widest_block for slot in slots))
        self._fill_rows(slots)
        self._commit_prompts(slots)
        self._open([row for slot in slots for row in slot.rows])
        self._batch = None

    def _take_waiting(self) -> list[Request]:
        """Remove the next requests that fit into the free rows, first come, first served."""
        taken, free = list[Request](), self.slots.num_free
        while self._waiting and free >= self._waiting[0].params.num_rows:
            taken.append(self._waiting.popleft())
            free -= taken[-1].params.num_rows
        return taken

    def _fill_rows(self, slots: list[Slot]) -> None:
        """Write the known tokens, seeds and parameters of new requests into their rows."""
        rows = [row for slot in slots for row in slot.rows]
        requests = [slot.request for slot in slots for _ in slot.rows]
        known = [tokens for slot in slots for tokens in slot.known_tokens()]
        params = [request.params for request in requests]
        prompt = [len(request.prompt) for request in requests]
        index = torch.tensor(rows, device=self.device)
        self.tokens.enter(
            rows,
            known,
            prompt,
            [request.length for request in requests],
            [request.block_size for request in requests],
            [request.first_block_end for request in requests],
        )
        seeds = torch.tensor([request.seed for request in requests], device=self.device)
        self.blocks.seed[index] = seeds
        stops = [stop_tokens_of(own, self.spec) for own in params]
        self.processors.enter(rows, params, stops)
        floor = [n + own.min_new_tokens for n, own in zip(prompt, params, strict=True)]
        self.stops.enter(rows, stops, floor)
        kept = [slot.num_copied if slot.source == row else 0 for slot in slots for row in slot.rows]
        self.cache.keep_first(index, kept)

    def _commit_prompts(self, slots: list[Slot]) -> None:
        """Copy what other rows hold of the prompts, and compute all but the last chunk of the rest.

        A prompt that several new requests share is computed once. If the model raises there, each
        commits its own with its first step, which shows which one the model cannot process."""
        copies = [slot for slot in slots if slot.source is not None]
        self.prefill.copy([slot for slot in copies if not slot.source_is_new])
        later = [slot for slot in copies if slot.source_is_new]
        if later:
            sources = sorted({slot.source for slot in later if slot.source is not None})
            self._count_passes(*self.prefill.commit(sources, leave=0))
            if self.prefill.is_complete(sources):
                self.prefill.copy(later)
        rows = [row for slot in slots for row in slot.rows]
        self.tokens.skip_given(torch.tensor(rows, device=self.device))
        self._count_passes(*self.prefill.commit(rows))

    def _count_passes(self, made: int, own: list[int]) -> None:
        """Count the forward passes of a prefill. own: those of each row, [R]; a request does not
        count the others among its own."""
        self.engine_steps += made
        for row in self.slots.taken if made else []:
            part = max(own[each] for each in self.slots.rows_of(row))
            self.slots.request(row).admitted_at += made - part

    def _open(self, rows: list[int] | Tensor) -> None:
        """Open the next block of some rows, behind what is final."""
        index = torch.as_tensor(rows, device=self.device)
        blank = self.tokens.blank(index, self.blocks.cells)
        self.blocks.open(index, blank.start, blank.real, blank.ids, blank.given)

    # -- scheduling --------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Return the batch of the next forward pass: every running row. None if none runs."""
        failed: dict[int, Exception] = {}
        if self._batch is None:
            self._batch = self._make_batch(failed)
        if not self._batch.groups:
            return None
        return replace(self._batch, failed=failed, slid={})

    def _make_batch(self, failed: dict[int, Exception]) -> Batch:
        """The running rows by decoder. Adds to `failed` the rows with a decoder that raised."""
        slots, by_decoder = self.slots, dict[Decoder, list[int]]()
        for row in slots.taken:
            by_decoder.setdefault(slots.request(row).params.decoder_object, []).append(row)
        guidance = self._guidance()
        limit = torch.zeros(self.num_rows, dtype=torch.long, device=self.device)
        groups: list[Group] = []
        for decoder, rows in by_decoder.items():
            row_mask = None
            if len(by_decoder) > 1 or guidance is not None:
                row_mask = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
                row_mask[rows] = True
            groups.append(Group(decoder, rows, row_mask))
            try:
                limit[rows] = decoder.bound(self.blocks.cells)
            except Exception as error:
                failed.update(dict.fromkeys(rows, error))
        only_draws = (
            all(decoder.only_draws for decoder in by_decoder)
            and guidance is None
            and self.bounds
            and self.processors.bounds_suffice
        )
        requests = [slots.rows_of(row) for row in slots.taken]
        return Batch(groups, requests, guidance, limit, only_draws)

    def _guidance(self) -> Guidance | None:
        """The guided rows, their unconditional rows and scales; None if there are none."""
        rows = self.slots.unconditional_rows
        if not rows:
            return None
        scale = [self.slots.request(row).params.guidance_scale for row in rows]
        return Guidance(
            torch.tensor([*rows], device=self.device),
            torch.tensor([*rows.values()], device=self.device),
            torch.tensor(scale, dtype=torch.float32, device=self.device),
        )

    # -- retirement --------------------------------------------------------------------------------

    def retire(self, batch: Batch) -> list[Event]:
        """End the requests that failed or are complete after a forward pass, and open the next
        block of the others that have filled theirs. Returns the events."""
        self.engine_steps += 1
        if batch.drafts is not None:
            self._num_drafts += batch.drafts.query_mask.any(2).sum(1)
        events = self.drop_failed(batch)
        if self.draft_events:
            events += self.retirement.draft_events()
        full = self.blocks.full
        if bool(full.any()):
            going, ended, commits = self.retirement.finish_blocks(full.nonzero()[:, 0])
            self.tokens.settle(must=False)
            events += commits + self._leave(ended)
            if going.numel():
                self._open(going)
        return events

    def drop_failed(self, batch: Batch) -> list[Event]:
        """End the requests that failed; the error is in the event, the notes and the log."""
        self._note_slides(batch.slid)
        ended = []
        for row, error in batch.failed.items():
            request = self.slots.request(row)
            request.notes.append(f"failed: {type(error).__name__}: {error}")
            LOGGER.warning("request %d failed", request.number, exc_info=error)
            ended.append(Finished(row, *self.retirement.final_tokens(row), "error", error))
        return self._leave(ended)

    def _note_slides(self, slid: dict[int, int]) -> None:
        for row, committed in slid.items():
            request = self.slots.requests[row]
            if request is not None and row not in self._slid:
                self._slid.add(row)
                request.notes.append(
                    f"the window slid after {committed} tokens; later blocks are conditioned on the"
                    f" last {self.cache.capacity}"
                )

    def _leave(self, ended: list[Finished]) -> list[Event]:
        """Free the rows of requests that ended; those that start over return to the queue."""
        if not ended:
            return []
        self.tokens.settle(must=True)
        events = []
        for end in ended:
            request = self.slots.request(end.row)
            request.num_draft_canvases += int(self._num_drafts[end.row])
            self._num_drafts[end.row] = 0
            if end.reason == "low_entropy" and request.attempt < request.params.retries:
                request.restart(self.engine_steps)
                self._waiting.appendleft(request)  # before all others, even if the queue is full
                events.append(Event(request.number, "retry"))
                continue
            reported = int(self.tokens.reported[end.row]) - end.positions.start
            if end.tokens[reported:]:
                events.append(Event(request.number, "commit", end.tokens[reported:]))
            log_probs = self.tokens.log_prob[end.row, end.positions].tolist()
            output = request.output(end.tokens, log_probs, end.reason, self.engine_steps)
            events.append(Event(request.number, "end", result=output, error=end.error))
        self._release([end.row for end in ended])
        return events

    def _release(self, rows: list[int]) -> None:
        """Empty the rows of some requests. A committed prompt stays in the cache for later ones."""
        committed = self.tokens.committed.tolist() if self.slots.shares else []
        left: list[int] = []
        kept: list[int] = []
        for row in rows:
            request = self.slots.request(row)
            whole = block_start(len(request.prompt), request.block_size)
            keep = self.slots.shares and row not in self._slid and committed[row] >= whole
            freed, cells = self.slots.release(row, keep)
            left += freed
            kept += cells
        index = torch.tensor(left, device=self.device)
        self.blocks.close(index)
        self.tokens.leave(left)
        self.processors.leave(left)
        self.retirement.forget(left)
        self.cache.keep_first(index, kept)
        self._slid.difference_update(rows)
        self._batch = None
