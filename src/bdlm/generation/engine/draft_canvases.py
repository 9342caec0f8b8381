"""Several canvases of one row in one call: the active block and what a decoder tries beside it.

The canvases lie side by side as noisy cells of different groups with one limit: none sees another,
all see the row's committed cells, and the cache is shared. In: a canvas and `DraftCanvases`. Out:
one wide canvas, and the views of its parts. Knows nothing about decoders.

Shapes: R rows, n cells, K draft canvases, W = (1 + K) n cells of the wide canvas.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bdlm.core.types import NOWHERE, Canvas, Layout, Soft
from bdlm.generation.decoders.base import DraftCanvases, View
from bdlm.generation.decoders.exact import hitting_time
from bdlm.generation.sampling.noise import CellNoise

# between the group numbers of a row's canvases; a group is the place of a block's first cell
APART = 1 << 32


def merge(parts: list[tuple[Tensor | None, DraftCanvases]]) -> DraftCanvases | None:
    """The trials of several decoders, each for its own rows, bool [R] (None = all)."""
    if not parts:
        return None
    most = max(t.query_mask.shape[1] for _, t in parts)
    whole: DraftCanvases | None = None
    for row_mask, drafts in parts:
        short = most - drafts.query_mask.shape[1]
        grown = DraftCanvases(
            *(
                torch.nn.functional.pad(x, (0, 0, 0, short))
                for x in (drafts.ids, drafts.masked, drafts.query_mask)
            )
        )
        if row_mask is not None:
            grown = replace(grown, query_mask=grown.query_mask & row_mask[:, None, None])
        if whole is None:
            whole = grown
        else:
            pick = (
                row_mask[:, None, None]
                if row_mask is not None
                else torch.ones_like(grown.query_mask)
            )
            whole = DraftCanvases(
                *(
                    torch.where(pick, getattr(grown, f), getattr(whole, f))
                    for f in ("ids", "masked", "asked")
                )
            )
    return whole


def concatenate(canvas: Canvas, drafts: DraftCanvases, noise: CellNoise, mask_id: int) -> Canvas:
    """The wide canvas. A time-conditioned model is told each trial's own time."""
    rows, count, cells = drafts.query_mask.shape
    ids = torch.where(drafts.masked, mask_id, drafts.ids).flatten(1)
    there = drafts.query_mask.any(2, keepdim=True).expand_as(drafts.query_mask).flatten(1)
    number = torch.arange(1, count + 1, device=ids.device).repeat_interleave(cells)
    layout = canvas.layout.expand(rows)
    wide = Layout(
        *(
            torch.cat((x, x.repeat(1, count)), 1)
            for x in (getattr(layout, f) for f in layout.__dataclass_fields__)
        )
    )
    first = torch.zeros(cells, dtype=torch.long, device=ids.device)
    group = wide.group + torch.cat((first, number)) * APART
    doc = torch.cat((layout.doc, torch.where(there, layout.doc.repeat(1, count), NOWHERE)), 1)
    time = canvas.time
    if time is not None:
        mask_prob = [
            hitting_time(drafts.masked[:, k], noise).to(time.dtype).expand(-1, cells)
            for k in range(count)
        ]
        time = torch.cat((time, *mask_prob), 1)
    soft = None if canvas.soft is None else _whole(canvas.soft, ids)
    masked = torch.cat((canvas.masked, drafts.masked.flatten(1)), 1)
    return Canvas(
        torch.cat((canvas.ids, ids), 1),
        masked,
        replace(wide, group=group, doc=doc),
        canvas.previous,
        time,
        soft,
    )


def _whole(soft: Soft, ids: Tensor) -> Soft:
    """Mixtures, and behind them cells that are fed as they are."""
    weight = soft.weight.new_zeros(*ids.shape, soft.ids.shape[2])
    weight[..., 0] = 1
    return replace(
        soft,
        ids=torch.cat((soft.ids, ids[..., None].expand(weight.shape)), 1),
        weight=torch.cat((soft.weight, weight), 1),
    )


def split(view: View, drafts: DraftCanvases, query_mask: Tensor) -> View:
    """A view whose logits are those of a wide call, as the view of the active block with the trials
    in `tried`.

    asked: bool [R, W], what the call was asked.
    """
    count, cells = drafts.query_mask.shape[1:]
    own = (torch.arange(query_mask.shape[1], device=query_mask.device) < cells).expand_as(
        query_mask
    )[query_mask]
    noise = CellNoise(
        view.noise.seed, view.noise.position.repeat(1, count), view.noise.draw.repeat(1, count)
    )
    masked = drafts.masked.flatten(1)
    tried = replace(
        view,
        masked=masked,
        filled=torch.zeros_like(masked),
        query_mask=drafts.query_mask.flatten(1),
        ids=drafts.ids.flatten(1),
        **view.lines(~own),
        noise=noise,
        attention=None,
        hidden=None,
    )
    hidden = None if view.hidden is None else view.hidden[own]
    return replace(view, **view.lines(own), hidden=hidden, drafts=tried)
