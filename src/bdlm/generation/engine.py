"""The sampler: requests in, events out, block by block, many rows in one call.

    while there are rows:
        join     free rows go to waiting requests; a prompt's blocks wait to be committed
        plan     which cells will be filled (known from the seed for the paper's samplers)
        call     commit the blocks that wait and predict the planned cells, in one call (`core.calls.advance`)
        choose   the policy's decision; the canvas applies it
        finish   full blocks go to the text, wait to be committed, and the row's next block opens; ended rows leave

Rows join and leave at their own block borders; a row's text depends on its prompt, its parameters and its seed alone. A request that
fails (a decoder that breaks the rules, a processor that raises, a model that raises or gives NaN) ends alone. Knows a model only by
the Denoiser contract, text only by a `decode` function for stop strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, DecoderError
from bdlm.core.threads import fed, survive_fork
from bdlm.core.types import Denoiser, Out
from bdlm.generation.calling import Call, blamed, forward, one_by_one
from bdlm.generation.deciding import Group, decide, state_of
from bdlm.generation.finishing import Finished, finished
from bdlm.generation.guidance import guided
from bdlm.generation.joining import Desk
from bdlm.generation.logits import forbid
from bdlm.generation.params import Params, Result
from bdlm.generation.policies.base import Policy, Trials
from bdlm.generation.policies.exact import hitting_time
from bdlm.generation.requests import Event, Request
from bdlm.generation.stopping import Decode
from bdlm.generation.trials import beside, merge
from bdlm.models.folded import fold, weights_of

FEW = 6  # cells of a call up to which reading 8 bits of a large head, and all of it later for many cells, is quicker than reading all now


class Engine:
    """Writes the texts of many requests over one model and one cache.

    rows: how many requests are written at once (guided ones count twice). capacity: cached cells a row, default the training length.
    memory: most bytes of the cache, which may mean fewer rows. window: most cells a row may look back on; None keeps everything, and
    longer texts slide (exact until the first drop). block_size: of requests that name none, default the model's. queue: most requests
    that may wait. drafts: also report every step of the active blocks. bitwise: a text is the same to the last bit in any company, at the
    price of one forward a row and of prompts that are not shared. compile: the native model's layers by torch.compile, a graph for each
    number of cells. Raises ConfigError for what does not fit.
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
        if block_size is not None and block_size > longest:  # before memory is taken for blocks of it
            raise ConfigError(f"block_size is {block_size}, but the model's window has {longest} cells; use 1 to {longest}")
        if window is not None and window < 2 * size:
            raise ConfigError(f"window is {window} cells; use at least two blocks ({2 * size})")
        self.model, self.decode, self.drafts = fold(model, compile), decode, drafts
        self.spec = self.model.spec
        self.bitwise = bitwise
        # what a policy may need that makes calls which are not packed: no room for trial canvases is sure within a budget
        self._unpacked = frozenset({"attention"} if memory is None else {"attention", "trials"})
        if bitwise and ("packed" not in self.spec.supports or self.spec.noise == "none"):
            raise ConfigError("bitwise is True, but only native models of masked tokens without time conditioning pack; leave it out")
        self.desk = Desk(self.model, rows, size, capacity, window, queue, memory, share=not bitwise)
        self._weights = weights_of(self.model)
        never = sorted(self.spec.never_written)
        self._never = torch.tensor(never, dtype=torch.long, device=self.desk.device)
        self.engine_calls = 0
        self._groups: list[Group] = []
        self._twins: tuple[Tensor, Tensor, Tensor] | None = None
        self._draws = False  # whether no policy needs more than draws, which bounds of the logits allow
        self._seen = -1
        self._slid: set[int] = set()
        self._tried = torch.zeros(self.rows, dtype=torch.long, device=self.desk.device)  # trial canvases of each row's request

    @property
    def rows(self) -> int:
        """Requests that are written at once."""
        return self.desk.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the texts: what the engine holds besides the model."""
        return self.desk.nbytes

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self.desk.queue)

    @property
    def busy(self) -> bool:
        return self.waiting > 0 or not self.desk.seats.empty

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: Params) -> int:
        """Queue a request; returns its number. Raises ConfigError if it cannot be served, before any model call."""
        if self.bitwise and params.decoder.needs & self._unpacked:
            raise ConfigError(
                f"policy {params.policy!r} makes calls that are not packed (for attention, or trial canvases within a memory budget); "
                "use another policy, or leave out bitwise"
            )
        return self.desk.submit(prompt, params, self.engine_calls)

    @torch.inference_mode()
    def cancel(self, request: int) -> list[Event]:
        """End a request now; its result holds what was written."""
        waiting = self.desk.queue.remove(request)
        if waiting is not None:
            return [Event(request, "end", result=waiting.result([], [], "cancelled", None))]
        rows = [i for i in self.desk.seats.taken if self._request(i).number == request]
        return self._leave([Finished(i, *self._written(i), "cancelled") for i in rows])

    def run(self) -> Iterator[Event]:
        """Events until nothing is left to write."""
        while self.busy:
            yield from self.step()

    def _request(self, row: int) -> Request:
        request = self.desk.seats.at[row]
        assert request is not None
        return request

    # -- one call ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Let requests join, make one call, and apply the policies' decisions."""
        self.engine_calls += self.desk.join(self.engine_calls)
        with fed(self._weights, self.desk.cells):
            return self._step()

    def _step(self) -> list[Event]:
        events: list[Event] = []
        while True:  # until a call succeeds: the next to join may copy from any row, so all prompts are committed by then
            if self._seen != self.desk.version:
                self._regroup()
            if not self._groups:
                return events
            failed: dict[int, Exception] = {}
            asked, trials = self._plan(failed)
            answer = None if failed else self._call(asked, trials, failed)
            if answer is not None:
                break
            events += self._fail(failed)
        out, wide = answer
        given = out.logits if out.rough is None else out.rough.upper
        assert given is not None
        logits = forbid(given, self._never)
        if self._twins is not None:
            logits, wide = guided(logits, wide, *self._twins)
        decide(self.desk, self._groups, logits, wide, trials, out, failed)
        if self._twins is not None:
            self.desk.board.follow(self._twins[0], self._twins[1], self.desk.texts.prompt[self._twins[0]])
        events += self._fail(failed)
        if self.drafts:
            events += self._drafts()
        return events + self._finish()

    def _regroup(self) -> None:
        """Rows by policy; done when a request took or left a seat."""
        seats = self.desk.seats
        rows: dict[Policy, list[int]] = {}
        for i in seats.taken:
            rows.setdefault(self._request(i).params.decoder, []).append(i)
        self._groups = []
        for policy, own in rows.items():
            mine = None
            if len(rows) > 1 or seats.shadow:
                mine = torch.zeros(self.rows, dtype=torch.bool, device=self.desk.device)
                mine[own] = True
            self._groups.append(Group(policy, own, mine))
            index = torch.tensor(own, device=self.desk.device)
            self.desk.bound[index] = policy.bound(self.desk.board.cells)
        self._twins = None
        if seats.shadow:
            leaders, twins = (torch.tensor(list(x), device=self.desk.device) for x in (seats.shadow.keys(), seats.shadow.values()))
            weight = torch.tensor([self._request(i).params.guidance for i in seats.shadow], dtype=torch.float32, device=self.desk.device)
            self._twins = leaders, twins, weight
        self._draws = all(policy.only_draws for policy in rows) and not seats.shadow and not self.bitwise and "rough" in self.spec.supports
        self._seen = self.desk.version

    def _plan(self, failed: dict[int, Exception]) -> tuple[Tensor, Trials | None]:
        """Cells whose predictions this call needs, bool [R, n], and trial canvases. failed: rows whose policy raised, or has no end."""
        board, asked = self.desk.board, None
        tried: list[tuple[Tensor | None, Trials]] = []
        keys = board.keys()
        for group in self._groups:
            try:
                planned = group.policy.plan(board.masked, keys)
                if "trials" in group.policy.needs:
                    state = state_of(board, group.policy)
                    more = group.policy.tries(board.masked, board.filled, board.ids, keys, state)
                    tried += [] if more is None else [(group.mine, more)]
            except Exception as error:
                failed.update(dict.fromkeys(group.rows, error))
                continue
            mine = board.masked if planned is None else planned
            if "filled" in group.policy.needs:
                mine = mine | board.filled
            if group.mine is not None:
                mine = mine & group.mine[:, None]
            asked = mine if asked is None else asked | mine
        if asked is None:
            return torch.zeros_like(board.masked), None
        endless = board.real.any(1) & (~asked.any(1) | (board.step >= self.desk.bound))
        if self._twins is not None:
            endless[self._twins[1]] = False
        if bool(endless.any()):
            for i in endless.nonzero()[:, 0].tolist():
                name = type(self._request(i).params.decoder).__name__
                failed.setdefault(i, DecoderError(f"the decoder {name} planned no cell, or took more decisions than its bound"))
        if self._twins is not None:
            asked[self._twins[1]] = asked[self._twins[0]]
        return asked, merge(tried)

    def _call(self, asked: Tensor, trials: Trials | None, failed: dict[int, Exception]) -> tuple[Out, Tensor] | None:
        """One forward for all rows: commits what waits, predicts what is asked. Returns the answers, and which cells they are of.

        None if the model raised; `failed` then says for which rows, and nothing has changed.
        """
        desk = self.desk
        told = hitting_time(desk.board.masked, desk.board.keys()) if self.spec.time_conditioned else None
        previous = desk.texts.previous() if self.spec.shift or self.spec.noise == "none" else None
        canvas = desk.board.canvas(previous, told)
        answer = "rough" if self._draws and desk.shaper.bounds and int(asked.sum()) <= FEW else "logits"
        want = frozenset({answer}).union(*(group.policy.needs & {"attention", "hidden"} for group in self._groups))
        if trials is not None:
            canvas = beside(canvas, trials, desk.board.keys(), self.spec.mask_id)
            asked = torch.cat((asked, trials.asked.flatten(1)), 1)
        waits = None if desk.cache is None else desk.texts.waiting()
        if waits is not None:
            self._note_slides(desk.make_room())
        call = Call(canvas, asked, waits, want)
        try:
            out = one_by_one(self.model, call, desk.cache, self._present()) if self.bitwise else forward(self.model, call, desk.cache)
        except Exception as error:
            parties = [[i, *([desk.seats.shadow[i]] if i in desk.seats.shadow else [])] for i in desk.seats.taken]
            failed.update(blamed(self.model, call, desk.cache, parties, error))
            return None
        self.engine_calls += 1
        if trials is not None:
            self._tried += trials.asked.any(2).sum(1)
        if waits is not None:
            desk.texts.commit()
        return out, asked

    def _present(self) -> list[int]:
        """Rows with a text, unconditional twins included."""
        return sorted([*self.desk.seats.taken, *self.desk.seats.shadow.values()])

    def _note_slides(self, slid: Tensor) -> None:
        for i in slid.nonzero()[:, 0].tolist():
            request = self.desk.seats.at[i]
            if request is not None and i not in self._slid:
                self._slid.add(i)
                sent = int(self.desk.texts.sent[i])
                request.notes.append(f"the window slid after {sent} tokens; later blocks are conditioned on the last {self.desk.capacity}")

    # -- block borders -------------------------------------------------------------------------------------------------

    def _finish(self) -> list[Event]:
        """Full blocks become text; their rows end, or wait to commit them and open the next block."""
        full = self.desk.board.full
        if not bool(full.any()):
            return []
        going, ended, events = finished(self.desk, full.nonzero()[:, 0], self.decode)
        self.desk.owed.settle(self.desk.texts, must=False)
        events += self._leave(ended)
        if going.numel():
            self.desk.open(going)
        return events

    def _written(self, row: int) -> tuple[list[int], slice]:
        """New tokens of a row that are final, and where they stand."""
        texts, first = self.desk.texts, len(self._request(row).prompt)
        cells = slice(first, max(first, int(texts.done[row])))
        return texts.ids[row, cells].tolist(), cells

    def _fail(self, failed: dict[int, Exception]) -> list[Event]:
        for i, error in failed.items():
            self._request(i).notes.append(f"failed: {type(error).__name__}: {error}")
        return self._leave([Finished(i, *self._written(i), "error", e) for i, e in failed.items()])

    def _leave(self, ended: list[Finished]) -> list[Event]:
        """Free the rows of requests that ended; those that are to be written anew go back to the queue."""
        events = []
        if ended:
            self.desk.owed.settle(self.desk.texts, must=True)
        for end in ended:
            request = self._request(end.row)
            request.tried += int(self._tried[end.row])
            self._tried[end.row] = 0
            if end.reason == "low_entropy" and request.attempt < request.params.retries:
                request.attempt += 1
                request.spent += (self.engine_calls - request.joined_at) * request.params.seats
                self.desk.queue.back(request)
                events.append(Event(request.number, "retry"))
            else:
                told = int(self.desk.texts.told[end.row]) - end.cells.start
                if end.tokens[told:]:
                    events.append(Event(request.number, "commit", end.tokens[told:]))
                log_probs = self.desk.texts.log_prob[end.row, end.cells].tolist()
                result = request.result(end.tokens, log_probs, end.reason, self.engine_calls)
                events.append(Event(request.number, "end", result=result, error=end.error))
        if ended:
            rows = [end.row for end in ended]
            self.desk.leave(rows, self._slid)
            self._slid.difference_update(rows)
        return events

    def _drafts(self) -> list[Event]:
        board = self.desk.board
        ids, masked, real = board.ids.tolist(), board.masked.tolist(), board.real.sum(1).tolist()
        known = (self.desk.texts.prompt - board.start).clamp(min=0).tolist()
        return [
            Event(self._request(i).number, "draft", [], ids[i][: real[i]], masked[i][: real[i]], known[i]) for i in self.desk.seats.taken
        ]


