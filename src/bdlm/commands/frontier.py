"""`bdlm frontier`: sweep decoders over their options, judge the texts, draw speed against
quality."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdlm.commands.terminal import console
from bdlm.core.errors import ConfigError, DataError
from bdlm.core.paths import user_path
from bdlm.core.validation import Count

if TYPE_CHECKING:
    from bdlm.api import LM
    from bdlm.harness.decoders import Point
    from bdlm.harness.frontier import Progress, Setup
    from bdlm.harness.judges import Judge
    from bdlm.harness.summary import Summary


@dataclass(frozen=True)
class Options:
    """Compare decoders of a model: the same prompts and seeds at every setting, tokens per forward
    and per second against quality.

    Quality is log generative perplexity less entropy under a judge. What is finished is kept: the
    same command goes on where it stopped, and with more decoders adds to the folder. Writes
    frontier.json, frontier.md and the figures frontier-calls.png, frontier-seconds.png and
    frontier-entropy.png."""

    model: str
    """Name or folder of a model."""
    out: str | None = None
    """Folder of the results: a new one, or one of a sweep with the same settings. Needed but for
    --list."""
    prompts: str = "shakespeare"
    """A .jsonl file with a field prompt, a text file with a prompt on each line, or shakespeare:
    openings of the held-out scenes."""
    decoders: tuple[str, ...] = ()
    """name, or name:option=value,value:option=value; default every decoder over its own values."""
    temperatures: tuple[float, ...] = (1.0,)
    """Each decoder is swept at each of them."""
    texts: Count = 64
    """Texts of each point: prompts x seeds."""
    seeds: Count = 4
    """Texts of each prompt."""
    max_new_tokens: Count = 256
    """Tokens of each text."""
    early_ends: bool = False
    """Let the model end a text early; entropies of unequal lengths compare badly."""
    batch: Count = 64
    """Texts written at once."""
    seed: int = 0
    """Of the first text."""
    judge: str = ""
    """Model folder (ours or of transformers), .gguf file, or smollm2; default the model itself at
    block size 1."""
    front_only: bool = False
    """Measure only the front of the sweep in --out (with --decoders, only theirs), for instance
    with another judge, other seeds or more texts; into a folder in it."""
    block_size: int | None = None
    """Tokens written at once; default the model's."""
    list: bool = False
    """Print the points (with --json, as JSON), measure nothing."""
    device: str = "cpu"
    """cpu, cuda, auto."""
    json: bool = False
    """Print the results as JSON."""


def run(options: Options) -> None:
    """Sweep, then write and print what came out."""
    from bdlm.api import load
    from bdlm.harness.decoders import points
    from bdlm.harness.frontier import Setup, sweep
    from bdlm.harness.prompts import chosen, read_prompts

    if options.texts % options.seeds:
        raise ConfigError(
            f"--texts is {options.texts} and --seeds {options.seeds}; texts are prompts x seeds, so"
            " use a multiple of the seeds"
        )
    if options.out is None and (options.front_only or not options.list):
        raise ConfigError(
            "bdlm frontier needs --out, the folder of the results; or --list, which measures"
            " nothing"
        )
    prompts = tuple(chosen(read_prompts(options.prompts), options.texts // options.seeds))
    setup = Setup(
        prompts,
        options.seeds,
        options.max_new_tokens,
        options.batch,
        options.seed,
        options.block_size,
        options.early_ends,
    )
    lm = load(options.model, device=options.device)
    wanted, left = points(lm, options.decoders, options.temperatures, **setup.request)
    folder = user_path(options.out or "", "--out")
    if options.front_only:
        folder, wanted, left = *_front(lm, options, folder, setup), []
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    if options.list:
        print(_listed(wanted, left, setup, options.json))
        return
    judge = _judge(options, lm)
    with _progress(len(wanted)) as progress:
        measured = sweep(lm, judge, wanted, setup, folder, progress)
    _write(measured, folder, left, options)


def _listed(points: list[Point], left: list[str], setup: Setup, as_json: bool) -> str:
    if as_json:
        facts = {"texts": setup.texts, "max_new_tokens": setup.max_new_tokens, "left_out": left}
        return json.dumps({"points": [point.to_json() for point in points], **facts})
    lines = [f"{p.decoder:<14} {p.setting:<20} temperature {p.temperature:g}" for p in points]
    return "\n".join(
        [*lines, f"{len(points)} points of {setup.texts} texts, {setup.max_new_tokens} tokens each"]
    )


def _judge(options: Options, lm: LM) -> Judge:
    from bdlm.harness.judges import OwnJudge, load_judge

    return load_judge(options.judge, options.device) if options.judge else OwnJudge(lm)


def _front(lm: LM, options: Options, out: Path, setup: Setup) -> tuple[Path, list[Any]]:
    """The points of the front of the sweep in `out`, and the folder in it for this run."""
    from bdlm.harness.decoders import REFERENCE, points
    from bdlm.harness.frontier import read_points, read_settings
    from bdlm.harness.summary import summarise

    done, settings = read_points(out), read_settings(out)
    if not done:
        raise DataError(f"{out} holds no finished point; run it without --front-only first")
    ahead = [row.point for row in summarise(done, settings).front if row.point.key != REFERENCE.key]
    if options.decoders:
        only = {
            p.decoder
            for p in points(lm, options.decoders, options.temperatures, **setup.request)[0]
        }
        ahead = [p for p in ahead if p.decoder in only]
    name = re.sub(r"[^A-Za-z0-9]+", "-", options.judge or "self").strip("-")
    return out / f"front-{name}-{setup.texts}", [REFERENCE, *ahead]


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A bar on a terminal, a line for each point elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, of, what: print(f"{done}/{of} {what}", file=sys.stderr, flush=True)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    last = TextColumn("{task.description}", markup=False)  # settings hold square brackets
    columns = (TextColumn("points"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), last)
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, of, what: bar.update(task, completed=done, total=of, description=what)


def _write(measured: list[Any], folder: Path, left: list[str], options: Options) -> None:
    """Results beside the points that they are made of; they change as points are added."""
    from bdlm.data.files import write_atomically
    from bdlm.harness.figures import VIEWS, draw
    from bdlm.harness.frontier import read_settings
    from bdlm.harness.summary import page, summarise

    summary = summarise(measured, read_settings(folder), left)
    write_atomically(
        folder / "frontier.json", (json.dumps(summary.to_json(), indent=1) + "\n").encode()
    )
    drawn = [draw(summary, name, folder / f"frontier-{name}.png").name for name in VIEWS]
    write_atomically(folder / "frontier.md", page(summary, command(options), drawn).encode())
    print(json.dumps(summary.to_json()) if options.json else _told(summary, folder))


def command(options: Options) -> str:
    """The command line that these options come from."""
    words = ["bdlm", "frontier"]
    for f in fields(options):
        value = getattr(options, f.name)
        if value == f.default or f.name in ("json", "list"):
            continue
        words.append("--" + f.name.replace("_", "-"))
        words += (
            []
            if value is True
            else [str(v) for v in value]
            if isinstance(value, tuple)
            else [str(value)]
        )
    return shlex.join(words)


def _told(summary: Summary, folder: Path) -> str:
    from bdlm.harness.summary import verdict

    return (
        f"{verdict(summary)}\n{len(summary.rows)} points, {len(summary.front)} on the front:"
        f" {folder}/frontier.md, .json and figures"
    )
