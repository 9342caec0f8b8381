"""The state of a run and one optimiser step: what a checkpoint must hold, and how it is saved and
restored.

In: a model, a stream of windows, a config. Out: one `StepReport` per step. All noise is a function
of (seed, step, row), so there is no random generator state to save. Knows nothing about logging,
limits or signals (`loop`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.core.counts import CountMoments
from bdlm.core.errors import CheckpointError, ConfigError, TrainingError
from bdlm.core.objectives import count_losses
from bdlm.core.randomness import bits, purpose, uniform
from bdlm.training import checkpoint
from bdlm.training.adaptive import AdaptiveCounts
from bdlm.training.checkpoint import Checkpoint
from bdlm.training.config import TrainConfig
from bdlm.training.noising import LossModule, Noiser, scored_cells
from bdlm.training.optim import Ema, block_sizes_at, learning_rate, make_optimizer

# What may differ between a run and its resumption; everything else must be equal. The stream itself
# refuses other data.
SECTIONS_THAT_MAY_CHANGE = (
    "limits",
    "valid",
    "save",
    "log",
    "out",
    "resume",
    "optim",
    "device",
    "precision",
    "block_sizes",
    "data",
)
# the rest of "data" is checked by its content
FIELDS_THAT_MUST_MATCH = ("data.tokenizer", "data.vocab_size", "optim.name")
FIELDS_THAT_MAY_CHANGE = (
    "model.compile",
    "model.gradient_checkpointing",
    "model.init_from",
    "model.block_size",
)


@dataclass(frozen=True)
class StepReport:
    """One optimiser step. loss: nats per scored token over the global batch. grad_norm: before
    clipping."""

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    block_size: int


class Trainer:
    """Model, optimiser, averaged weights, stream and counters of one process of a run."""

    def __init__(self, config: TrainConfig, accelerator: Any, model: Any, stream: Any) -> None:
        rows, processes = config.optim.batch_size, accelerator.num_processes
        if rows % (processes * config.optim.accumulation):
            raise ConfigError(
                f"optim.batch_size is {rows}, not divisible by {processes} processes x"
                f" optim.accumulation {config.optim.accumulation}; use a multiple"
            )
        self.config = config
        self.accelerator = accelerator
        self.stream = stream
        optimizer = make_optimizer(model, config.optim)
        self.loss_module, self.optimizer = accelerator.prepare(LossModule(model), optimizer)
        self.model = accelerator.unwrap_model(self.loss_module).model
        self.ema = Ema(self.model, config.optim.ema)
        self.noiser = Noiser.of(config.noise, self.model.spec, config.seed)
        self.adaptive = (
            AdaptiveCounts(config.noise, accelerator)
            if config.noise.distribution == "importance"
            else None
        )
        # block size -> mask rates that the search chose for it
        self.intervals: dict[int, tuple[float, float]] = {}
        self.steps_done = 0  # optimiser steps
        self.tokens = 0  # real tokens of the global batches
        self.last_checkpoint: Path | None = None  # saved by this run or resumed from
        self.saved_step: int | None = None  # its step
        self.good_checkpoint: Path | None = None  # the newest that a sound step followed
        self.good_step: int | None = None  # its step

    # -- one step ----------------------------------------------------------------------------------

    def step(self, share: float) -> StepReport:
        """Make one optimiser step on the next global batch. share: of the budget spent, the same on
        all processes.

        Raises TrainingError, before the weights change, when loss or gradient is not finite."""
        config, processes = self.config.optim, self.accelerator.num_processes
        size = self.block_size(share)
        batch = next(self.stream)
        self._seed_dropout()
        scored, real = self._global_sum(
            int(scored_cells(batch.doc).sum()), int((batch.doc >= 0).sum())
        )
        total, found = torch.zeros((), device=self.accelerator.device), CountMoments.empty()
        for noised, last in self._pieces(batch, size):
            with nullcontext() if last else self.accelerator.no_sync(self.loss_module):
                nats, losses = self.loss_module(noised)
                # DDP averages gradients over processes; the loss is a sum over all of them divided
                # once
                self.accelerator.backward(nats * (processes / max(scored, 1)))
            total += nats.detach()
            if self.adaptive:
                found += CountMoments.of(*count_losses(losses, noised))
        norm = self.accelerator.clip_grad_norm_(
            self.loss_module.parameters(), config.clip or math.inf
        )
        loss = float(self.accelerator.reduce(total, "sum")) / max(scored, 1)
        self._check(loss, float(norm), batch)
        if self.saved_step == self.steps_done and loss <= 3 * math.log(self.model.spec.vocab_size):
            self.good_checkpoint, self.good_step = self.last_checkpoint, self.saved_step
        lr = learning_rate(config, self.steps_done, share)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if config.ema:
            self.ema.update()
        self.steps_done += 1
        self.tokens += real
        if self.adaptive:
            self.adaptive.update(self.noiser.block(size), found, self.steps_done)
        return StepReport(
            self.steps_done, self.tokens, loss, float(norm), lr, self.noiser.block(size)
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Give the model its averaged weights inside a `with` block (its own where no average is
        kept)."""
        return self.ema.in_place() if self.config.optim.ema else nullcontext()

    def block_size(self, share: float) -> int:
        """Return the block size of the next step at this share of the budget: a pure function of
        the seed and the step."""
        sizes = self.block_sizes_at(share)
        return sizes[
            int(uniform(self.config.seed, purpose("block size"), self.steps_done) * len(sizes))
        ]

    def block_sizes_at(self, share: float) -> tuple[int, ...]:
        """Return the block sizes that steps at this share of the budget choose from."""
        return block_sizes_at(self.config.block_sizes, share, self.config.model.block_size)

    def _pieces(self, batch: Any, size: int) -> Iterator[tuple[Any, bool]]:
        """Yield this process's rows as noised batches, one for each accumulation step, and whether
        it is the last."""
        total, device = self.config.optim.batch_size, self.accelerator.device
        noiser = self.noiser.at(self.intervals.get(self.noiser.block(size), self.noiser.interval))
        counts = self.adaptive.distribution(self.noiser.block(size)) if self.adaptive else None
        count = batch.ids.shape[0] // self.config.optim.accumulation
        for start in range(0, batch.ids.shape[0], count):
            ids, doc, row = (
                x[start : start + count].to(device, non_blocking=True)
                for x in (batch.ids, batch.doc, batch.row)
            )
            first = self.accelerator.process_index * batch.ids.shape[0] + start
            noised = noiser(
                ids,
                doc,
                row,
                size=size,
                step=self.steps_done,
                rows_total=total,
                first_row=first,
                counts=counts,
            )
            yield noised, start + count >= batch.ids.shape[0]

    def _seed_dropout(self) -> None:
        if self.config.model.dropout:
            torch.manual_seed(
                int(
                    bits(
                        self.config.seed,
                        purpose("dropout"),
                        self.steps_done,
                        self.accelerator.process_index,
                    )
                )
            )

    def _global_sum(self, *values: int) -> list[int]:
        if self.accelerator.num_processes == 1:
            return list(values)
        local = torch.tensor(values, dtype=torch.long, device=self.accelerator.device)
        return [int(v) for v in self.accelerator.reduce(local, "sum")]

    def _check(self, loss: float, norm: float, batch: Any) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = (
            f"the loss is {loss}"
            if not math.isfinite(loss)
            else f"the gradient norm is {norm} (loss {loss:.4f})"
        )
        rows = f"rows {int(batch.row[0])}..{int(batch.row[-1])} (windows {_short(batch.index)})"
        change = "a lower optim.lr or a longer optim.warmup_steps"
        if self.good_checkpoint:
            good = self.good_checkpoint
            way = (
                f"the last good checkpoint is '{good}'; go on from it with resume='{good}' and"
                f" {change}"
            )
        elif self.last_checkpoint:
            last = self.last_checkpoint
            way = (
                f"no sound step followed a checkpoint ('{last}' leads here); start again with"
                f" {change}, in another folder with out=..."
            )
        else:
            way = f"no checkpoint was written yet; start again with {change}"
        raise TrainingError(f"{what} at step {self.steps_done + 1}, batch of {rows}; {way}")

    # -- state -------------------------------------------------------------------------------------

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Return every tensor of the run by name, complete on each process (a collective call under
        FSDP)."""
        optimizer: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            for key, value in self._inner().state.get(p, {}).items():
                optimizer[f"{key}/{name}"] = gathered(torch.as_tensor(value))
        weights = {name: gathered(p.detach()) for name, p in self.model.named_parameters()}
        ema = (
            {name: gathered(w) for name, w in self.ema.state().items()}
            if self.config.optim.ema
            else {}
        )
        return {"weights": weights, "ema": ema, "optimizer": optimizer}

    def state(self) -> dict[str, Any]:
        """Return every other value of the run, as plain values for JSON."""
        return {
            "step": self.steps_done,
            "tokens": self.tokens,
            "ema_updates": self.ema.updates,
            "intervals": [[size, *interval] for size, interval in self.intervals.items()],
            "counts": self.adaptive.state() if self.adaptive else None,
            "stream": self.stream.state_dict(),
            "config": self.config.to_dict(),
            "processes": self.accelerator.num_processes,
            "good_step": self.good_step,
        }

    @torch.no_grad()
    def restore(self, saved: Checkpoint) -> None:
        """Restore a checkpoint's state. Raises CheckpointError when the checkpoint belongs to
        another run."""
        self._check_same_run(saved)
        names = dict(self.model.named_parameters())
        _check_names(saved, "weights", names)
        for name, p in names.items():
            copy_into(p, saved.groups["weights"][name])
        if self.config.optim.ema:
            average = saved.groups["ema"] or saved.groups["weights"]
            for name, w in self.ema.state().items():
                copy_into(w, average[name])
        for key, value in saved.groups["optimizer"].items():
            slot, _, name = key.partition("/")
            self._inner().state[names[name]][slot] = (
                sharded_like(value, names[name]) if value.ndim else value.to(names[name].device)
            )
        state = saved.state
        self.steps_done = state["step"]
        self.tokens = state["tokens"]
        self.ema.updates = state["ema_updates"]
        self.intervals = {size: (low, high) for size, low, high in state["intervals"]}
        if self.adaptive:
            self.adaptive.restore(state["counts"])
        self.stream.load_state_dict(state["stream"])
        self.last_checkpoint, self.saved_step = saved.path, saved.step
        good = state.get("good_step")
        if good is not None and (path := checkpoint.folder_of(saved.path.parent, good)).is_dir():
            self.good_checkpoint, self.good_step = path, good

    def _inner(self) -> torch.optim.Optimizer:
        """Return the torch optimiser inside accelerate's."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _check_same_run(self, saved: Checkpoint) -> None:
        then, now = saved.state["config"], self.config.to_dict()
        for path in _differences(then, now):
            free = (
                path.split(".")[0] in SECTIONS_THAT_MAY_CHANGE
                or path in FIELDS_THAT_MAY_CHANGE
                or path.startswith("noise.search")
            )
            if path in FIELDS_THAT_MUST_MATCH or not free:
                raise CheckpointError(
                    f"'{saved.path}' was written with another {path} ({_get(then, path)!r}, now"
                    f" {_get(now, path)!r}); put it back, or train into another folder with out=..."
                )


