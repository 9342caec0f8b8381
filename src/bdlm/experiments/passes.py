"""The loss and its gradient in one pass over both streams, in two passes, and block by block: time,
memory, and a check that the numbers agree.

In: a model of two streams. Out: seconds and kept bytes of each method. Source: arXiv 2503.09573,
Alg. 1, and "vectorised training" (Sec. 3.2, App. B.6). Two passes: the clean windows into a cache,
then all noisy blocks against it. Block by block: each noisy block with the earlier clean ones, by
definition. All three run the same layers; only the forward passes differ. Knows nothing about data:
tokens are random."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bdlm.core import forward
from bdlm.core.blockmap import Contiguous, make_layout, maskable
from bdlm.core.corruption import corrupt
from bdlm.core.schedules import Linear
from bdlm.core.types import NoisedBatch, Step
from bdlm.models.dit import DiT

SEEN = ("position", "rank", "group", "limit", "doc")  # what a step needs of a layout


def one_pass(model: DiT, noised: NoisedBatch) -> Tensor:
    """Compute logits of all noisy cells, [R, L, V]."""
    logits = forward.train_logits(model, noised, torch.ones_like(noised.masked)).logits
    assert logits is not None
    return logits.view(*noised.clean.shape, -1)


def two_passes(model: DiT, noised: NoisedBatch) -> Tensor:
    """Compute the same through a cache of the clean windows."""
    rows, length = noised.clean.shape
    layout, cache = noised.layout.expand(rows), model.new_cache(rows, length, slack=0)
    forward.extend(model, noised.clean, layout, cache)
    logits = model.step(
        Step(noised.noisy, **{name: getattr(layout, name) for name in SEEN}), cache
    ).logits
    assert logits is not None
    return logits


def block_by_block(model: DiT, noised: NoisedBatch) -> Tensor:
    """Compute the same by one forward pass for each block, which sees the earlier clean cells."""
    layout, parts = noised.layout.expand(noised.clean.shape[0]), []
    for block in noised.layout.block[0].unique():
        own = (noised.layout.block[0] == block).nonzero()[:, 0]
        before = torch.arange(int(own[0]))
        cells = torch.cat((own, before))
        there = layout.map(lambda x, own=cells: x[:, own])  # type: ignore[misc]
        ids = torch.cat((noised.noisy[:, own], noised.clean[:, before]), 1)
        group = torch.where(torch.arange(len(cells)) < len(own), there.group, -1)
        logits = model.step(
            Step(ids, there.position, there.rank, group, there.limit, there.doc)
        ).logits
        assert logits is not None
        parts.append(logits[:, : len(own)])
    return torch.cat(parts, 1)


WAYS: dict[str, Callable[[DiT, NoisedBatch], Tensor]] = {
    "one pass": one_pass,
    "two passes": two_passes,
    "block by block": block_by_block,
}


def passes(
    lm: Any,
    *,
    block_size: int,
    rows: int = 4,
    length: int | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the methods in turn: median seconds of a loss with its gradient, bytes kept for it,
    distance of the gradient from that of one pass."""
    model, length = lm.model, length or lm.spec.max_length
    layout, draw = make_layout(Contiguous(block_size), length), torch.Generator().manual_seed(seed)
    clean = torch.randint(0, lm.spec.mask_id, (rows, length), generator=draw)
    noised = corrupt(
        clean,
        layout,
        maskable(layout).expand(rows, -1),
        Linear(),
        seed=seed,
        step=0,
        row=torch.arange(rows),
        distribution="count",
        mask_id=lm.spec.mask_id,
    )
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    kept, gradients = {}, {}
    for _ in range(repeats):
        for name, way in WAYS.items():
            start = time.perf_counter()
            kept[name], gradients[name] = _backward(model, noised, way)
            seconds[name].append(time.perf_counter() - start)
    scale = float(gradients["one pass"].abs().max())
    return {
        name: {
            "seconds": median(seconds[name]),
            "times": median(seconds[name]) / median(seconds["one pass"]),
            "kept_bytes": kept[name],
            "gradient_difference": (
                float((gradients[name] - gradients["one pass"]).abs().max()) / scale
            ),
        }
        for name in WAYS
    }


def _backward(
    model: DiT, noised: NoisedBatch, way: Callable[[DiT, NoisedBatch], Tensor]
) -> tuple[int, Tensor]:
    """Return the bytes kept for the backward pass (each storage once, without weights), and the
    gradient as one vector."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = way(model, noised)
        nll = -logits.log_softmax(-1).gather(-1, noised.clean[..., None])[..., 0]
        ((nll * noised.weight)[noised.masked].sum() / noised.scored.sum()).backward()
    vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return sum(held.values()), vector
