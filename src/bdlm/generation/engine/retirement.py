"""Block borders: full blocks become text, and rows end or go on.

In: the rows whose blocks are full. Out: which go on, which ended with what, and "commit" events.
Knows nothing about models or decoders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.generation.engine.request import Event
from bdlm.generation.engine.scheduler import Scheduler
from bdlm.generation.engine.stopping import Decode, TextSearch, low_entropy
from bdlm.generation.sampling_params import FinishReason, criteria_end


@dataclass(frozen=True)
class Finished:
    """A row that ended, its new tokens and where they stand, and why. error: what it failed on."""

    row: int
    tokens: list[int]
    cells: slice
    reason: FinishReason
    error: Exception | None = None


def finished(
    scheduler: Scheduler, rows: Tensor, decode: Decode | None
) -> tuple[Tensor, list[Finished], list[Event]]:
    """Lay the full blocks of some rows, int64 [k], into their texts. Returns the rows that go on,
    the ended ones, and events.

    An ended row's last tokens are told when it leaves. Tokens that low entropy may yet take back
    are not told before."""
    block_state, buffer, slots = scheduler.block_state, scheduler.buffer, scheduler.slots
    real, position, ids = block_state.real[rows], block_state.position[rows], block_state.ids[rows]
    buffer.keep(rows, real, position, block_state.start[rows], ids, block_state.log_prob[rows])
    buffer.pass_given(rows)
    done = buffer.done[rows]
    stop = scheduler.stops.first(rows, ids, position, block_state.filled[rows])
    over = (stop < done) | (done >= buffer.total[rows])
    facts = torch.stack(
        (rows, buffer.prompt[rows], buffer.told[rows], done, stop, over.long())
    ).T.tolist()
    fresh = buffer.untold(rows)
    ended: list[Finished] = []
    events: list[Event] = []
    stays, told = [], []
    for tokens, (row, first, before, new, hit, out) in zip(fresh, facts, strict=True):
        request = slots.requests[row]
        if request is None:  # an unconditional row goes where its leader goes
            continue
        params = request.params
        end: tuple[int, FinishReason] | None = None
        if out:
            end = (hit - first, "stop_token") if hit < new else (params.max_new_tokens, "length")
        count = new - first if end is None else end[0]
        end = (
            _text_end(
                scheduler, row, tokens[: count - (before - first)], count, end is not None, decode
            )
            or end
        )
        if end is None:
            sure = new if params.min_entropy is None else max(before, new - params.entropy_window)
            if sure > before:
                events.append(Event(request.number, "commit", tokens[: sure - before]))
            stays.append(row)
            told.append(sure)
        else:
            cells = slice(first, first + end[0])
            ended.append(Finished(row, buffer.ids[row, cells].tolist(), cells, end[1]))
    buffer.told[stays] = torch.tensor(told, dtype=torch.long, device=rows.device)
    stays += [slots.unconditional_rows[row] for row in stays if row in slots.unconditional_rows]
    return torch.tensor(stays, dtype=torch.long, device=rows.device), ended, events


def _text_end(
    scheduler: Scheduler, row: int, tokens: list[int], count: int, last: bool, decode: Decode | None
) -> tuple[int, FinishReason] | None:
    """How many of a row's `count` new tokens stand before the end that its text demands, and which;
    None to go on.

    tokens: the last of them, all that no event has told. last: whether the row ends with them
    anyhow."""
    request = scheduler.slots.requests[row]
    assert request is not None
    params = request.params
    end: tuple[int, FinishReason] | None = None
    if params.stopping_criteria:
        first = len(request.prompt)
        new = scheduler.buffer.ids[row, first : first + count].tolist()
        if (kept := criteria_end(params, request.prompt, new, len(tokens))) is not None:
            end, tokens = (kept, "stopping_criteria"), tokens[: len(tokens) - (count - kept)]
            count, last = kept, True
    if params.stop and decode is not None:
        search = scheduler.stops.searches.get(row)
        if search is None:
            search = scheduler.stops.searches[row] = TextSearch(
                decode, request.prompt, params.stop, params.min_new_tokens
            )
        search.push(tokens[len(tokens) - (count - search.tokens) :])
        if last:
            search.finish()
        if search.end is not None:
            return search.end, "stop_text"
    return (count - params.entropy_window, "low_entropy") if low_entropy(tokens, params) else end
