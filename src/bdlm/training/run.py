"""One training run: its parts, and what the loop does with them between steps.

In: a `TrainConfig`, accelerate's accelerator and a run folder. Out: log records, validations,
checkpoints, and at the end the exported model and a `TrainResult`. The optimiser step is in
`trainer`, the order of everything in `loop`. Knows nothing about generation: sample texts come from
a `Sampler` that the caller passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bdlm.core.errors import BdlmError, ConfigError
from bdlm.data.files import write_json
from bdlm.training import checkpoint
from bdlm.training.accelerator import RunClock, StopSignals
from bdlm.training.config import TrainConfig
from bdlm.training.optim import budget_share
from bdlm.training.prepare import TrainingData, build_model, check_warm_start, export, prepare_data
from bdlm.training.result import TrainResult, bound_in_words
from bdlm.training.resume import (
    check_branch,
    check_limits,
    find_checkpoint,
    is_own,
    kept_config,
    set_newer_aside,
    take_tokenizer,
)
from bdlm.training.run_log import RunLog, duration, learning_curve, read_metrics
from bdlm.training.search import IntervalSearch, search_noiser
from bdlm.training.trainer import StepReport, Trainer
from bdlm.training.validate import validate

Sampler = Callable[[Any, Any, int], str]
"""(denoiser with the averaged weights and no dropout, tokenizer, block size) -> a sample text to
log."""


@dataclass(frozen=True)
class BudgetStatus:
    """What all processes agree on before a step.

    seconds: of training so far. share: of the budget that is spent, 1 or more at its end. stopped:
    whether a signal asked any process to stop."""

    seconds: float
    share: float
    stopped: bool


class Run:
    """The parts of one run and the operations of the loop on them. check: raises where the run
    folder is gone."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Any,
        folder: Path,
        sampler: Sampler | None,
        data: TrainingData | None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self.sampler = sampler
        self.check = check  # raises where the folder is gone
        saved = find_checkpoint(config, accelerator.is_main_process)
        if saved is not None:
            check_limits(config, saved.state)
            self._check_files(saved)
        else:
            check_warm_start(config)
        self.data = data or prepare_data(config, folder, accelerator, resumed=saved is not None)
        model = build_model(config, self.data.tokenizer, fresh=saved is None)
        self.trainer = Trainer(config, accelerator, model, self.data.stream(config, accelerator))
        seconds, notice = 0.0, None
        if saved is not None:
            self.trainer.restore(saved)
            seconds = float(saved.state["seconds"])
        if accelerator.is_main_process:
            if saved is not None and config.resume != "auto":
                notice = set_newer_aside(folder, saved)
            write_json(folder / "config.json", kept_config(config))
        accelerator.wait_for_everyone()
        self.tokenizer_files = checkpoint.digests(folder / "tokenizer")
        self.clock = RunClock(seconds)
        self.run_log = self._open_run_log()
        if notice:
            self.run_log.say(notice)
        self.valid: list[dict[str, Any]] = []
        self._validated = -1  # the step of the last validation
        self._last = {"valid": seconds, "save": seconds}
        self._since = (seconds, self.trainer.tokens)
        self._paused = 0.0
        self._announce(saved, seconds)
        if saved is not None and not is_own(folder, saved):
            self.trainer.saved_step = None
            self.save()  # a checkpoint of another run: make this folder self-contained

    def _announce(self, saved: checkpoint.Checkpoint | None, seconds: float) -> None:
        """Print and log what starts or resumes here."""
        step, tokens = self.trainer.steps_done, self.trainer.tokens
        parameters = sum(p.numel() for p in self.trainer.model.parameters())
        start = "training" if saved is None else f"resumed at step {step}"
        if budget_share(self.config.limits, step, tokens, seconds) >= 1:
            start += ", where its limits end it (raise them to train on)"
        device, processes = self.accelerator.device, self.accelerator.num_processes
        precision = self.accelerator.mixed_precision.replace("no", "fp32")
        self.run_log.say(
            f"{start}: {parameters:,} parameters, {self.data.describe()}, {device}, {precision},"
            f" {processes} process(es), into '{self.folder}'"
        )
        self.run_log.write(
            "event",
            step,
            event="resumed" if saved else "started",
            parameters=parameters,
            seconds=seconds,
            tokens=tokens,
        )

    def _check_files(self, saved: checkpoint.Checkpoint) -> None:
        """Check that the files a checkpoint depends on are in the folder, unchanged since the
        checkpoint was written."""
        check_branch(self.folder, saved)
        if self.accelerator.is_main_process:
            take_tokenizer(self.folder, saved)
        self.accelerator.wait_for_everyone()
        checkpoint.check_digests(self.folder / "tokenizer", saved.state.get("tokenizer", {}))

    def _open_run_log(self) -> RunLog:
        tracker, names = None, self.config.log.trackers
        if names:
            try:
                self.accelerator.init_trackers("logs", config=flat(self.config.to_dict()))
            except Exception as error:  # trackers raise their own types: no login, no server, ...
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(
                    f"log.trackers {', '.join(names)} could not start ({reason}); fix that, or use"
                    " log.trackers=[]"
                ) from error
            tracker = self.accelerator
        main, progress = self.accelerator.is_main_process, self.config.log.progress
        return RunLog(self.folder, main, progress, tracker, self.check)

    # -- at every step -----------------------------------------------------------------------------

    def budget(self, stop: StopSignals) -> BudgetStatus:
        """Return the main process's clock and whether any process was asked to stop; the same on
        all processes."""
        seconds, stopped = self.clock.seconds(), stop.name is not None
        if self.accelerator.num_processes > 1:
            local = torch.tensor(
                [seconds if self.accelerator.is_main_process else 0.0, float(stopped)],
                dtype=torch.float32,
            )
            both = self.accelerator.reduce(local.to(self.accelerator.device), "sum")
            seconds, stopped = float(both[0]), bool(both[1] > 0)
        return BudgetStatus(
            seconds,
            budget_share(self.config.limits, self.trainer.steps_done, self.trainer.tokens, seconds),
            stopped,
        )

    def due(self, what: str, status: BudgetStatus) -> bool:
        """Return whether it is time for "valid" or "save", by steps or by minutes."""
        plan = getattr(self.config, what)
        by_step = plan.every_steps is not None and self.trainer.steps_done % plan.every_steps == 0
        by_time = (
            plan.every_minutes is not None
            and status.seconds - self._last[what] >= 60 * plan.every_minutes
        )
        if by_step or by_time:
            self._last[what] = status.seconds
        return by_step or by_time

    def log(self, report: StepReport, status: BudgetStatus) -> None:
        """Log the step and move the progress bar."""
        now = self.clock.seconds()
        seconds, tokens = now - self._since[0] - self._paused, report.tokens - self._since[1]
        rate = tokens / max(seconds, 1e-9)
        left = now * (1 / status.share - 1) if status.share > 0 else float("inf")
        self.run_log.progress(status.share, report.loss, rate, left, report.block_size)
        if report.step % self.config.log.every_steps:
            return
        self._since, self._paused = (now, report.tokens), 0.0
        self.run_log.write(
            "train", **asdict(report), tokens_per_second=rate, seconds=now, share=status.share
        )
        if not self.run_log.has_bar and self.config.log.progress:
            self.run_log.say(
                f"step {report.step}  loss {report.loss:.4f} nats  block {report.block_size} "
                f" {rate:,.0f} tokens/s  {duration(left)} left"
            )

    # -- now and then ----------------------------------------------------------------------------

    def validate(self, share: float) -> None:
        """Compute bounds of the held-out windows under the averaged weights, make a sample text,
        and run the schedule search."""
        start = self.clock.seconds()
        trainer = self.trainer
        plan = self.config.valid
        current, model = (
            sorted({trainer.noiser.block(n) for n in trainer.block_sizes_at(share)}),
            trainer.model,
        )
        facts = {"tokens": trainer.tokens, "seconds": start}
        # without dropout the mode stays, so that a compiled trunk is not compiled twice
        model.train(model.training and not self.config.model.dropout)
        with trainer.averaged():
            if self.data.held_out is not None:
                sizes = {trainer.noiser.block(n) for n in plan.block_sizes or current}
                bounds = [
                    validate(
                        model,
                        self.data.held_out,
                        trainer.noiser.for_validation(),
                        n,
                        plan.batch_size,
                        plan.replicates,
                        self.accelerator,
                    )
                    for n in sorted(sizes)
                ]
                self.valid = [{**asdict(b), "perplexity": b.perplexity} for b in bounds]
                for bound in self.valid:
                    self.run_log.write("valid", trainer.steps_done, **bound, **facts)
                    self.run_log.say(bound_in_words(trainer.steps_done, bound))
                for size in current:
                    self._search(size, facts)
            self._sample(current[-1])
        model.train()
        self._validated = trainer.steps_done
        self._paused += self.clock.seconds() - start

    def _search(self, size: int, facts: dict[str, Any]) -> None:
        trainer, noise = self.trainer, self.config.noise
        if not noise.search or self.data.held_out is None or size == 1:
            return
        rows = min(self.config.valid.batch_size, len(self.data.held_out.ids))
        search = IntervalSearch(
            self.data.held_out,
            search_noiser(trainer.noiser, trainer.steps_done),
            size,
            rows,
            self.accelerator,
        )
        found = search.run(trainer.model, trainer.loss_module, noise)
        trainer.intervals[size] = found.best
        self.run_log.write(
            "search", trainer.steps_done, block_size=size, **found.to_dict(), **facts
        )
        self.run_log.say(
            f"step {trainer.steps_done}  blocks of {size}: mask rates"
            f" {found.best[0]:.2f}..{found.best[1]:.2f} have the least loss variance"
        )

    def _sample(self, size: int) -> None:
        if self.sampler is None or not self.accelerator.is_main_process:
            return
        try:
            text = self.sampler(self.trainer.model, self.data.tokenizer, size)
        except BdlmError as error:  # samples are only for the reader: training goes on
            self.run_log.say(f"step {self.trainer.steps_done}  no sample: {error}")
            return
        self.run_log.write("sample", self.trainer.steps_done, text=text)
        self.run_log.say(f"step {self.trainer.steps_done}  sample: {text[:200]!r}")

    def save(self) -> None:
        """Write a checkpoint of the full state unless this state is saved already. A collective
        call; the main process writes."""
        start, trainer = self.clock.seconds(), self.trainer
        self.check()
        if trainer.saved_step == trainer.steps_done:
            return
        groups, checkpoints = trainer.groups(), self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            state = {**trainer.state(), "seconds": start, "tokenizer": self.tokenizer_files}
            checkpoint.save(
                checkpoints,
                trainer.steps_done,
                groups,
                state,
                self.config.save.keep,
                trainer.good_checkpoint,
            )
            self._complete_folder()
        trainer.last_checkpoint, trainer.saved_step = (
            checkpoint.folder_of(checkpoints, trainer.steps_done),
            trainer.steps_done,
        )
        self.accelerator.wait_for_everyone()
        self._paused += self.clock.seconds() - start

    def _complete_folder(self) -> None:
        """Write the files that a resume needs again where they were deleted."""
        if not (self.folder / "config.json").exists():
            write_json(self.folder / "config.json", kept_config(self.config))
        if self.tokenizer_files and not (self.folder / "tokenizer").exists():
            self.data.tokenizer.save(self.folder / "tokenizer")

    def finish(self, stop: StopSignals, status: BudgetStatus) -> TrainResult:
        """Save; when the budget is spent, also validate, export the model and draw the curve."""
        self.save()
        trainer = self.trainer
        model = None
        reason = "done"
        if status.stopped:
            reason = stop.name or "stopped"
            self.run_log.say(
                f"stopped by {reason} at step {trainer.steps_done}; go on with resume=auto"
                f" out={self.folder}"
            )
        else:
            if self._validated != trainer.steps_done:
                self.validate(min(status.share, 1.0))
            self.check()
            model = str(self.folder / "model")
            self._export(Path(model))
            if self.accelerator.is_main_process and trainer.last_checkpoint:
                checkpoint.prune(trainer.last_checkpoint, self.config.save.keep)
        self.run_log.write(
            "event",
            trainer.steps_done,
            event=reason,
            tokens=trainer.tokens,
            seconds=self.clock.seconds(),
        )
        if self.accelerator.is_main_process and trainer.steps_done >= self.config.log.every_steps:
            learning_curve(
                read_metrics(self.folder),
                self.folder / "curve.png",
                f"Learning curve of {self.folder.name}",
            )
        last = str(trainer.last_checkpoint)
        return TrainResult(
            str(self.folder),
            reason,
            trainer.steps_done,
            trainer.tokens,
            self.clock.seconds(),
            last,
            model,
            self.valid,
        )

    def _export(self, folder: Path) -> None:
        groups = self.trainer.groups()
        if self.accelerator.is_main_process:
            weights = groups["ema"] or groups["weights"]
            facts = {
                "steps": self.trainer.steps_done,
                "tokens": self.trainer.tokens,
                "valid": self.valid,
            }
            load_report = export(
                self.trainer.model, weights, self.data.tokenizer, self.config, facts, folder
            )
            self.run_log.say(f"model in '{folder}': {load_report}")
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.run_log.close()
        if self.config.log.trackers:
            with suppress(OSError):  # the folder may be gone, which was reported already
                self.accelerator.end_training()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted names and scalars, for trackers."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = (
                value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
            )
    return out
