"""From windows to noised batches, and the module that training wraps: denoiser and loss in one
forward pass.

In: `Tokens` of the loader and the current block size. Out: `NoisedBatch`, then its loss in nats.
Knows nothing about optimisers, and about processes only where a row stands in the global batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from bdlm.core.blockmap import Contiguous, make_layout, maskable
from bdlm.core.corruption import corrupt
from bdlm.core.counts import CountDistribution
from bdlm.core.objectives import total_and_losses
from bdlm.core.randomness import bits, purpose
from bdlm.core.schedules import Clipped, schedule_of
from bdlm.core.types import Layout, ModelSpec, NoisedBatch
from bdlm.training.sections import NoiseSection

FULL = (0.0, 1.0)


@dataclass(frozen=True)
class Noiser:
    """Draws the noise of windows. `seed` keys all of it; validation has its own seed."""

    spec: ModelSpec
    seed: int
    schedule: str = "linear"
    distribution: str = "count"
    resample: bool = False
    interval: tuple[float, float] = FULL
    mask_single_token_blocks: bool = True

    @classmethod
    def of(cls, config: NoiseSection, spec: ModelSpec, seed: int) -> Noiser:
        # an unknown name is refused here, not at the first step that needs it
        schedule_of(config.schedule)
        resample = config.resample and config.distribution == "time"
        return cls(
            spec,
            seed,
            config.schedule,
            config.distribution,
            resample,
            config.interval,
            config.mask_single_token_blocks,
        )

    def at(self, interval: tuple[float, float]) -> Noiser:
        """Return the same noiser with another interval of mask rates."""
        return replace(self, interval=interval)

    def for_validation(self) -> Noiser:
        """Return an unbiased noiser for the bound. Training never sees its noise, and the noise is
        the same at every validation."""
        seed = int(bits(self.seed, purpose("validation")))
        return Noiser(self.spec, seed, distribution="count")

    def layout_of(self, doc: Tensor, size: int) -> Layout:
        """Make the layout of windows with blocks of `size`, in one row where all rows agree. doc:
        int64 [R, L]."""
        if bool((doc == doc[:1]).all()):
            doc = doc[:1]
        return make_layout(Contiguous(self.block(size)), doc.shape[1], doc, self.spec.context)

    def block(self, size: int) -> int:
        """Return the block size in use: only models with two streams have a choice."""
        return size if self.spec.streams == 2 else self.spec.block_size

    def __call__(
        self,
        ids: Tensor,
        doc: Tensor,
        row: Tensor,
        *,
        size: int,
        step: int,
        rows_total: int,
        first_row: int,
        counts: CountDistribution | None = None,
    ) -> NoisedBatch:
        """Noise windows that stand at rows first_row, first_row + 1, ... of the step's
        `rows_total`. counts: for distribution "importance"."""
        layout = self.layout_of(doc, size)
        cells = maskable(layout).expand(ids.shape[0], -1)
        all_masked = self.block(size) == 1 and self.mask_single_token_blocks
        schedule = schedule_of(self.schedule) if self.interval == FULL else Clipped(*self.interval)
        return corrupt(
            ids,
            layout,
            cells,
            schedule,
            seed=self.seed,
            step=step,
            row=row,
            rows_total=rows_total,
            first_row=first_row,
            distribution="all" if all_masked else self.distribution,
            counts=counts,
            mask_id=self.spec.mask_id,
            resample=self.resample and not all_masked,
        )


def scored_cells(doc: Tensor) -> Tensor:
    """Mark the cells of windows that are scored: neither padding nor the given first cell of a
    document. doc: int64 [R, L] -> bool [R, L]."""
    return maskable(make_layout(Contiguous(1), doc.shape[1], doc))


class LossModule(nn.Module):
    """Denoiser and loss in one forward pass, so that DDP and FSDP see every parameter used inside
    one call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, noised: NoisedBatch) -> tuple[Tensor, Tensor]:
        """Return the sum of the weighted loss terms, nats, float32; and the unweighted loss of each
        masked cell, [M], detached."""
        return total_and_losses(self.model, noised)
