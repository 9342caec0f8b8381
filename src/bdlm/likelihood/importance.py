"""Importance-sampled counts for the bound, fitted on other text than is scored; otherwise the
estimate would be biased by its own noise.

In: a model, windows to fit on, their layout. Out: the `CountDistribution` of least variance. Knows
nothing about scores or training. Source: Eq. 8 of arXiv 2503.09573 with the time integrated out."""

from __future__ import annotations

import torch

from bdlm.core.corruption import Blocks, corrupt
from bdlm.core.counts import CountDistribution, CountMoments, check_floor
from bdlm.core.objectives import count_losses, total_and_losses
from bdlm.core.schedules import SCHEDULES
from bdlm.core.types import Denoiser, Layout
from bdlm.likelihood.rows import Rows


@torch.no_grad()
def fit_counts(
    model: Denoiser,
    rows: Rows,
    layout: Layout,
    *,
    seed: int = 0,
    draws: int = 4,
    batch_size: int = 16,
    floor: float = 0.1,
) -> CountDistribution:
    """Fit the distribution of least variance for such a model, up to the widest block of the
    layout.

    rows, layout: the windows to fit on and their layout, on the model's device. draws: passes over
    them. floor: share of the uniform distribution that is mixed in."""
    check_floor(floor)
    found = CountMoments.empty()
    for draw in range(draws):
        for first, part in rows.batches(batch_size):
            here = (
                layout
                if layout.rank.shape[0] == 1
                else _rows_of(layout, slice(first, first + batch_size))
            )
            number = first + torch.arange(len(part), device=part.ids.device)
            noised = corrupt(
                part.ids,
                here,
                part.scored,
                SCHEDULES["linear"],
                seed=seed,
                step=draw,
                row=number,
                rows_total=len(rows),
                first_row=first,
                distribution="count",
                mask_id=model.spec.mask_id,
            )
            found += CountMoments.of(*count_losses(total_and_losses(model, noised)[1], noised))
    return found.distribution(int(Blocks.of(layout, rows.scored).size.max()), floor)


def _rows_of(layout: Layout, index: slice) -> Layout:
    return layout.map(lambda x: x[index])
