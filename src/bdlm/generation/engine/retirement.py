"""What happens when a block is full: its tokens are stored, and its row ends or continues.

In: the rows with a full block. Out: which continue, which ended with what, and "commit" events.
Knows nothing about models or decoders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.request import Event, Request
from bdlm.generation.engine.slots import SlotPool
from bdlm.generation.engine.stopping import Decode, StopTokens, TextSearch, low_entropy
from bdlm.generation.engine.token_buffer import TokenBuffer
from bdlm.generation.sampling_params import FinishReason, criteria_end


@dataclass(frozen=True)
class Finished:
    """A row that ended: its new tokens, their positions, and why. error: what was raised, for
    reason "error"."""

    row: int
    tokens: list[int]
    positions: slice
    reason: FinishReason
    error: Exception | None = None


class Retirement:
    """Finishes blocks. decode: from ids to text, which stop strings need."""

    def __init__(
        self,
        slots: SlotPool,
        tokens: TokenBuffer,
        blocks: BlockState,
        stops: StopTokens,
        decode: Decode | None,
    ) -> None:
        self.slots, self.tokens, self.blocks, self.stops = slots, tokens, blocks, stops
        self.decode = decode
        self._searches: dict[int, TextSearch] = {}  # of the rows with stop strings

    def finish_blocks(self, rows: Tensor) -> tuple[Tensor, list[Finished], list[Event]]:
        """Store the full blocks of some rows, int64 [k].

        Returns the rows that continue, the ended ones, and events. The last tokens of an ended row
        are reported when it leaves. Tokens that `min_entropy` may take back are not reported
        before."""
        blocks, tokens = self.blocks, self.tokens
        real, position, ids = blocks.real[rows], blocks.position[rows], blocks.ids[rows]
        tokens.store(rows, real, position, blocks.start[rows], ids, blocks.log_prob[rows])
        tokens.skip_given(rows)
        done = tokens.done[rows]
        stop = self.stops.first(rows, ids, position, blocks.filled[rows])
        over = (stop < done) | (done >= tokens.total[rows])
        columns = (rows, tokens.prompt[rows], tokens.reported[rows], done, stop, over.long())
        facts = torch.stack(columns).T.tolist()
        continuing: list[int] = []
        reported: list[int] = []
        ended: list[Finished] = []
        events: list[Event] = []
        for new, (row, first, before, until, at, is_over) in zip(
            tokens.unreported(rows), facts, strict=True
        ):
            request = self.slots.requests[row]
            if request is None:  # an unconditional row continues or ends with its request
                continue
            end = self._end(request, row, new, first, before, until, at if is_over else None)
            if end is None:
                sure = until
                if request.params.min_entropy is not None:
                    sure = max(before, until - request.params.entropy_window)
                if sure > before:
                    events.append(Event(request.number, "commit", new[: sure - before]))
                continuing.append(row)
                reported.append(sure)
            else:
                positions = slice(first, first + end[0])
                ended.append(Finished(row, tokens.ids[row, positions].tolist(), positions, end[1]))
        tokens.reported[continuing] = torch.tensor(reported, dtype=torch.long, device=rows.device)
        going = [row for each in continuing for row in self.slots.rows_of(each)]
        return torch.tensor(going, dtype=torch.long, device=rows.device), ended, events

    def _end(
        self,
        request: Request,
        row: int,
        new: list[int],
        first: int,
        before: int,
        until: int,
        stop: int | None,
    ) -> tuple[int, FinishReason] | None:
        """How many new tokens a request ends with, and why; None if it continues.

        new: the tokens at positions [before, until), which no event holds yet. first: the position
        of the first new token. stop: None if neither a stop token nor the length ends the row, else
        the position of the stop token (beyond `until` if there is none)."""
        end: tuple[int, FinishReason] | None = None
        if stop is not None:
            end = (request.params.max_new_tokens, "length")
            if stop < until:
                end = (stop - first, "stop_token")
        count = until - first if end is None else end[0]
        unreported = new[: count - (before - first)]
        return self._text_end(request, row, unreported, count, end is not None) or end

    def _text_end(
        self, request: Request, row: int, tokens: list[int], count: int, last: bool
    ) -> tuple[int, FinishReason] | None:
        """How many of a row's `count` new tokens come before a stopping criterion, a stop string or
        a run of low entropy, and which; None if there is none of them.

        tokens: the last of them, which no event holds yet. last: whether the row ends with them in
        any case."""
        params = request.params
        end: tuple[int, FinishReason] | None = None
        if params.stopping_criteria:
            first = len(request.prompt)
            new = self.tokens.ids[row, first : first + count].tolist()
            if (kept := criteria_end(params, request.prompt, new, len(tokens))) is not None:
                end, tokens = (kept, "stopping_criteria"), tokens[: len(tokens) - (count - kept)]
                count, last = kept, True
        if params.stop and self.decode is not None:
            search = self._searches.get(row)
            if search is None:
                search = self._searches[row] = TextSearch(
                    self.decode, request.prompt, params.stop, params.min_new_tokens
                )
            search.push(tokens[len(tokens) - (count - search.tokens) :])
            if last:
                search.finish()
            if search.end is not None:
                return search.end, "stop_text"
        if low_entropy(tokens, params):
            return count - params.entropy_window, "low_entropy"
        return end

    def final_tokens(self, row: int) -> tuple[list[int], slice]:
        """Return the new tokens of a row that are final, and their positions."""
        first = len(self.slots.request(row).prompt)
        positions = slice(first, max(first, int(self.tokens.done[row])))
        return self.tokens.ids[row, positions].tolist(), positions

    def draft_events(self) -> list[Event]:
        """Return a "draft" event with the state of every open block."""
        ids, masked = self.blocks.ids.tolist(), self.blocks.masked.tolist()
        real = self.blocks.real.sum(1).tolist()
        known = (self.tokens.prompt - self.blocks.start).clamp(min=0).tolist()
        return [
            Event(
                self.slots.request(row).number,
                "draft",
                ids=ids[row][: real[row]],
                masked=masked[row][: real[row]],
                known=known[row],
            )
            for row in self.slots.taken
        ]

    def forget(self, rows: list[int]) -> None:
        """Drop the text searches of rows that leave."""
        for row in rows:
            self._searches.pop(row, None)
