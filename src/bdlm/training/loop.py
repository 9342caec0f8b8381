"""Training from a config to a run folder: the loop.

In: a `TrainConfig`. Out: a run folder (config.json, checkpoints/, metrics.jsonl, curve.png, model/)
and a `Result`. The model folder holds the averaged weights and the tokenizer, and loads like any
other model.
Knows nothing about generation: sample texts come from a `sampler` that the caller gives.

    python -m bdlm.training.loop RECIPE field=value ...
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bdlm.core.errors import BdlmError, ConfigError, TrainingError
from bdlm.data.files import write_json
from bdlm.training import checkpoint
from bdlm.training.accelerator import Clock, Stop, held, make_accelerator
from bdlm.training.config import TrainConfig, load_config
from bdlm.training.optim import spent
from bdlm.training.prepare import Data, build_model, check_warm_start, export, prepare_data
from bdlm.training.resume import check_branch, is_own, kept_config, set_newer_aside, take_tokenizer
from bdlm.training.run_log import Reporter, duration, learning_curve, read_metrics, tell
from bdlm.training.search import Search, search_noiser
from bdlm.training.trainer import StepReport, Trainer
from bdlm.training.validate import validate

Sampler = Callable[[Any, Any, int], str]
"""(denoiser with the averaged weights and no dropout, tokenizer, block size) -> a sample text to
log."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. reason: "done" (a limit was reached) or the name of the signal that stopped
    it.

    model: folder of the exported model, None when the run was stopped. valid: the last validation's
    bounds."""

    folder: str
    reason: str
    step: int
    tokens: int
    seconds: float
    checkpoint: str
    model: str | None = None
    valid: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.reason}: {self.step:,} steps, {self.tokens:,} tokens, {duration(self.seconds)};"
            f" run in '{self.folder}'"
        ]
        lines += [_sentence(self.step, bound) for bound in self.valid]
        if self.model:
            lines.append(f"model in '{self.model}'")
        return "\n".join(lines)


@dataclass(frozen=True)
class Moment:
    """What all processes agree on before a step."""

    seconds: float
    share: float
    stopped: bool


def train(
    config: TrainConfig, sampler: Sampler | None = None, data: Data | None = None
) -> TrainResult:
    """Train until a limit of the config is reached, or a signal asks to stop; resumes where
    `config.resume` says so.

    data: windows that the caller has prepared; None prepares those that `config.data` names. Raises
    ConfigError, DataError, CheckpointError (bad input, damaged checkpoint, full disk) and
    TrainingError (loss not finite)."""
    accelerator, folder = make_accelerator(config), Path(config.out)
    new = accelerator.is_main_process and not folder.exists()
    with held(folder, accelerator) as check, Stop() as stop:
        try:
            run = Run(config, accelerator, folder, sampler, data, check)
        except BdlmError:
            if new:  # a run that could not begin leaves nothing behind
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            while True:
                moment = run.moment(stop)
                if moment.stopped or moment.share >= 1:
                    break
                report = run.trainer.step(moment.share)
                check()
                run.log(report, moment)
                if run.due("valid", moment):
                    run.validate(moment.share)
                if run.due("save", moment):
                    run.save()
            return run.finish(stop, moment)
        except OSError as error:
            check()
            # of a tracker, say; a bare one would pass for a reader of stdout that has seen enough
            if isinstance(error, BrokenPipeError):
                raise TrainingError(
                    f"a pipe broke at step {run.trainer.done}; go on with resume=auto out={folder}"
                ) from error
            raise
        finally:
            run.close()


class Run:
    """The parts of one run and what the loop does with them."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Any,
        folder: Path,
        sampler: Sampler | None,
        data: Data | None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.accelerator, self.folder, self.sampler = (
            config,
            accelerator,
            folder,
            sampler,
        )
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
        seconds, said = 0.0, None
        if saved is not None:
            self.trainer.restore(saved)
            seconds = float(saved.state["seconds"])
        if accelerator.is_main_process:
            if saved is not None and config.resume != "auto":
                said = set_newer_aside(folder, saved)
            write_json(folder / "config.json", kept_config(config))
        accelerator.wait_for_everyone()
        self.tokenizer_files = checkpoint.digests(folder / "tokenizer")
        self.clock = Clock(seconds)
        self.reporter = self._reporter()
        if said:
            self.reporter.say(said)
        self.valid: list[dict[str, Any]] = []
        self._validated = -1  # the step of the last validation
        self._last = {"valid": seconds, "save": seconds}
        self._since = (seconds, self.trainer.tokens)
        self._paused = 0.0
        parameters = sum(p.numel() for p in model.parameters())
        start = "training" if saved is None else f"resumed at step {self.trainer.done}"
        if spent(config.limits, self.trainer.done, self.trainer.tokens, seconds) >= 1:
            start += ", where its limits end it (raise them to train on)"
        precision = accelerator.mixed_precision.replace("no", "fp32")
        self.reporter.say(
            f"{start}: {parameters:,} parameters, {self.data.describe()}, {accelerator.device},"
            f" {precision}, {accelerator.num_processes} process(es), into '{folder}'"
        )
        event = "resumed" if saved else "started"
        self.reporter.write(
            "event",
            self.trainer.done,
            event=event,
            parameters=parameters,
            seconds=seconds,
            tokens=self.trainer.tokens,
        )
        if saved is not None and not is_own(folder, saved):
            self.trainer.saved_step = None
            self.save()  # of another run: from here on, this folder alone is enough to go on

    def _check_files(self, saved: checkpoint.Checkpoint) -> None:
        """What a checkpoint needs beside itself is in the folder, as it was when the checkpoint was
        written."""
        check_branch(self.folder, saved)
        if self.accelerator.is_main_process:
            take_tokenizer(self.folder, saved)
        self.accelerator.wait_for_everyone()
        checkpoint.check_digests(self.folder / "tokenizer", saved.state.get("tokenizer", {}))

    def _reporter(self) -> Reporter:
        tracker, names = None, self.config.log.trackers
        if names:
            try:
                self.accelerator.init_trackers("logs", config=flat(self.config.to_dict()))
            except Exception as error:  # each has its own: no login, no server, ...
                said = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(
                    f"log.trackers {', '.join(names)} could not start ({said}); mend that, or use"
                    " log.trackers=[]"
                ) from error
            tracker = self.accelerator
        main, progress = self.accelerator.is_main_process, self.config.log.progress
        return Reporter(self.folder, main, progress, tracker, self.check)

    # -- what the loop asks ------------------------------------------------------------------------

    def moment(self, stop: Stop) -> Moment:
        """The clock of the main process, and whether any process was asked to stop: the same answer
        on all."""
        seconds, stopped = self.clock.seconds(), stop.name is not None
        if self.accelerator.num_processes > 1:
            mine = torch.tensor(
                [seconds if self.accelerator.is_main_process else 0.0, float(stopped)],
                dtype=torch.float32,
            )
            both = self.accelerator.reduce(mine.to(self.accelerator.device), "sum")
            seconds, stopped = float(both[0]), bool(both[1] > 0)
        return Moment(
            seconds,
            spent(self.config.limits, self.trainer.done, self.trainer.tokens, seconds),
            stopped,
        )

    def due(self, what: str, moment: Moment) -> bool:
        """Whether it is time for "valid" or "save", by steps or by minutes."""
        plan = getattr(self.config, what)
        by_step = plan.every_steps is not None and self.trainer.done % plan.every_steps == 0
        by_time = (
            plan.every_minutes is not None
            and moment.seconds - self._last[what] >= 60 * plan.every_minutes
        )
        if by_step or by_time:
            self._last[what] = moment.seconds
        return by_step or by_time

    def log(self, report: StepReport, moment: Moment) -> None:
        """The step's record, and the bar."""
        now = self.clock.seconds()
        seconds, tokens = now - self._since[0] - self._paused, report.tokens - self._since[1]
        rate = tokens / max(seconds, 1e-9)
        left = now * (1 / moment.share - 1) if moment.share > 0 else float("inf")
        self.reporter.progress(moment.share, report.loss, rate, left, report.block_size)
        if report.step % self.config.log.every_steps:
            return
        self._since, self._paused = (now, report.tokens), 0.0
        self.reporter.write(
            "train", **asdict(report), tokens_per_second=rate, seconds=now, share=moment.share
        )
        if not self.reporter.has_bar and self.config.log.progress:
            self.reporter.say(
                f"step {report.step}  loss {report.loss:.4f} nats  block {report.block_size} "
                f" {rate:,.0f} tokens/s  {duration(left)} left"
            )

    # -- what the loop does now and then -----------------------------------------------------------

    def validate(self, share: float) -> None:
        """Bounds of the held-out windows under the averaged weights, sample text, and the schedule
        search."""
        start, trainer, plan = self.clock.seconds(), self.trainer, self.config.valid
        current, model = (
            sorted({trainer.noiser.block(n) for n in trainer.phase(share)}),
            trainer.model,
        )
        facts = {"tokens": trainer.tokens, "seconds": start}
        # left alone without dropout: a compiled trunk is not built twice
        model.train(model.training and not self.config.model.dropout)
        with trainer.averaged():
            if self.data.held is not None:
                sizes = {trainer.noiser.block(n) for n in plan.block_sizes or current}
                bounds = [
                    validate(
                        model,
                        self.data.held,
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
                    self.reporter.write("valid", trainer.done, **bound, **facts)
                    self.reporter.say(_sentence(trainer.done, bound))
                for size in current:
                    self._search(size, facts)
            self._sample(current[-1])
        model.train()
        self._validated = trainer.done
        self._paused += self.clock.seconds() - start

    def _search(self, size: int, facts: dict[str, Any]) -> None:
        trainer, noise = self.trainer, self.config.noise
        if not noise.search or self.data.held is None or size == 1:
            return
        rows = min(self.config.valid.batch_size, len(self.data.held.ids))
        look = Search(
            self.data.held,
            search_noiser(trainer.noiser, trainer.done),
            size,
            rows,
            self.accelerator,
        )
        found = look.run(trainer.model, trainer.scored, noise)
        trainer.intervals[size] = found.best
        self.reporter.write("search", trainer.done, block_size=size, **found.to_dict(), **facts)
        self.reporter.say(
            f"step {trainer.done}  blocks of {size}: mask rates"
            f" {found.best[0]:.2f}..{found.best[1]:.2f} have the least loss variance"
        )

    def _sample(self, size: int) -> None:
        if self.sampler is None or not self.accelerator.is_main_process:
            return
        try:
            text = self.sampler(self.trainer.model, self.data.tokenizer, size)
        except BdlmError as error:  # a sample is for looking at: training does not depend on it
            self.reporter.say(f"step {self.trainer.done}  no sample: {error}")
            return
        self.reporter.write("sample", self.trainer.done, text=text)
        self.reporter.say(f"step {self.trainer.done}  sample: {text[:200]!r}")

    def save(self) -> None:
        """A checkpoint of everything, unless this very state is saved. All processes take part; the
        main one writes."""
        start, trainer = self.clock.seconds(), self.trainer
        self.check()
        if trainer.saved_step == trainer.done:
            return
        groups, checkpoints = trainer.groups(), self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            state = {**trainer.state(), "seconds": start, "tokenizer": self.tokenizer_files}
            checkpoint.save(
                checkpoints,
                trainer.done,
                groups,
                state,
                self.config.save.keep,
                trainer.good_checkpoint,
            )
            self._complete_folder()
        trainer.last_checkpoint, trainer.saved_step = (
            checkpoint.folder_of(checkpoints, trainer.done),
            trainer.done,
        )
        self.accelerator.wait_for_everyone()
        self._paused += self.clock.seconds() - start

    def _complete_folder(self) -> None:
        """What a checkpoint needs to be gone on with, written again where it was deleted."""
        if not (self.folder / "config.json").exists():
            write_json(self.folder / "config.json", kept_config(self.config))
        if self.tokenizer_files and not (self.folder / "tokenizer").exists():
            self.data.tokenizer.save(self.folder / "tokenizer")

    def finish(self, stop: Stop, moment: Moment) -> TrainResult:
        """Save; when the budget is spent also validate, export the model and draw the curve."""
        self.save()
        trainer, model, reason = self.trainer, None, "done"
        if moment.stopped:
            reason = stop.name or "stopped"
            self.reporter.say(
                f"stopped by {reason} at step {trainer.done}; go on with resume=auto"
                f" out={self.folder}"
            )
        else:
            if self._validated != trainer.done:
                self.validate(min(moment.share, 1.0))
            self.check()
            model = str(self.folder / "model")
            self._export(Path(model))
            if self.accelerator.is_main_process and trainer.last_checkpoint:
                checkpoint.prune(trainer.last_checkpoint, self.config.save.keep)
        self.reporter.write(
            "event", trainer.done, event=reason, tokens=trainer.tokens, seconds=self.clock.seconds()
        )
        if self.accelerator.is_main_process and trainer.done >= self.config.log.every_steps:
            learning_curve(
                read_metrics(self.folder),
                self.folder / "curve.png",
                f"Learning curve of {self.folder.name}",
            )
        last = str(trainer.last_checkpoint)
        return TrainResult(
            str(self.folder),
            reason,
            trainer.done,
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
            facts = {"steps": self.trainer.done, "tokens": self.trainer.tokens, "valid": self.valid}
            said = export(
                self.trainer.model, weights, self.data.tokenizer, self.config, facts, folder
            )
            self.reporter.say(f"model in '{folder}': {said}")
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.reporter.close()
        if self.config.log.trackers:
            with suppress(OSError):  # the folder may be gone, which is said already
                self.accelerator.end_training()


def find_checkpoint(config: TrainConfig, main: bool = True) -> checkpoint.Checkpoint | None:
    """The checkpoint that `config.resume` asks for, read and verified; None to start anew.

    Raises CheckpointError for a damaged one, ConfigError when a new run would write over an old
    one."""
    folder = Path(config.out) / "checkpoints"
    if config.resume == "auto":
        damaged: list[str] = []
        saved = checkpoint.load_newest(folder, damaged)
        for message in damaged if main else ():
            tell(
                f"warning: {message.replace('use an earlier checkpoint', 'an earlier one is used')}"
            )
        return saved
    if config.resume == "never":
        if checkpoint.steps(folder):
            raise ConfigError(
                f"resume is 'never' but '{folder}' holds checkpoints; use resume=auto, or another"
                " folder with out=..."
            )
        return None
    path = Path(config.resume)
    if not path.is_dir():
        raise ConfigError(
            f"resume is {config.resume!r}, which is not a folder; use auto, never, or a checkpoint"
            " folder"
        )
    return checkpoint.load(path)


def check_limits(config: TrainConfig, state: Mapping[str, Any]) -> None:
    """Raise ConfigError for a limit that was lowered below what the run has behind it."""
    behind = {"steps": state["step"], "tokens": state["tokens"], "minutes": state["seconds"] / 60}
    for name, done in behind.items():
        limit = getattr(config.limits, name)
        if limit is not None and done > limit != state["config"]["limits"][name]:
            raise ConfigError(
                f"limits.{name} is {limit}, but the run in '{config.out}' is past that, at"
                f" {done:.6g} {name}; raise it, or begin another run with out=..."
            )


def _sentence(step: int, bound: dict[str, Any]) -> str:
    bits = bound["bits_per_byte"]
    per_byte = f", {bits:.3f} bits per byte" if bits is not None else ""
    error = "" if bound["stderr"] is None else f" ± {bound['stderr']:.4f}"
    return (
        f"step {step}  held out, blocks of {bound['block_size']}:"
        f" {bound['nats_per_token']:.4f}{error} nats per token, perplexity"
        f" {bound['perplexity']:.2f}{per_byte}"
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as dotted names and scalars, for trackers."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = (
                value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
            )
    return out


def main(words: list[str] | None = None) -> int:
    """`python -m bdlm.training.loop RECIPE field=value ...`; 0 = finished or stopped cleanly, 2 =
    something the user can mend."""
    words = sys.argv[1:] if words is None else words
    recipe = words[0] if words and "=" not in words[0] else None
    try:
        result = train(load_config(recipe, words[1:] if recipe else words))
    except BdlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
