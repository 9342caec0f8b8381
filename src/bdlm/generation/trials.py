"""Several canvases of one row in one call: the active block and what a policy tries beside it.

The canvases lie side by side as noisy cells of different groups with one limit: none sees another, all see the row's committed cells,
and the cache is shared. In: a canvas and `Trials`. Out: one wide canvas, and the views of its parts. Knows nothing about policies.

Shapes: R rows, n cells, K trial canvases, W = (1 + K) n cells of the wide canvas.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bdlm.core.types import NOWHERE, Canvas, Layout, Soft
from bdlm.generation.keys import Keys
from bdlm.generation.policies.base import Trials, View
from bdlm.generation.policies.exact import hitting_time

APART = 1 << 32  # between the group numbers of a row's canvases; a group is the place of a block's first cell


def merge(parts: list[tuple[Tensor | None, Trials]]) -> Trials | None:
    """The trials of several policies, each for its own rows, bool [R] (None = all)."""
    if not parts:
        return None
    most = max(t.asked.shape[1] for _, t in parts)
    whole: Trials | None = None
    for mine, trials in parts:
        short = most - trials.asked.shape[1]
        grown = Trials(*(torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (trials.ids, trials.masked, trials.asked)))
        if mine is not None:
            grown = replace(grown, asked=grown.asked & mine[:, None, None])
        if whole is None:
            whole = grown
        else:
            pick = mine[:, None, None] if mine is not None else torch.ones_like(grown.asked)
            whole = Trials(*(torch.where(pick, getattr(grown, f), getattr(whole, f)) for f in ("ids", "masked", "asked")))
    return whole


def beside(canvas: Canvas, trials: Trials, keys: Keys, mask_id: int) -> Canvas:
    """The wide canvas. A time-conditioned model is told each trial's own time."""
    rows, count, cells = trials.asked.shape
    ids = torch.where(trials.masked, mask_id, trials.ids).flatten(1)
    there = trials.asked.any(2, keepdim=True).expand_as(trials.asked).flatten(1)
    number = torch.arange(1, count + 1, device=ids.device).repeat_interleave(cells)
    where = canvas.layout.expand(rows)
    wide = Layout(*(torch.cat((x, x.repeat(1, count)), 1) for x in (getattr(where, f) for f in where.__dataclass_fields__)))
    first = torch.zeros(cells, dtype=torch.long, device=ids.device)
    group = wide.group + torch.cat((first, number)) * APART
    doc = torch.cat((where.doc, torch.where(there, where.doc.repeat(1, count), NOWHERE)), 1)
    time = canvas.time
    if time is not None:
        told = [hitting_time(trials.masked[:, k], keys).to(time.dtype).expand(-1, cells) for k in range(count)]
        time = torch.cat((time, *told), 1)
    soft = None if canvas.soft is None else _whole(canvas.soft, ids)
    masked = torch.cat((canvas.masked, trials.masked.flatten(1)), 1)
    return Canvas(torch.cat((canvas.ids, ids), 1), masked, replace(wide, group=group, doc=doc), canvas.previous, time, soft)


def _whole(soft: Soft, ids: Tensor) -> Soft:
    """Mixtures, and behind them cells that are fed as they are."""
    weight = soft.weight.new_zeros(*ids.shape, soft.ids.shape[2])
    weight[..., 0] = 1
    return replace(soft, ids=torch.cat((soft.ids, ids[..., None].expand(weight.shape)), 1), weight=torch.cat((soft.weight, weight), 1))


def split(view: View, trials: Trials, asked: Tensor) -> View:
    """A view whose logits are those of a wide call, as the view of the active block with the trials in `tried`.

    asked: bool [R, W], what the call was asked.
    """
    count, cells = trials.asked.shape[1:]
    own = (torch.arange(asked.shape[1], device=asked.device) < cells).expand_as(asked)[asked]
    keys = Keys(view.keys.seed, view.keys.position.repeat(1, count), view.keys.draw.repeat(1, count))
    masked = trials.masked.flatten(1)
    tried = replace(
        view, masked=masked, filled=torch.zeros_like(masked), asked=trials.asked.flatten(1), ids=trials.ids.flatten(1),
        **view.lines(~own), keys=keys, attention=None, hidden=None,
    )  # fmt: skip
    hidden = None if view.hidden is None else view.hidden[own]
    return replace(view, **view.lines(own), hidden=hidden, tried=tried)
