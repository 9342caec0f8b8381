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
from bdlm.generation.stopping import Decode, TextSearch, low_entropy


@dataclass(frozen=True)
class Finished:
    """A row that ended, its new tokens and where they stand, and why. error: what it failed on."""

    row: int
    tokens: list[int]
    cells: slice
    reason: FinishReason
    error: Exception | None = None


def finished(desk: Desk, rows: Tensor, decode: Decode | None) -> tuple[Tensor, list[Finished], list[Event]]:
    """Lay the full blocks of some rows, int64 [k], into their texts. Returns the rows that go on, the ended ones, and events.

    An ended row's last tokens are told when it leaves. Tokens that low entropy may yet take back are not told before.
    """
    board, texts, seats = desk.board, desk.texts, desk.seats
    real, position, ids = board.real[rows], board.position[rows], board.ids[rows]
    texts.keep(rows, real, position, board.start[rows], ids, board.log_prob[rows])
    texts.pass_given(rows)
    done = texts.done[rows]
    stop = desk.stops.first(rows, ids, position, board.filled[rows])
    over = (stop < done) | (done >= texts.total[rows])
    facts = torch.stack((rows, texts.prompt[rows], texts.told[rows], done, stop, over.long())).T.tolist()
    fresh = texts.untold(rows)
    ended: list[Finished] = []
    events: list[Event] = []
    stays, told = [], []
    for tokens, (row, first, before, new, hit, out) in zip(fresh, facts, strict=True):
        request = seats.at[row]
        if request is None:  # an unconditional twin goes where its leader goes
            continue
        params = request.params
        end: tuple[int, FinishReason] | None = None
        if out:
            end = (hit - first, "stop_token") if hit < new else (params.max_new_tokens, "length")
        count = new - first if end is None else end[0]
        end = _text_end(desk, row, tokens[: count - (before - first)], count, end is not None, decode) or end
        if end is None:
            sure = new if params.min_entropy is None else max(before, new - params.entropy_window)
            if sure > before:
                events.append(Event(request.number, "commit", tokens[: sure - before]))
            stays.append(row)
            told.append(sure)
        else:
            cells = slice(first, first + end[0])
            ended.append(Finished(row, texts.ids[row, cells].tolist(), cells, end[1]))
    texts.told[stays] = torch.tensor(told, dtype=torch.long, device=rows.device)
    stays += [seats.shadow[row] for row in stays if row in seats.shadow]
    return torch.tensor(stays, dtype=torch.long, device=rows.device), ended, events


def _text_end(desk: Desk, row: int, tokens: list[int], count: int, last: bool, decode: Decode | None) -> tuple[int, FinishReason] | None:
    """How many of a row's `count` new tokens stand before the end that its text demands, and which; None to go on.

    tokens: the last of them, all that no event has told. last: whether the row ends with them anyhow.
    """
    request = desk.seats.at[row]
    assert request is not None
    params = request.params
    if params.stop and decode is not None:
        search = desk.stops.searches.get(row)
        if search is None:
            search = desk.stops.searches[row] = TextSearch(decode, request.prompt, params.stop, params.min_new_tokens)
        search.push(tokens[len(tokens) - (count - search.tokens) :])
        if last:
            search.finish()
        if search.end is not None:
            return search.end, "stop_text"
    return (count - params.entropy_window, "low_entropy") if low_entropy(tokens, params) else None
