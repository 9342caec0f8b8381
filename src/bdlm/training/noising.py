"""From windows to noised batches, and the module that training wraps: denoiser and objective in one
forward.

In: `Tokens` of the loader and the block size that holds now. Out: `NoisedBatch`, then its loss in
nats. Knows nothing about optimisers or processes beyond where a row stands in the global batch."""

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
    """How windows are noised. `seed` keys all of it; validation has a seed of its own."""

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
        """The same with another interval of mask rates."""
        return replace(self, interval=interval)

    def for_validation(self) -> Noiser:
        """An unbiased noiser of the bound, with noise that training never sees and that is the same
        at every validation."""
        seed = int(bits(self.seed, purpose("validation")))
        return Noiser(self.spec, seed, distribution="count")

    def layout_of(self, doc: Tensor, size: int) -> Layout:
        """The layout of windows with blocks of `size`; one row of it where all rows agree. doc:
        int64 [R, L]."""
        if bool((doc == doc[:1]).all()):
            doc = doc[:1]
        return make_layout(Contiguous(self.block(size)), doc.shape[1], doc, self.spec.context)

    def block(self, size: int) -> int:
        """The block size that holds: only models with two streams have a choice."""
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
        """Noise windows whose rows stand at first_row, first_row + 1, ... of the step's
        `rows_total`. counts: of distribution "importance"."""
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
    """Cells of windows that are scored: neither padding nor the given first cell of a document.
    doc: int64 [R, L] -> bool [R, L]."""
    return maskable(make_layout(Contiguous(1), doc.shape[1], doc))


class LossModule(nn.Module):
    """Denoiser and objective in one forward, so that DDP and FSDP see every parameter used inside
    one call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, noised: NoisedBatch) -> tuple[Tensor, Tensor]:
        """The sum of the weighted loss terms, nats, float32; and the loss of each masked cell
        before its weight, [M], detached."""
        return total_and_losses(self.model, noised)