def gathered(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (FSDP); return others unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """Put a complete tensor on the device, and in the sharding, of another."""
    value = value.to(reference.device)
    if not hasattr(reference, "full_tensor"):
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = reference
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)


def copy_into(target: Tensor, value: Tensor) -> None:
    """Write a complete tensor into one that may be sharded."""
    target.copy_(sharded_like(value, target))


def _check_names(saved: Checkpoint, group: str, names: dict[str, Any]) -> None:
    file = saved.path / f"{group}.safetensors"
    for name in names.keys() ^ saved.groups[group].keys():
        where = "is not in this model" if name in saved.groups[group] else "is missing from it"
        raise CheckpointError(
            f"'{file}' does not fit the model: tensor {name} {where}; train into another folder"
            " with out=..."
        )
    for name, p in names.items():
        if p.shape != saved.groups[group][name].shape:
            raise CheckpointError(
                f"'{file}' does not fit the model: tensor {name} has shape"
                f" {list(saved.groups[group][name].shape)}, the model {list(p.shape)}; train into"
                " another folder with out=..."
            )


def _differences(then: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            d
            for key in then.keys() & now.keys()
            for d in _differences(then[key], now[key], f"{path}.{key}" if path else key)
        ]
    return [] if then == now else [path]


def _get(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def _short(index: Any) -> str:
    values = index.tolist() if isinstance(index, Tensor) else index
    values = values if isinstance(values, list) else [values]
    return ", ".join(str(v) for v in values[:8]) + (", ..." if len(values) > 8 else "")
