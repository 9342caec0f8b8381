"""The rows of an engine and what belongs to them: slots, texts, canvases, parameters and the cache;
how requests come in and go.

In: requests. Out: rows whose first block is open and whose prompt waits to be committed. A row
shares committed blocks of a prompt with another row where it can. Knows nothing about decoders'
decisions or events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bdlm.core.blockmap import block_start
from bdlm.core.devices import check_memory
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.types import Denoiser
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.deferred import DeferredLogProbs
from bdlm.generation.engine.logits_processors import LogitsProcessors
from bdlm.generation.engine.prefix_cache import Slot, SlotPool
from bdlm.generation.engine.request import Queue, Request
from bdlm.generation.engine.stopping import Stops
from bdlm.generation.engine.token_buffer import TokenBuffer
from bdlm.generation.prefill import CHUNK, prefill
from bdlm.generation.sampling_params import SamplingParams, block_of, check_fits

CHECKED_FROM = 1 << 20  # cells of a cache from which its memory is compared with the machine's
PROBE = 256  # cells of the small cache whose size tells that of a large one
CELL_BYTES = 21  # of `TokenBuffer`, for each cell of a text


class Scheduler:
    """State of R rows. `version` grows whenever a request takes or leaves a slot. share: whether
    rows may copy each other's prompts."""

    def __init__(
        self,
        model: Denoiser,
        rows: int,
        size: int,
        capacity: int | None,
        window: int | None,
        queue: int,
        memory: int | None,
        share: bool = True,
    ) -> None:
        spec = model.spec
        self.model, self.spec, self.size, self.window = model, spec, size, window
        self.alone = not share  # one row a pass
        self.whole = spec.streams == 1 and spec.noise != "none"
        self.device = getattr(model, "device", None) or torch.device("cpu")
        self.capacity = min(
            (x for x in (window, capacity) if x is not None), default=spec.max_length
        )
        # a cache brings room for two of the model's own blocks besides
        room = self.capacity + max(0, size - 2 * spec.block_size)
        rows = rows if memory is None or self.whole else _affordable(model, rows, room, memory)
        self.rows = rows
        if not self.whole and rows * room > CHECKED_FROM:
            each = model.new_cache(1, PROBE).nbytes / PROBE
            what = f"a cache of {rows} x {room} cells; ask for fewer new tokens, or set a window"
            check_memory(self.device, int(each * rows * room), what)
        self.cache: Any = None if self.whole else _within(model.new_cache(rows, room), memory)
        self.slots = SlotPool(rows, share=share and hasattr(self.cache, "copy_prefix"))
        self.queue, self.version = Queue(queue), 0
        self.buffer, self.deferred = (
            TokenBuffer(rows, spec.context, self.device),
            DeferredLogProbs(),
        )
        self.block_state = BlockState(
            rows,
            1 if self.whole else min(size, self.capacity),
            spec.mask_id,
            spec.context,
            self.device,
        )
        self.logits_processors, self.stops = (
            LogitsProcessors(rows, spec.vocab_size, spec.mask_id, self.device),
            Stops(rows, self.device),
        )
        # most decisions of the open block
        self.bound = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the texts."""
        return (
            (0 if self.cache is None else self.cache.nbytes)
            + self.buffer.nbytes
            + self.deferred.nbytes
        )

    @property
    def cells(self) -> int:
        """Cells of the next call on a CPU: those of the open blocks, and those that wait to be
        committed. Elsewhere 0."""
        if self.device.type != "cpu":
            return 0
        waiting = (
            0 if self.cache is None else (self.buffer.done - self.buffer.sent).clamp(min=0).sum()
        )
        return int(self.block_state.real.sum() + waiting)

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: SamplingParams, calls: int) -> int:
        """Queue a request; returns its number. Raises ConfigError if it cannot be served."""
        ids = list(prompt)
        check_fits(params, ids, self.spec)
        if not ids:
            assert self.spec.first_token is not None
            ids = [self.spec.first_token]
        request = Request(
            self._count,
            ids,
            params,
            block_of(
                replace(params, block_size=params.block_size or self.size), len(ids), self.spec
            ),
            calls,
        )
        self._check_room(request)
        what = f"a text of {request.length} cells; lower max_new_tokens"
        check_memory(self.device, request.length * CELL_BYTES, what)
        forced = _forced(request)
        if forced:
            request.notes.append(
                f"{forced} given tokens lie in later blocks than cells before them: forced when"
                " reached, nothing is conditioned on them (infill_mode='gap' or 'text' conditions)"
            )
        self.queue.put(request)
        self._count += 1
        return request.number

    def _check_room(self, request: Request) -> None:
        size, params = request.size, request.params
        if params.num_rows > self.rows:
            raise ConfigError(
                f"guidance takes two rows, but this engine has {self.rows}; give it more rows"
            )
        committed = block_start(request.length - 1, size)
        if self.cache is None or committed == 0:
            return
        if self.window is None and committed > self.capacity:
            raise ConfigError(
                f"prompt and max_new_tokens need {committed} cells, but a row holds"
                f" {self.capacity}; raise capacity or set a window"
            )
        if self.window is not None and len(request.prompt) > self.capacity:
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, but the window holds"
                f" {self.capacity}; shorten it or raise window"
            )
        if self.window is not None and self.window < 2 * size:
            raise ConfigError(
                f"window is {self.window} cells; use at least two blocks ({2 * size})"
            )

    # -- in ----------------------------------------------------------------------------------------

    def admit(self, calls: int) -> int:
        """Give free rows to waiting requests. Returns how many forward passes that took (prompts
        that several newcomers share)."""
        if not len(self.queue) or not self.slots.free:
            return 0
        requests = self.queue.take(self.slots.free)
        if not requests:
            return 0
        new, now = self.slots.enter(requests), time.perf_counter()
        for slot in new:
            slot.request.joined_at, slot.request.started = calls, now
        rows = [i for slot in new for i in (slot.row, slot.unconditional_row) if i is not None]
        self.block_state.widen(max(_width(slot.request) for slot in new))
        self._enter(new)
        made = self._share(new)
        index = torch.tensor(rows, device=self.device)
        self.buffer.pass_given(index)
        made += self._prefill(index, leave=CHUNK)
        self.open(index)
        self.version += 1
        return made

    def _enter(self, new: list[Slot]) -> None:
        """TokenBuffer, seeds and parameters of newcomers."""
        rows, requests, texts = [], [], []
        for slot in new:
            known, p = dict(enumerate(slot.request.prompt)), len(slot.request.prompt)
            given = {p + place: token for place, token in slot.request.params.known_tokens.items()}
            for row, start in (
                (slot.row, known),
                (slot.unconditional_row, _ending_at(p, slot.request.params.negative_prompt_ids)),
            ):
                if row is not None:
                    rows.append(row)
                    requests.append(slot.request)
                    texts.append({**start, **given})
        params, prompt = [r.params for r in requests], [len(r.prompt) for r in requests]
        sizes, index = [r.size for r in requests], torch.tensor(rows, device=self.device)
        self.buffer.enter(
            rows, texts, prompt, [r.length for r in requests], sizes, [_reach(r) for r in requests]
        )
        self.block_state.seed[index] = torch.tensor([r.seed for r in requests], device=self.device)
        stops = [self.stop_token_ids(p) for p in params]
        self.logits_processors.enter(rows, params, stops)
        self.stops.enter(
            rows, stops, [n + p.min_new_tokens for n, p in zip(prompt, params, strict=True)]
        )
        if self.cache is not None:
            kept = [
                slot.cells if slot.source == i else 0
                for slot in new
                for i in (slot.row, slot.unconditional_row)
                if i is not None
            ]
            self.cache.slots.drop(index, torch.tensor(kept, device=self.device))

    def stop_token_ids(self, params: SamplingParams) -> list[int]:
        """The tokens that end a request's text."""
        ends = () if self.spec.stop_token is None else (self.spec.stop_token,)
        own = () if params.ignore_eos else (*ends, *self.spec.other_stop_tokens)
        return sorted({*params.stop_token_ids, *own})

    def _share(self, new: list[Slot]) -> int:
        """Lay committed blocks that other rows hold into the newcomers'. Returns the calls that
        this took."""
        sharing = [slot for slot in new if slot.source is not None]
        self._copy([slot for slot in sharing if not slot.fresh])
        behind = [slot for slot in sharing if slot.fresh]
        if not behind:
            return 0
        leading = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        leading[[slot.source for slot in behind if slot.source is not None]] = True
        made = self._prefill(leading.nonzero()[:, 0], leave=0)
        if not bool((self.buffer.sent >= self.buffer.done)[leading].all()):
            # each newcomer then commits its own prompt with its first call, which shows whose the
            # model cannot read
            return made
        self._copy(behind)
        return made

    def _prefill(self, rows: Tensor, leave: int) -> int:
        """Commit what waits in some rows, int64 [k], up to `leave` cells each. Returns the calls
        made.

        Requests without a part in a call do not count it among their own.
        """
        if self.cache is None:
            return 0
        chosen = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        chosen[rows] = True
        passes = prefill(self.model, self.buffer, self.cache, chosen, leave, self.alone)
        own = passes.tolist()
        made = sum(own) if self.alone else max(own)
        if made:
            for row in self.slots.taken:
                request, unconditional_row = (
                    self.slots.requests[row],
                    self.slots.unconditional_rows.get(row, row),
                )
                assert request is not None
                request.joined_at += made - max(own[row], own[unconditional_row])
        return made

    def _copy(self, sharing: list[Slot]) -> None:
        for cells in {slot.cells for slot in sharing}:
            alike = [slot for slot in sharing if slot.cells == cells]
            rows, source = (
                torch.tensor(x, device=self.device)
                for x in ([s.row for s in alike], [s.source for s in alike])
            )
            moved = rows != source
            if bool(moved.any()):
                place = torch.arange(cells, device=self.device).expand(int(moved.sum()), -1)
                rank = (
                    place
                    if self.spec.context == "causal"
                    else self.buffer.start[rows[moved], :cells]
                )
                self.cache.copy_prefix(source[moved], rows[moved], rank, place)
            self.buffer.sent[rows] = cells

    # -- blocks ------------------------------------------------------------------------------------

    def open(self, rows: Tensor) -> None:
        """Open the next block of some rows, int64 [k], behind what is final."""
        blank = self.buffer.blank(rows, self.block_state.cells)
        self.block_state.open(rows, blank.start, blank.real, blank.ids, blank.given)

    def make_room(self) -> Tensor:
        """Slide the window where a row's cache could not hold what it is about to commit. Returns
        the rows that slid, bool [R]."""
        slots, slid = self.cache.slots, torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        while True:
            over = slots.length + (self.buffer.done - self.buffer.sent).clamp(min=0) > self.capacity
            if not bool(over.any()):
                return slid
            if not hasattr(self.cache, "drop_first"):
                raise UnsupportedError(
                    "this model's cache has no sliding window; ask for fewer tokens or give the"
                    " engine more capacity"
                )
            self.cache.drop_first(int(self.buffer.size[over].min()), over)
            slid |= over

    # -- out ---------------------------------------------------------------------------------------

    def release(self, rows: list[int], slid: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Free the slots of some requests and their unconditional. slid: rows whose cache no longer
        begins with the prompt."""
        sent, left, kept = self.buffer.sent.tolist() if self.slots.shares else [], [], []
        for row in rows:
            request = self.slots.requests[row]
            assert request is not None
            whole = block_start(len(request.prompt), request.size)
            row_mask, cells = self.slots.leave(
                row, keep=self.slots.shares and row not in slid and sent[row] >= whole
            )
            left += row_mask
            kept += cells
        index = torch.tensor(left, device=self.device)
        self.block_state.close(index)
        self.buffer.leave(index)
        self.deferred.drop(left)
        self.logits_processors.leave(left)
        if self.cache is not None:
            self.cache.slots.drop(index, torch.tensor(kept, device=self.device))
        self.version += 1


def _ending_at(place: int, tokens: tuple[int, ...]) -> dict[int, int]:
    """Tokens by place, the last of them just before `place`."""
    tokens = tokens[max(0, len(tokens) - place) :]
    return dict(enumerate(tokens, place - len(tokens)))


def _forced(request: Request) -> int:
    """Given tokens that an earlier block's cells cannot see."""
    size, first, given = request.size, len(request.prompt), request.params.known_tokens
    unknown = next(
        (first + i for i in range(request.params.max_new_tokens) if i not in given), request.length
    )
    seen = max(block_start(unknown, size) + size, _reach(request))
    return sum(first + place >= seen for place in given)


def _reach(request: Request) -> int:
    """Where the first block of a row ends at the earliest: behind the last given cell, for a block
    over the gap."""
    if request.params.infill_mode != "gap" or not request.params.known_tokens:
        return 0
    return len(request.prompt) + max(request.params.known_tokens) + 1


def _width(request: Request) -> int:
    """Cells of the widest block of a request."""
    start = block_start(len(request.prompt), request.size)
    return min(max(request.size, _reach(request) - start), request.length)


def _within(cache: Any, memory: int | None) -> Any:
    """A cache that, if it can make room for draft canvases, does so within a budget."""
    if hasattr(cache, "limit"):
        cache.limit = memory
    return cache


def _affordable(model: Denoiser, rows: int, capacity: int, memory: int) -> int:
    """At most `rows`, as many as `memory` bytes hold."""
    each = model.new_cache(1, capacity).nbytes
    if not each:
        raise UnsupportedError(
            "memory is given, but this model's cache grows with the text and cannot be held to a"
            " budget; leave it out"
        )
    if each > memory:
        raise ConfigError(
            f"memory is {memory} bytes, but the cache of one row of {capacity} cells takes {each};"
            " give more, or a smaller capacity"
        )
    return min(rows, memory // each)
