"""The log of a run: lines of metrics, a progress bar, accelerate's trackers, a learning curve.

In: dictionaries of plain values. Out: `metrics.jsonl` (one JSON object a line; `kind` is "train",
"valid", "search", "sample" or "event"), a terminal bar, tracker scalars, a PNG. Losses are in nats
per token. Knows nothing about models."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bdlm.core.errors import DataError
from bdlm.data.files import write_figure

Record = dict[str, Any]


class RunLog:
    """Writes the records of a run to its file, its trackers and the terminal. `main` False (other
    processes): does nothing.

    check: called before each record is written; raises where the folder no longer belongs to the
    run."""

    def __init__(
        self,
        folder: Path,
        main: bool = True,
        progress: bool = False,
        tracker: Any = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._main = main
        self._tracker = tracker
        self._check = check
        self._bar = (
            _Bar() if main and progress and sys.stderr is not None and sys.stderr.isatty() else None
        )
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            self._close_line()

    def _close_line(self) -> None:
        """End a last line that a kill cut short, so that the next record starts on its own line."""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as stream:
                stream.seek(-1, 2)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one record to the file, and its numbers to the trackers."""
        if not self._main:
            return
        self._check()
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._tracker is not None:
            numbers = {
                f"{kind}/{k}": v
                for k, v in values.items()
                if isinstance(v, (int, float)) and not isinstance(v, bool)
            }
            if numbers:
                self._tracker.log(numbers, step=step)

    def progress(
        self,
        share: float,
        loss: float,
        tokens_per_second: float,
        seconds_left: float,
        block_size: int,
    ) -> None:
        """Move the bar, if there is one."""
        if self._bar is not None:
            self._bar.move(share, loss, tokens_per_second, seconds_left, block_size)

    def say(self, text: str) -> None:
        """Print a line for the user. Training continues when the reader of the output has gone."""
        if self._main:
            if self._bar is not None:
                with suppress(OSError):
                    self._bar.bar.console.print(text, markup=False, highlight=False)
            else:
                print_stderr(text)

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.bar.stop()


def print_stderr(text: str) -> None:
    """Print a line on stderr. If its reader has gone, this and all later lines are dropped and the
    program continues."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        # otherwise the rest of the buffer turns the exit code into 120
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except OSError:
        pass


class _Bar:
    """The terminal's progress bar (rich). It never hides the cursor, so training cannot leave the
    terminal without one."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        class Plain(Console):
            def show_cursor(self, show: bool = True) -> bool:
                return False

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.bar = Progress(*columns, console=Plain(stderr=True))
        self.task = self.bar.add_task("training", total=1.0, text="")
        self.bar.start()

    def move(
        self,
        share: float,
        loss: float,
        tokens_per_second: float,
        seconds_left: float,
        block_size: int,
    ) -> None:
        text = (
            f"loss {loss:.3f} nats  block {block_size}  {tokens_per_second:,.0f} tokens/s "
            f" {duration(seconds_left)} left"
        )
        self.bar.update(self.task, completed=min(share, 1.0), text=text)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds, as short as possible."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {whole % 60:02d} s"
        if minutes
        else f"{whole} s"
    )


def read_metrics(path: Path) -> list[Record]:
    """Read the records of `metrics.jsonl` in order of step; where a resumed run repeated steps, the
    last record is kept.

    path: the file, or the run's folder. Lines cut short by a kill are skipped. Raises DataError
    when there is no such file."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no metrics at '{path}'; name a run folder or its metrics.jsonl")
    kept: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record and "step" in record:
            kept[
                (
                    record["step"],
                    record["kind"],
                    record.get("block_size") if record["kind"] in ("valid", "search") else None,
                )
            ] = record
    return sorted(kept.values(), key=lambda r: r["step"])


def learning_curve(records: list[Record], path: Path, title: str = "Learning curve") -> Path:
    """Draw loss against tokens as a self-contained PNG. Returns its path. Raises DataError when
    nothing was logged."""
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    if not train and not valid:
        raise DataError(
            "the metrics hold no training or validation losses; train for at least log.every_steps"
            " steps"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(
            [r["tokens"] for r in train],
            [r["loss"] for r in train],
            color="0.8",
            linewidth=0.8,
            label="training batch",
        )
        axes.plot(
            [r["tokens"] for r in train],
            _smooth([r["loss"] for r in train]),
            color="0.4",
            linewidth=1.2,
            label="training, running mean",
        )
    for size in sorted({r["block_size"] for r in valid}):
        of_size = [r for r in valid if r["block_size"] == size]
        axes.errorbar(
            [r["tokens"] for r in of_size],
            [r["nats_per_token"] for r in of_size],
            yerr=[r["stderr"] or 0.0 for r in of_size],
            marker="o",
            markersize=3,
            capsize=2,
            label=f"validation, blocks of {size}",
        )
    _mark_phases(axes, train)
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.text(0.01, -0.01, _caption(train, valid), fontsize=8, va="top", wrap=True)
    write_figure(path, figure, tight=True)
    return path


def _mark_phases(axes: Any, train: list[Record]) -> None:
    """Draw a dashed line where a block size is first trained on."""
    seen: set[int] = set()
    for record in train:
        if record["block_size"] in seen:
            continue
        seen.add(record["block_size"])
        if len(seen) > 1:
            axes.axvline(record["tokens"], color="0.6", linestyle="--", linewidth=0.8)
            axes.annotate(
                f"from here blocks of {record['block_size']}",
                (record["tokens"], 0.98),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                rotation=90,
                va="top",
                ha="right",
            )


def _caption(train: list[Record], valid: list[Record]) -> str:
    text = (
        "Loss against tokens seen. Grey: logged training batches and their running mean (training"
        " estimator, one draw of the noise each)."
    )
    if valid:
        last = valid[-1]
        text += (
            "\nPoints: upper bound on the negative log-likelihood of held-out windows under the"
            f" averaged weights; bars: one standard error.\nLast: {last['nats_per_token']:.3f} ±"
            f" {last['stderr'] or 0.0:.3f} nats per token with blocks of {last['block_size']},"
            f" after {last['tokens']:,} tokens."
        )
    return text


def _smooth(values: list[float]) -> list[float]:
    """Compute the exponential running mean over a twentieth of the values (2 to 20), corrected for
    its start."""
    span = min(20, max(2, len(values) // 20))
    mean = 0.0
    weight = 0.0
    out = []
    for value in values:
        mean += (value - mean) / span
        weight += (1 - weight) / span
        out.append(mean / weight)
    return out
