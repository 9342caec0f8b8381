"""The sampler: requests in, events out, block by block, many rows in one call.

    while there are rows:
        plan     which cells will be filled (known from the seed for the paper's samplers)
        call     commit the blocks that wait and predict the planned cells, in one call (`core.calls.advance`)
        choose   the policy's decision; the canvas applies it
        finish   full blocks go to the text, wait to be committed, and the row's next block opens; ended rows leave

Rows join and leave at their own block borders; a row's text depends on its prompt, its parameters and its seed alone. Knows a model
only by the Denoiser contract, text only by a `decode` function for stop strings.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bdlm.core.calls import advance, extend, predict
from bdlm.core.errors import BdlmError, ConfigError, UnsupportedError
from bdlm.core.types import Canvas, Denoiser, Out
from bdlm.generation.canvas import Board
from bdlm.generation.logits import NEVER, forbid, log_prob, nucleus, temper
from bdlm.generation.params import FinishReason, Params, Result, check_fits
from bdlm.generation.policies.base import Policy, View
from bdlm.generation.policies.exact import hitting_time
from bdlm.generation.stopping import Decode, finish


@dataclass(frozen=True)
class Event:
    """Something that happened to a request. kind: "draft" (the block being written), "commit" (new final tokens), "end".

    tokens: for "commit" the new ids. ids, masked: for "draft" the block's cells. result: for "end".
    """

    request: int
    kind: str
    tokens: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    result: Result | None = None


@dataclass
class Row:
    """A request that is being written."""

    request: int
    prompt: list[int]
    params: Params
    started: float
    calls_before: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    calls: int = 0
    steps: int = 0
    committed: int = 0  # cells of the text before the active block
    notes: list[str] = field(default_factory=list)


class Engine:
    """Writes the texts of many requests over one model and one cache.

    rows: how many requests are written at once. capacity: cached cells a row, default the window, or what the longest request needs.
    window: most cells a row may look back on; None keeps everything. Texts longer than it slide (exact until the first drop).
    queue: most requests that may wait. drafts: also report every step of the active blocks.
    """

    def __init__(
        self,
        model: Denoiser,
        rows: int = 16,
        *,
        capacity: int | None = None,
        window: int | None = None,
        block_size: int | None = None,
        queue: int = 4096,
        decode: Decode | None = None,
        drafts: bool = False,
    ) -> None:
        spec = model.spec
        if rows < 1:
            raise ConfigError(f"rows is {rows}; use 1 or more")
        self.model, self.spec, self.rows, self.decode, self.drafts, self.most = model, spec, rows, decode, drafts, queue
        self.size = block_size or spec.block_size
        if window is not None and window < 2 * self.size:
            raise ConfigError(f"window is {window} cells; use at least two blocks ({2 * self.size})")
        self.window, self.capacity = window, capacity
        self.whole = spec.streams == 1 and spec.noise != "none"
        self.waiting: deque[Row] = deque()
        self.active: list[Row | None] = [None] * rows
        self.engine_calls = 0
        self._count = 0
        self._board: Board | None = None
        self._cache: Any = None

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: Params) -> int:
        """Queue a request; returns its number. Raises ConfigError if it cannot be served."""
        ids = list(prompt)
        check_fits(params, ids, self.spec)
        if (params.block_size or self.spec.block_size) != self.size:
            raise ConfigError(f"block_size is {params.block_size}, but this engine writes blocks of {self.size}; make one for that size")
        if len(self.waiting) >= self.most:
            raise ConfigError(f"the queue is full ({self.most} requests wait); try again later")
        if not ids:
            assert self.spec.first_token is not None
            ids = [self.spec.first_token]
        longest = len(ids) + params.max_new_tokens
        if self.capacity is not None and self.window is None and not self.whole and longest > self.capacity + self.size:
            raise ConfigError(
                f"prompt and max_new_tokens need {longest} cells, but a row holds {self.capacity}; raise capacity or set a window"
            )
        if self.window is not None and len(ids) > self.window:
            raise ConfigError(f"the prompt has {len(ids)} tokens, but the window holds {self.window}; shorten it or raise window")
        self._count += 1
        self.waiting.append(Row(self._count - 1, ids, params, time.perf_counter(), self.engine_calls))
        return self._count - 1

    def cancel(self, request: int) -> list[Event]:
        """End a request now; its result holds what was written."""
        for row in list(self.waiting):
            if row.request == request:
                self.waiting.remove(row)
                return [self._end(row, "cancelled")]
        for i, active in enumerate(self.active):
            if active is not None and active.request == request:
                return [self._leave(i, "cancelled")]
        return []

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(row is not None for row in self.active)

    def run(self) -> Iterator[Event]:
        """Events until nothing is left to write."""
        while self.busy:
            yield from self.step()

    # -- one call ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let requests join, make one call, and apply the policies' decisions."""
        self._join()
        board = self._board
        if board is None or not any(row is not None for row in self.active):
            return []
        groups = self._groups()
        asked = self._plan(board, groups)
        out = self._call(board, asked, groups)
        self._choose(board, groups, asked, out)
        events = self._drafts(board) if self.drafts else []
        return events + self._finish_blocks(board)

    def _groups(self) -> dict[Policy, list[int]]:
        """Rows by policy."""
        groups: dict[Policy, list[int]] = {}
        for i, row in enumerate(self.active):
            if row is not None:
                groups.setdefault(row.params.decoder, []).append(i)
        return groups

    def _plan(self, board: Board, groups: dict[Policy, list[int]]) -> Tensor:
        """Cells whose predictions this call needs, bool [R, n]."""
        keys, asked = board.keys(), None
        for policy, rows in groups.items():
            planned = policy.plan(board.masked, keys)
            mine = board.masked if planned is None else planned
            if "filled" in policy.needs:
                mine = mine | board.filled
            assert bool(mine.any()), "policy planned nothing"
            if len(groups) == 1:
                return mine
            if asked is None:
                asked = torch.zeros_like(board.masked)
            asked[rows] = mine[rows]
        assert asked is not None
        return asked

    def _call(self, board: Board, asked: Tensor, groups: dict[Policy, list[int]]) -> Out:
        """One forward for all rows: commits what waits, predicts what is asked."""
        told = hitting_time(board.masked, board.keys()) if self.spec.time_conditioned else None
        canvas = board.canvas(told)
        want = frozenset({"logits"}).union(*(policy.needs & {"attention"} for policy in groups))
        self.engine_calls += 1
        for row in self.active:
            if row is not None:
                row.calls += 1
        if self.whole or not bool(board.wait_real.any()):
            return predict(self.model, canvas, None if self.whole else self._cache, asked, want)
        self._make_room(board)
        ids, where = board.waiting()
        out = advance(self.model, ids, where, canvas, self._cache, asked, want)
        board.wait_real[:] = False
        return out

    def _choose(self, board: Board, groups: dict[Policy, list[int]], asked: Tensor, out: Out) -> None:
        """The decisions of every group of rows, applied."""
        assert out.logits is not None
        raw = forbid(out.logits, self.spec.mask_id)
        shaped, banned = raw, self._banned(asked, raw.shape[-1])
        if banned is not None:
            shaped = shaped.masked_fill(banned, NEVER)
        if self._is_shaped:
            row = asked.nonzero(as_tuple=True)[0]
            shaped = nucleus(temper(shaped, self._temperature[row]), self._top_p[row], self._reference)
        attention = None if out.attention is None else out.attention[:, : board.cells, : board.cells]
        for policy, rows in groups.items():
            name = type(policy).__name__
            state = {k.removeprefix(f"{name}."): v for k, v in board.state.items() if k.startswith(f"{name}.")}
            view = View(
                board.masked, board.filled, asked, board.ids, shaped, raw, self._temperature, board.step, board.keys(), attention, state
            )
            mine = None
            if len(groups) > 1:
                mine = torch.zeros(self.rows, dtype=torch.bool, device=asked.device)
                mine[rows] = True
                view = _only(view, mine[:, None])
            commit = policy.choose(view)
            commit = replace(commit, extra={f"{name}.{k}": v for k, v in commit.extra.items()})
            board.apply(commit, _chosen(view, commit), mine)
        for i, active in enumerate(self.active):
            if active is not None:
                active.steps += 1

    def _banned(self, asked: Tensor, vocab: int) -> Tensor | None:
        """Tokens that a row may not write, bool [M, V], or None."""
        if not self._bans:
            return None
        banned = torch.zeros(self.rows, vocab, dtype=torch.bool, device=asked.device)
        for i, row in enumerate(self.active):
            if row is not None:
                banned[i, list(row.params.forbidden)] = True
        out = banned[asked.nonzero(as_tuple=True)[0]]
        early = self._early(asked)
        if early is not None:
            stops = torch.zeros(vocab, dtype=torch.bool, device=asked.device)
            stops[sorted(self._all_stops())] = True
            out = out | (early[:, None] & stops)
        return out

    def _early(self, asked: Tensor) -> Tensor | None:
        """Asked cells that stand before their row's min_new_tokens, bool [M]."""
        assert self._board is not None
        floor = [0 if r is None else len(r.prompt) + r.params.min_new_tokens for r in self.active]
        if not any(r is not None and r.params.min_new_tokens for r in self.active):
            return None
        limit = torch.tensor(floor, device=asked.device)[:, None]
        return (self._board.position < limit)[asked]

    def _all_stops(self) -> set[int]:
        return {i for row in self.active if row is not None for i in self._stops(row.params)}

    def _stops(self, params: Params) -> frozenset[int]:
        own = () if params.ignore_stop or self.spec.stop_token is None else (self.spec.stop_token,)
        return frozenset((*params.stop_tokens, *own))

    # -- block borders -------------------------------------------------------------------------------------------------

    def _finish_blocks(self, board: Board) -> list[Event]:
        """Full blocks become text; their rows end, or wait to commit them and open the next block."""
        full = board.full.nonzero().flatten().tolist()
        if not full:
            return []
        ids, new, logp = board.ids[full].tolist(), board.filled[full].tolist(), board.log_prob[full].tolist()
        size = board.real[full].sum(1).tolist()
        events, going = [], []
        for k, i in enumerate(full):
            row = self.active[i]
            assert row is not None
            fresh = [t for t, f in zip(ids[k], new[k], strict=True) if f]
            row.tokens += fresh
            row.log_probs += [p for p, f in zip(logp[k], new[k], strict=True) if f]
            row.committed += size[k]
            end = finish(row.tokens, len(fresh), row.params, self._stops(row.params), self.decode)
            kept = fresh if end is None else fresh[: max(0, len(fresh) - (len(row.tokens) - end[0]))]
            if kept:
                events.append(Event(row.request, "commit", kept))
            if end is None:
                going.append(i)
            else:
                row.tokens, row.log_probs = row.tokens[: end[0]], row.log_probs[: end[0]]
                events.append(self._leave(i, end[1]))
        if going:
            rows = torch.tensor(going, device=board.ids.device)
            board.wait(rows, board.ids[rows], board.position[rows], board.start[rows, None].expand(-1, board.cells), board.real[rows])
            self._open(board, going)
        return events

    def _open(self, board: Board, rows: list[int]) -> None:
        """Blank blocks after what is committed or waits; the remainder of a ragged prompt is given in its first block."""
        device = board.ids.device
        state = [self.active[i] for i in rows]
        start = [r.committed for r in state if r is not None]
        count = [min(self._room(r), board.cells) for r in state if r is not None]
        given = torch.zeros(len(rows), board.cells, dtype=torch.long)
        held = torch.zeros(len(rows), board.cells, dtype=torch.bool)
        for k, r in enumerate(state):
            assert r is not None
            rest = r.prompt[r.committed :]
            given[k, : len(rest)], held[k, : len(rest)] = torch.tensor(rest, dtype=torch.long), True
        index = torch.tensor(rows, device=device)
        board.open(index, torch.tensor(start, device=device), torch.tensor(count, device=device), given.to(device), held.to(device))

    def _room(self, row: Row) -> int:
        """Cells from the active block's start to the end of the text, cut to its block."""
        return len(row.prompt) + row.params.max_new_tokens - row.committed

    def _leave(self, i: int, reason: FinishReason) -> Event:
        row, board = self.active[i], self._board
        assert row is not None and board is not None
        self.active[i] = None
        board.close(torch.tensor([i], device=board.ids.device))
        if self._cache is not None:
            self._cache.slots.drop(i)
        self._set_parameters()
        return self._end(row, reason)

    def _end(self, row: Row, reason: FinishReason) -> Event:
        seconds = time.perf_counter() - row.started
        calls = self.engine_calls - row.calls_before
        result = Result(row.tokens, row.log_probs, row.calls, calls, seconds, reason, row.steps, tuple(row.notes))
        return Event(row.request, "end", result=result)

    def _drafts(self, board: Board) -> list[Event]:
        ids, masked, real = board.ids.tolist(), board.masked.tolist(), board.real.sum(1).tolist()
        return [
            Event(row.request, "draft", ids=ids[i][: real[i]], masked=masked[i][: real[i]])
            for i, row in enumerate(self.active)
            if row is not None
        ]

    # -- joining -------------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Give free rows to waiting requests. A cache that cannot take rows in lets them join only when it is empty."""
        free = [i for i, row in enumerate(self.active) if row is None]
        idle = len(free) == self.rows
        if not self.waiting or not free or not (idle or self.whole or hasattr(self._cache, "adopt")):
            return
        joining = [(i, self.waiting.popleft()) for i, _ in zip(free, range(len(self.waiting)), strict=False)]
        if self._board is None or (idle and not hasattr(self._cache, "adopt")):
            self._prepare([row for _, row in joining])
        board = self._board
        assert board is not None
        for i, row in joining:
            self.active[i] = row
            board.seed[i] = row.params.seed
        self._set_parameters()
        if not self.whole:
            self._prefill(board, joining, idle)
        self._open(board, [i for i, _ in joining])

    def _prepare(self, rows: list[Row]) -> None:
        """Board and cache for these and later requests."""
        device = getattr(self.model, "device", None) or torch.device("cpu")
        waiting = [*rows, *self.waiting]
        longest = max(len(r.prompt) + r.params.max_new_tokens for r in waiting)
        cells = max(self.spec.max_length, longest) if self.whole else self.size
        if self.whole:
            cells = longest
        self._board = Board(self.rows, cells, self.spec.mask_id, self.spec.context, device)
        if not self.whole:
            capacity = self.capacity or longest
            self.capacity = min(capacity, self.window) if self.window is not None else capacity
            self._cache = self.model.new_cache(self.rows, self.capacity)

    def _prefill(self, board: Board, joining: list[tuple[int, Row]], idle: bool) -> None:
        """Commit the prompts' whole blocks, all but the last, which waits for the first call."""
        rows = [row for _, row in joining]
        for row in rows:
            row.committed = len(row.prompt) // self.size * self.size
        waits = [max(0, row.committed - self.size) for row in rows]
        longest = max(waits)
        index = torch.tensor([i for i, _ in joining], device=board.ids.device)
        if longest:
            self._commit_prompts(board, rows, waits, longest, index, idle)
        width = min(self.size, max(row.committed - w for row, w in zip(rows, waits, strict=True)))
        if width:
            place = torch.tensor(waits)[:, None] + torch.arange(width)
            real = place < torch.tensor([row.committed for row in rows])[:, None]
            start = place // self.size * self.size
            board.wait(index, *(x.to(index.device) for x in (_padded(rows, place, real), place, start, real)))

    def _commit_prompts(self, board: Board, rows: list[Row], waits: list[int], longest: int, index: Tensor, idle: bool) -> None:
        place = torch.arange(longest).expand(len(rows), -1)
        real = place < torch.tensor(waits)[:, None]
        where = board.where(place.to(index.device), (place // self.size * self.size).to(index.device), real.to(index.device))
        ids = _padded(rows, place, real).to(index.device)
        for row, count in zip(rows, waits, strict=True):
            row.calls += count > 0
        self.engine_calls += 1
        if idle and len(rows) == self.rows:
            extend(self.model, ids, where, self._cache)
        elif hasattr(self._cache, "adopt"):
            own = self.model.new_cache(len(rows), longest)
            extend(self.model, ids, where, own)
            self._cache.adopt(index, own)
        else:
            full = torch.zeros(self.rows, longest, dtype=torch.long, device=index.device)
            there = torch.zeros(self.rows, longest, dtype=torch.bool, device=index.device)
            full[index], there[index] = ids, real.to(index.device)
            every = torch.arange(longest, device=index.device).expand(self.rows, -1)
            extend(self.model, full, board.where(every, every // self.size * self.size, there), self._cache)

    def _make_room(self, board: Board) -> None:
        """Slide the window where a row's cache could not hold what it is about to commit."""
        slots = self._cache.slots
        coming = board.wait_real.sum(1)
        over = slots.length + coming > slots.capacity
        if not bool(over.any()):
            return
        if not hasattr(self._cache, "drop_first"):
            raise UnsupportedError("this model's cache has no sliding window; ask for fewer tokens or give the engine more capacity")
        self._cache.drop_first(self.size, over)
        for i in over.nonzero().flatten().tolist():
            row = self.active[i]
            if row is not None and not row.notes:
                row.notes.append(f"the window slid after {row.committed} tokens; later blocks are conditioned on the last {slots.capacity}")

    def _set_parameters(self) -> None:
        """Per-row sampling parameters as tensors."""
        params = [None if row is None else row.params for row in self.active]
        self._temperature = torch.tensor([1.0 if p is None else p.temperature for p in params], dtype=torch.float32)
        self._top_p = torch.tensor([1.0 if p is None else p.top_p for p in params], dtype=torch.float32)
        kinds = {p.nucleus for p in params if p is not None and p.top_p < 1}
        if len(kinds) > 1:
            raise ConfigError("nucleus is 'standard' in some rows and 'reference' in others; use one kind in an engine")
        self._reference = kinds == {"reference"}
        self._is_shaped = any(p is not None and (p.temperature != 1 or p.top_p < 1) for p in params)
        self._bans = any(p is not None and (p.forbidden or p.min_new_tokens) for p in params)
        if self._board is not None:
            device = self._board.ids.device
            self._temperature, self._top_p = self._temperature.to(device), self._top_p.to(device)


def _padded(rows: list[Row], place: Tensor, real: Tensor) -> Tensor:
    """Prompt tokens at the given places, 0 where there is none. int64 [k, m]."""
    ids = torch.zeros_like(place)
    for k, row in enumerate(rows):
        prompt = torch.tensor(row.prompt)
        ids[k] = torch.where(real[k], prompt[place[k].clamp(max=len(row.prompt) - 1)], 0)
    return ids


def _only(view: View, mine: Tensor) -> View:
    """The view of the rows marked in `mine`, bool [R, 1]: the others have nothing masked, filled or asked."""
    subset = (view.asked & mine)[view.asked]
    return replace(
        view,
        masked=view.masked & mine,
        filled=view.filled & mine,
        asked=view.asked & mine,
        logits=view.logits[subset],
        raw=view.raw[subset],
    )


def _chosen(view: View, commit: Any) -> Tensor:
    """The model's own log-probability of every asked cell's chosen token, float [R, n]."""
    return view.spread(log_prob(view.raw, commit.ids[view.asked]), 0.0)


def generate(
    model: Denoiser, prompts: Sequence[Sequence[int]], params: Params | Sequence[Params], *, rows: int | None = None, window: int | None = None,
    decode: Decode | None = None, progress: Callable[[int], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Write a text for each prompt; row r of the result belongs to prompt r.

    prompts: lists of token ids (an empty one starts from the model's first token). params: one for all (row r then takes seed + r) or
    one each. rows: requests written at once, default all. Raises ConfigError before any model call.
    """
    each = [params.with_(seed=params.seed + i) for i in range(len(prompts))] if isinstance(params, Params) else list(params)
    if len(each) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts came with {len(each)} params; give one for all or one each")
    if not prompts:
        return []
    engine = Engine(model, rows or len(prompts), window=window, block_size=each[0].block_size, decode=decode, queue=len(prompts))
    for prompt, own in zip(prompts, each, strict=True):
        engine.submit(prompt, own)
    results: dict[int, Result] = {}
    for event in engine.run():
        if event.result is not None:
            results[event.request] = event.result
            if progress is not None:
                progress(len(results))
    return [results[i] for i in range(len(prompts))]


def stream(
    model: Denoiser, prompt: Sequence[int], params: Params, *, window: int | None = None, decode: Decode | None = None, drafts: bool = True
) -> Iterator[Event]:
    """The events of one text, as they happen."""
    engine = Engine(model, 1, window=window, block_size=params.block_size, decode=decode, drafts=drafts)
    engine.submit(prompt, params)
    yield from engine.run()


__all__ = ["BdlmError", "Canvas", "Engine", "Event", "generate", "stream"]
