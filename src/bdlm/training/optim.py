"""The optimiser, the learning rate over a run, and the moving average of the weights.

Learning rate and block size are pure functions of the step and of the share of the budget that is
spent, so they have no state to save. Knows nothing about data, noise or checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdlm.training.muon import make_muon
from bdlm.training.sections import LimitsSection, OptimSection


def make_optimizer(model: nn.Module, config: OptimSection) -> torch.optim.Optimizer:
    """Make fused AdamW, or Muon for the layers' matrices with AdamW for the rest; weight decay on
    matrices only (the paper uses none)."""
    if config.name == "muon":
        return make_muon(model, config.lr, config.betas, config.eps, config.weight_decay)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimSection, step: int, share: float) -> float:
    """Compute the learning rate: linear warm-up over steps, then constant, linear or cosine decay
    over the share of the budget.

    step: steps already made. share: of the budget spent, 0..1."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    along = min(1.0, max(0.0, (share - config.decay_from) / (1 - config.decay_from)))
    if config.decay == "constant":
        left = 1.0
    elif config.decay == "linear":
        left = 1 - along
    else:
        left = 0.5 * (1 + math.cos(math.pi * along))
    return config.lr * warm * (config.decay_to + (1 - config.decay_to) * left)


def budget_share(limits: LimitsSection, step: int, tokens: int, seconds: float) -> float:
    """Return the spent share of the budget under the limit that is closest to its end; 1 or more
    means the run is over."""
    used = ((step, limits.steps), (tokens, limits.tokens), (seconds / 60, limits.minutes))
    return max(done / limit for done, limit in used if limit is not None)


def block_sizes_at(
    block_sizes: tuple[tuple[float, tuple[int, ...]], ...], share: float, default: int
) -> tuple[int, ...]:
    """Return the block sizes in use at this share of the budget."""
    current = block_sizes[0][1] if block_sizes else (default,)
    for start, sizes in block_sizes:
        if share >= start:
            current = sizes
    return current


class Ema:
    """Moving average of the trainable weights with warm-up: decay min(decay, (1 + n) / (10 + n))
    after n updates."""

    def __init__(self, model: nn.Module, decay: float, updates: int = 0) -> None:
        self.decay, self.updates = decay, updates
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        self._live = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.weights, [p.detach() for p in self._live], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged weights by name."""
        return dict(zip(self.names, self.weights, strict=True))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights inside a `with` block; the live weights come back bit
        for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(self._live, self.weights, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)
