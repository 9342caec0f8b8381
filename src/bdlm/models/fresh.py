"""The inference form of a model whose weights may still change: folded anew when a weight differs
from what was folded.

In: a denoiser. Out: its folded form (`models.inference`), or the model itself where it has none.
Weights may change in ways that torch does not count (`p.data`, another library's view of the
memory), so their bits are looked at. Knows nothing about who calls."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlm.core.threads import fed, lock, survive_fork
from bdlm.core.types import Denoiser
from bdlm.models.inference import fold

# sums of a tensor; a prime, so that rows and columns of a matrix that trade places do not keep
# theirs
COLUMNS = 1021


class Fresh:
    """A model's inference form, kept until a weight changes. Any number of threads may ask at once.

    It costs one reading of the weights each time (1 ms for the packaged model), less than one
    forward pass. compile: as in `fold`."""

    def __init__(self, model: Denoiser, compile: bool = False) -> None:
        self.model, self.compile = model, compile
        self._lock = lock()
        self._weights: list[int] = []
        self._sums = torch.empty(0, dtype=torch.long)
        self._form: Denoiser | None = None

    def __reduce__(self) -> tuple[type[Fresh], tuple[Denoiser, bool]]:
        return Fresh, (self.model, self.compile)  # a copy folds its own weights

    def form(self) -> Denoiser:
        """The inference form of the model as it is now."""
        survive_fork()
        with self._lock:
            if self._form is not None and self._form is self.model:
                return self._form
            weights = list(self.model.parameters()) if isinstance(self.model, nn.Module) else []
            with fed(sum(w.numel() for w in weights), 1):
                places, sums = [w.data_ptr() for w in weights], fingerprint(weights)
            if self._form is None or places != self._weights or not torch.equal(sums, self._sums):
                self._weights, self._sums, self._form = places, sums, fold(self.model, self.compile)
            return self._form


@torch.inference_mode()
def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Sums that change when a number of the tensors changes, int64 [n] on the CPU; none are of
    numbers, all of their bits.

    Of each tensor: its 64-bit words, summed over every COLUMNS-th. One changed word always shows;
    several hide only if they cancel out in each of the sums."""
    parts = [torch.empty(0, dtype=torch.long)]
    for tensor in tensors:
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        if raw.numel() % 8 or raw.storage_offset() % 8:
            raw = F.pad(raw, (0, -raw.numel() % 8))
        words = raw.view(torch.long)
        whole = len(words) // COLUMNS * COLUMNS
        parts.append(words[whole:].cpu())
        if whole:
            parts.append(words[:whole].view(-1, COLUMNS).sum(0).cpu())
    return torch.cat(parts)
