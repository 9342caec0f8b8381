"""The Muon optimiser: momentum whose step is the nearest orthogonal matrix, for the matrices of the
layers; AdamW for all other weights.

In: a model. Out: one torch optimiser with the usual groups, state and `lr`. The step of a matrix is
scaled to the size of AdamW's step (0.2 sqrt(max(rows, columns)), Liu et al., arXiv 2502.16982), so
both parts share one learning rate. torch.optim.Muon computes the same in bfloat16, which is four
times slower on a CPU without bfloat16 products; this version uses float32 there. Knows nothing
about schedules or data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Jordan et al. 2024: steepest at zero, five steps bring singular values to 0.7..1.2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of the singular value decomposition by Newton-Schulz steps. float32 [...,
    m, n]; bfloat16 inside on CUDA."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def is_layer_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether Muon updates a weight: matrices inside the layers, except the noise
    conditioning; embeddings and head are excluded."""
    return parameter.ndim == 2 and "blocks." in name and "adaLN" not in name


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked `muon`, AdamW for the others. State: "momentum" for a Muon matrix,
    AdamW's state for the rest."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "muon": False})
        rest = [g for g in self.param_groups if not g["muon"]]
        self._adamw = torch.optim.AdamW(
            rest,
            lr=lr,
            betas=betas,
            eps=eps,
            fused=rest[0]["params"][0].device.type in ("cpu", "cuda"),
        )
        for group in rest:
            for key, value in self._adamw.defaults.items():
                group.setdefault(key, value)
        self._share()

    def _share(self) -> None:
        """Make AdamW work on this optimiser's own groups and state, so that both look like one
        optimiser."""
        self._adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both parts."""
        assert closure is None, "a closure is not used here"
        # `load_state_dict`, which accelerate's wrapping calls, puts new groups and a new state in
        # place
        self._share()
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                for p in group["params"]:
                    if p.grad is not None:
                        self._matrix(p, group)

    def _matrix(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        ahead = p.grad.lerp(momentum, MOMENTUM)  # Nesterov
        rows, columns = p.shape
        # queries, keys and values are three matrices
        parts = rows // columns if rows == 3 * columns else 1
        update = orthogonal(ahead.view(parts, rows // parts, columns)).view_as(p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows // parts, columns)))


def make_muon(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Muon:
    """Make Muon over the layers' matrices and AdamW over the rest; weight decay on matrices
    only."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    layers = [p for n, p in named if is_layer_matrix(n, p)]
    others = [p for n, p in named if p.ndim >= 2 and not is_layer_matrix(n, p)]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": layers, "weight_decay": weight_decay, "muon": True},
    ]
    return Muon([g for g in groups if g["params"]], lr, betas, eps)