def generate(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    params: Params | Sequence[Params],
    *,
    rows: int | None = None,
    window: int | None = None,
    decode: Decode | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Write a text for each prompt; row r of the result belongs to prompt r.

    prompts: lists of token ids (an empty one starts from the model's first token). params: one for all (row r then takes seed + r) or
    one each. rows: requests written at once, default all. Raises ConfigError before any model call; if a request fails later, what it
    failed on.
    """
    each = [params.with_(seed=params.seed + i) for i in range(len(prompts))] if isinstance(params, Params) else list(params)
    if len(each) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts came with {len(each)} params; give one for all or one each")
    if not prompts:
        return []
    capacity = max(max(len(p), 1) + own.max_new_tokens for p, own in zip(prompts, each, strict=True))
    seats = sum(own.seats for own in each) if rows is None else rows
    sizes = {own.block_size for own in each}
    size = sizes.pop() if len(sizes) == 1 else None
    engine = Engine(model, seats, capacity=capacity, window=window, block_size=size, decode=decode, queue=len(prompts))
    for prompt, own in zip(prompts, each, strict=True):
        engine.submit(prompt, own)
    results: dict[int, Result] = {}
    for event in engine.run():
        if event.error is not None:
            raise event.error
        if event.result is not None:
            results[event.request] = event.result
            if progress is not None:
                progress(len(results))
    return [results[i] for i in range(len(prompts))]


def stream(
    model: Denoiser, prompt: Sequence[int], params: Params, *, window: int | None = None, decode: Decode | None = None, drafts: bool = True
) -> Iterator[Event]:
    """The events of one text, as they happen. Raises what the request fails on."""
    capacity = max(len(prompt), 1) + params.max_new_tokens
    engine = Engine(model, params.seats, capacity=capacity, window=window, block_size=params.block_size, decode=decode, drafts=drafts)
    engine.submit(prompt, params)
    for event in engine.run():
        if event.error is not None:
            raise event.error
        yield event


__all__ = ["Engine", "Event", "generate", "stream"]
