"""The bound of held-out windows under the current weights, with its standard error.

In: a model, windows, an unbiased noiser. Out: a `ValidationBound` for each block size. Rows are the
sampling unit: the standard error is that of a ratio estimator over rows (nats over scored tokens),
so it covers the choice of rows and the noise together. Knows nothing about training. The noise is
the same at every call, so two validations differ by the weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdlm.core.objectives import objective
from bdlm.core.statistics import ratio_estimate
from bdlm.training.noising import Noiser


@dataclass(frozen=True)
class ValidationBound:
    """Upper bound on the negative log-likelihood of held-out text; exact at block size 1.

    nats_per_token, stderr: nats; stderr None where it is unknown (one window). scored: tokens that
    the mean covers. bits_per_byte: None where the number of bytes is unknown."""

    block_size: int
    nats_per_token: float
    stderr: float | None
    scored: int
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))


@dataclass(frozen=True)
class HeldOutWindows:
    """Held-out windows, all of equal length. ids, doc: int64 [W, L]. bytes_per_token: of the scored
    cells, or None."""

    ids: Tensor
    doc: Tensor
    bytes_per_token: float | None = None

    def batches(
        self, rows: int, process: int, processes: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Yield (ids, doc, row, first row) of this process's share of the batches of `rows`
        rows."""
        for i, start in enumerate(range(0, len(self.ids), rows)):
            if i % processes == process:
                ids = self.ids[start : start + rows]
                yield (
                    ids,
                    self.doc[start : start + rows],
                    torch.arange(start, start + len(ids)),
                    start,
                )


@torch.no_grad()
def validate(
    model: Any,
    held_out: HeldOutWindows,
    noiser: Noiser,
    size: int,
    rows: int,
    replicates: int,
    accelerator: Any,
) -> ValidationBound:
    """Score all held-out windows with blocks of `size`. Every process calls it; all get the same
    answer.

    rows: windows of one forward pass. replicates: independent draws of the noise, averaged."""
    device = accelerator.device
    nats = torch.zeros(len(held_out.ids), dtype=torch.float64, device=device)
    count = torch.zeros_like(nats)
    for ids, doc, row, first in held_out.batches(
        rows, accelerator.process_index, accelerator.num_processes
    ):
        here = slice(first, first + len(ids))
        for draw in range(replicates):
            noised = noiser(
                ids.to(device),
                doc.to(device),
                row.to(device),
                size=size,
                step=draw,
                rows_total=len(held_out.ids),
                first_row=first,
            )
            with accelerator.autocast():
                nats[here] += objective(model, noised).double().sum(1) / replicates
            count[here] = noised.scored.double().sum(1)
    # each row is one process's, 0 elsewhere
    totals, counts = (accelerator.reduce(x, "sum").cpu() for x in (nats, count))
    estimate = ratio_estimate(totals, counts)
    per_byte = (
        None
        if not held_out.bytes_per_token
        else estimate.mean / math.log(2) / held_out.bytes_per_token
    )
    error = None if math.isnan(estimate.stderr) else estimate.stderr
    return ValidationBound(noiser.block(size), estimate.mean, error, int(counts.sum()), per_byte)
