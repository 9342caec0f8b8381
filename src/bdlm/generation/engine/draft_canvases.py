"""Several canvases of a row in one forward pass: the active block, and the drafts of its decoder.

The canvases are concatenated as noisy cells of different groups with one limit: none sees another,
all see the row's committed cells, and the cache is shared. In: a canvas and `DraftCanvases`. Out:
one concatenated canvas, and the views of its parts. Knows nothing about decoders.

Shapes: R rows, n cells, K draft canvases, W = (1 + K) n cells of the concatenated canvas."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from bdlm.core.types import NOWHERE, Canvas, Soft
from bdlm.generation.decoders.base import DraftCanvases, View
from bdlm.generation.decoders.exact import hitting_time
from bdlm.generation.sampling.noise import CellNoise

# the distance between the group numbers of a row's canvases; a group is the position of a block's
# first cell, so positions stay below it
GROUP_STRIDE = 1 << 32


def merge(parts: list[tuple[Tensor | None, DraftCanvases]]) -> DraftCanvases | None:
    """Merge the draft canvases of several decoders, each for its own rows, bool [R] (None =
    all)."""
    most = max(drafts.query_mask.shape[1] for _, drafts in parts)
    merged: DraftCanvases | None = None
    for row_mask, drafts in parts:
        padded = _padded(drafts, most)
        if row_mask is None:
            merged = padded
            continue
        rows = row_mask[:, None, None]
        own = replace(padded, query_mask=padded.query_mask & rows)
        if merged is None:
            merged = own
        else:
            merged = DraftCanvases(
                torch.where(rows, own.ids, merged.ids),
                torch.where(rows, own.masked, merged.masked),
                torch.where(rows, own.query_mask, merged.query_mask),
            )
    return merged


def _padded(drafts: DraftCanvases, count: int) -> DraftCanvases:
    """The same with so many canvases a row; the additional ones predict nothing."""
    more = (0, 0, 0, count - drafts.query_mask.shape[1])
    return DraftCanvases(
        pad(drafts.ids, more), pad(drafts.masked, more), pad(drafts.query_mask, more)
    )


def concatenate(canvas: Canvas, drafts: DraftCanvases, noise: CellNoise, mask_id: int) -> Canvas:
    """Return one canvas of W cells: the active block, then its drafts. A time-conditioned model
    gets each draft canvas's own time."""
    rows, count, cells = drafts.query_mask.shape
    ids = torch.where(drafts.masked, mask_id, drafts.ids).flatten(1)
    exists = drafts.query_mask.any(2, keepdim=True).expand_as(drafts.query_mask).flatten(1)
    number = torch.arange(1, count + 1, device=ids.device).repeat_interleave(cells)
    layout = canvas.layout.expand(rows)
    repeated = layout.map(lambda field: torch.cat((field, field.repeat(1, count)), 1))
    block = torch.zeros(cells, dtype=torch.long, device=ids.device)
    group = repeated.group + torch.cat((block, number)) * GROUP_STRIDE
    draft_doc = torch.where(exists, layout.doc.repeat(1, count), NOWHERE)
    time = canvas.time
    if time is not None:
        mask_prob = [
            hitting_time(drafts.masked[:, k], noise).to(time.dtype).expand(-1, cells)
            for k in range(count)
        ]
        time = torch.cat((time, *mask_prob), 1)
    return Canvas(
        torch.cat((canvas.ids, ids), 1),
        torch.cat((canvas.masked, drafts.masked.flatten(1)), 1),
        replace(repeated, group=group, doc=torch.cat((layout.doc, draft_doc), 1)),
        canvas.previous,
        time,
        None if canvas.soft is None else _append_single(canvas.soft, ids),
    )


def _append_single(soft: Soft, ids: Tensor) -> Soft:
    """Mixtures, and behind them cells that are fed as they are."""
    weight = soft.weight.new_zeros(*ids.shape, soft.ids.shape[2])
    weight[..., 0] = 1
    return replace(
        soft,
        ids=torch.cat((soft.ids, ids[..., None].expand(weight.shape)), 1),
        weight=torch.cat((soft.weight, weight), 1),
    )


def split(view: View, drafts: DraftCanvases, query_mask: Tensor) -> View:
    """Split a view of a concatenated canvas: the view of the active block, with that of the draft
    canvases in `View.drafts`.

    query_mask: bool [R, W], the predicted cells."""
    count, cells = drafts.query_mask.shape[1:]
    in_block = torch.arange(query_mask.shape[1], device=query_mask.device) < cells
    own = in_block.expand_as(query_mask)[query_mask]
    noise = CellNoise(
        view.noise.seed, view.noise.position.repeat(1, count), view.noise.draw.repeat(1, count)
    )
    masked = drafts.masked.flatten(1)
    logits, raw, model = view.select_logits(~own)
    of_drafts = replace(
        view,
        masked=masked,
        filled=torch.zeros_like(masked),
        query_mask=drafts.query_mask.flatten(1),
        ids=drafts.ids.flatten(1),
        logits=logits,
        raw=raw,
        model=model,
        noise=noise,
        attention=None,
        hidden=None,
    )
    hidden = None if view.hidden is None else view.hidden[own]
    logits, raw, model = view.select_logits(own)
    return replace(view, logits=logits, raw=raw, model=model, hidden=hidden, drafts=of_drafts)
