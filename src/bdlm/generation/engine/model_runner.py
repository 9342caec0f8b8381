"""One forward for all rows; and when the model raises, which request it was.

In: what a call commits and what it is asked. Out: the answers, or the rows that failed; the cache
is then as it was. A model that raises says nothing about whose cells it could not read, so each row
is asked alone: those that raise again are to blame, or all of them if none does (the call as such
could not be made). Knows nothing about decoders or blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import UnsupportedError
from bdlm.core.forward import advance, predict
from bdlm.core.types import NOWHERE, Canvas, Denoiser, Layout, Out


@dataclass(frozen=True)
class ForwardInputs:
    """What one forward is given.

    canvas: the cells that are written, R rows of W. asked: bool [R, W], those to predict. waits:
    the cells to commit, int64 [R, m], and where they stand, or None. want: as in `Step`."""

    canvas: Canvas
    query_mask: Tensor
    commits: tuple[Tensor, Layout] | None
    outputs: frozenset[str]

    def of(self, rows: Tensor) -> ForwardInputs:
        """The same for some rows, bool [R]: the others are not there."""
        waits = None if self.commits is None else (self.commits[0], _only(self.commits[1], rows))
        return ForwardInputs(
            replace(self.canvas, layout=_only(self.canvas.layout, rows)),
            self.query_mask & rows[:, None],
            waits,
            self.outputs,
        )


def _only(layout: Layout, rows: Tensor) -> Layout:
    layout = layout.expand(len(rows))
    return replace(layout, doc=torch.where(rows[:, None], layout.doc, NOWHERE))


class CacheRollback:
    """Within it, what a call that raises (or every call, `always`) has noted in the cache's slot
    table is taken back at the end.

    cache: None for models without one.
    """

    def __init__(self, cache: Any, always: bool = False) -> None:
        self.slots: Any = None if cache is None else cache.slots
        self.always = always

    def __enter__(self) -> None:
        self.length = None if self.slots is None else self.slots.length.clone()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.length is not None and (error is not None or self.always):
            self.slots.drop(torch.arange(len(self.length), device=self.length.device), self.length)


def forward(model: Denoiser, call: ForwardInputs, cache: Any) -> Out:
    """The call itself. If it raises, the cache still holds what it held.

    Raises UnsupportedError for an answer that lacks what was asked for.
    """
    packed = "ragged_batching" in model.spec.supports
    with CacheRollback(cache):
        if call.commits is None:
            out = predict(model, call.canvas, cache, call.query_mask, call.outputs, packed)
        else:
            out = advance(
                model, *call.commits, call.canvas, cache, call.query_mask, call.outputs, packed
            )
        for name in call.outputs:
            # logits are as good as bounds of them
            if getattr(out, name) is None and (name != "logit_bounds" or out.logits is None):
                raise UnsupportedError(
                    f"the model's `step` was asked for {name} and gave none; give it, or leave it"
                    " out of `supports`"
                )
        return out


def one_by_one(model: Denoiser, call: ForwardInputs, cache: Any, rows: list[int]) -> Out:
    """The call as one forward a row, so that the shape of every product depends on that row alone.
    rows: in order, all that are there.

    Rounding follows shapes: a row's logits are then bit for bit what they are without the others,
    where the model packs real cells."""
    with CacheRollback(cache):
        outs = []
        for row in rows:
            alone = torch.zeros(
                len(call.query_mask), dtype=torch.bool, device=call.query_mask.device
            )
            alone[row] = True
            outs.append(forward(model, call.of(alone), cache))
    parts = [
        [x for x in (getattr(out, name) for out in outs) if x is not None]
        for name in ("logits", "hidden")
    ]
    logits, hidden = (torch.cat(found) if found else None for found in parts)
    return Out(logits, hidden)


def find_failing_requests(
    model: Denoiser, call: ForwardInputs, cache: Any, parties: list[list[int]], error: Exception
) -> dict[int, Exception]:
    """For which requests a call failed, by their first row, and on what. parties: the rows of each.
    error: what the call raised."""
    found: dict[int, Exception] = {}
    for rows in parties if len(parties) > 1 else []:
        alone = torch.zeros(len(call.query_mask), dtype=torch.bool, device=call.query_mask.device)
        alone[rows] = True
        try:
            with CacheRollback(cache, always=True):
                forward(model, call.of(alone), cache)
        except Exception as own:
            found[rows[0]] = own
    return found or {rows[0]: error for rows in parties}
