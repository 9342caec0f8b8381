"""Block borders: full blocks become text, and rows end or go on.

In: the rows whose blocks are full. Out: which go on, which ended with what, and "commit" events. Knows nothing about models or policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.generation.joining import Desk
from bdlm.generation.params import FinishReason
from bdlm.generation.requests import Event
from bdlm.generation.stopping import Decode, looks_at_text, text_end


@dataclass(frozen=True)
class Finished:
    """A row that ended, its new tokens and where they stand, and why. error: what it failed on."""

    row: int
    tokens: list[int]
    cells: slice
    reason: FinishReason
    error: Exception | None = None


def finished(desk: Desk, rows: Tensor, decode: Decode | None) -> tuple[Tensor, list[Finished], list[Event]]:
    """Lay the full blocks of some rows, int64 [k], into their texts. Returns the rows that go on, the ended ones, and events."""
    board, texts, seats = desk.board, desk.texts, desk.seats
    real, position, ids = board.real[rows], board.position[rows], board.ids[rows]
    before = texts.done[rows]
    texts.keep(rows, real, position, board.start[rows], ids, board.log_prob[rows])
    texts.pass_given(rows)
    prompt, done = texts.prompt[rows], texts.done[rows]
    stop = desk.stops.first(rows, ids, position, board.filled[rows])
    over = (stop < done) | (done >= texts.total[rows])
    facts = torch.stack((rows, prompt, torch.maximum(before, prompt), done, stop, over.long())).T.tolist()
    written = ids.tolist()
    offset = board.start[rows].tolist()
    ended: list[Finished] = []
    events: list[Event] = []
    stays = []
    for k, (row, first, old, new, hit, out) in enumerate(facts):
        request = seats.at[row]
        if request is None:  # an unconditional twin goes where its leader goes
            continue
        end: tuple[int, FinishReason] | None = None
        if out:
            end = (hit - first, "stop_token") if hit < new else (request.params.max_new_tokens, "length")
        if looks_at_text(request.params):
            found = text_end(texts.ids[row, first:new].tolist(), new - old, request.params, decode)
            if found is not None and (end is None or found[0] < end[0] or end[1] == "length"):
                end = found
        fresh = written[k][old - offset[k] : new - offset[k]]
        if new - old > len(fresh):  # given blocks behind this one
            fresh = texts.ids[row, old:new].tolist()
        kept = fresh if end is None else fresh[: max(0, end[0] - (old - first))]
        if kept:
            events.append(Event(request.number, "commit", kept))
        if end is None:
            stays.append(row)
        else:
            cells = slice(first, first + end[0])
            ended.append(Finished(row, texts.ids[row, cells].tolist(), cells, end[1]))
    stays += [seats.shadow[row] for row in stays if row in seats.shadow]
    return torch.tensor(stays, dtype=torch.long, device=rows.device), ended, events
