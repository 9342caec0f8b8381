"""Keeps the inference form of a model whose weights may still change: it is made again when a
weight differs.

In: a denoiser. Out: its inference form (`models.inference`), or the model itself if it has none.
Weights may change in ways that torch does not count (`p.data`, another library's view of the
memory), so their bits are read. Knows nothing about its callers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlm.core.threads import fork_safe_lock, limit_threads, survive_fork
from bdlm.core.types import Denoiser
from bdlm.models.inference import for_inference

# sums per tensor; a prime, so that swapped rows or columns of a matrix change them
COLUMNS = 1021


class InferenceFormCache:
    """Keep a model's inference form until a weight changes. Safe for any number of threads.

    Each use reads the weights once (1 ms for the packaged model), less than one forward pass.
    compile: as in `for_inference`."""

    def __init__(self, model: Denoiser, compile: bool = False) -> None:
        self.model, self.compile = model, compile
        self._lock = fork_safe_lock()
        self._weights: list[int] = []
        self._sums = torch.empty(0, dtype=torch.long)
        self._form: Denoiser | None = None

    def __reduce__(self) -> tuple[type[InferenceFormCache], tuple[Denoiser, bool]]:
        return InferenceFormCache, (self.model, self.compile)  # a copy makes its own form

    def form(self) -> Denoiser:
        """Return the inference form of the model as it is now."""
        survive_fork()
        with self._lock:
            if self._form is not None and self._form is self.model:
                return self._form
            weights = list(self.model.parameters()) if isinstance(self.model, nn.Module) else []
            with limit_threads(sum(w.numel() for w in weights), 1):
                places, sums = [w.data_ptr() for w in weights], fingerprint(weights)
            if self._form is None or places != self._weights or not torch.equal(sums, self._sums):
                self._weights = places
                self._sums = sums
                self._form = for_inference(self.model, self.compile)
            return self._form


@torch.inference_mode()
def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Return sums that change when a number of the tensors changes, int64 [n] on the CPU; they are
    sums of bits, not of values.

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
