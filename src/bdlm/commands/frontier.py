"""`bdlm frontier`: sweep decoders over their options, and plot speed against judged quality."""

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
    from bdlm.harness.frontier import Progress, SweepSettings
    from bdlm.harness.judges import Judge
    from bdlm.harness.summary import Summary
    from bdlm.harness.sweeps import SweepPoint


@dataclass(frozen=True)
class Options:
    """Compare decoders of a model on the same prompts and seeds: tokens per forward and per second
    against quality.

    Quality is log generative perplexity minus entropy, in nats per token, under a judge (a
    reference model). Finished points are kept: the same command resumes where it stopped, and with
    more decoders it adds to the folder. The command writes frontier.json, frontier.md and the
    figures frontier-forward-passes.png, frontier-seconds.png and frontier-entropy.png."""

    model: str
    """A model folder, or the name of a packaged model."""
    out: str | None = None
    """Folder for the results: a new one, or that of an earlier sweep with the same settings. Only
    --list does without it."""
    prompts: str = "shakespeare"
    """Prompts: a .jsonl file with a field prompt, a text file with one prompt per line, or
    shakespeare for the openings of the held-out scenes."""
    decoders: tuple[str, ...] = ()
    """Decoders to compare, each as name or name:option=value,value:option=value; default every
    decoder over its own values."""
    temperatures: tuple[float, ...] = (1.0,)
    """Sampling temperatures, 0 or more; each decoder is measured at each of them."""
    texts: Count = 64
    """Number of texts of each point, a multiple of --seeds, 1 or more."""
    seeds: Count = 4
    """Number of texts for each prompt, 1 or more."""
    max_new_tokens: Count = 256
    """Tokens of each text, 1 or more."""
    early_ends: bool = False
    """Let the model end a text early. Entropies of texts of unequal length are hard to compare."""
    batch_size: Count = 64
    """Texts generated at once, 1 or more."""
    seed: int = 0
    """Seed of the first text."""
    judge: str = ""
    """Reference model that scores the texts: a model folder (bdlm or transformers), a .gguf file,
    or smollm2; default the model itself at block size 1."""
    front_only: bool = False
    """Measure only the points on the front of the sweep in --out (with --decoders, only theirs),
    for example with another judge, other seeds or more texts. Results go to a subfolder."""
    block_size: Count | None = None
    """Tokens of a block, 1 or more; default the model's own."""
    list: bool = False
    """Print the points and measure nothing."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, cuda:N, or auto (cuda if there is one)."""
    json: bool = False
    """Print the results, or with --list the points, as JSON."""


def run(options: Options) -> None:
    """Sweep the decoders, then write and print the results."""
    from bdlm.api import load
    from bdlm.harness.frontier import SweepSettings, sweep
    from bdlm.harness.prompts import chosen, read_prompts
    from bdlm.harness.sweeps import points

    if options.texts % options.seeds:
        raise ConfigError(
            f"--texts is {options.texts} and --seeds is {options.seeds}; use a multiple of --seeds"
            " for --texts"
        )
    if options.out is None and (options.front_only or not options.list):
        raise ConfigError(
            "bdlm frontier needs --out, the folder for the results, or --list, which measures"
            " nothing"
        )
    prompts = tuple(chosen(read_prompts(options.prompts), options.texts // options.seeds))
    setup = SweepSettings(
        prompts,
        options.seeds,
        options.max_new_tokens,
        options.batch_size,
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


def _listed(points: list[SweepPoint], left: list[str], setup: SweepSettings, as_json: bool) -> str:
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


def _front(lm: LM, options: Options, out: Path, setup: SweepSettings) -> tuple[Path, list[Any]]:
    """The points of the front of the sweep in `out`, and the folder in it for this run."""
    from bdlm.harness.frontier import read_points, read_settings
    from bdlm.harness.summary import summarise
    from bdlm.harness.sweeps import REFERENCE, points

    done, settings = read_points(out), read_settings(out)
    if not done:
        raise DataError(
            f"--out {out} has no finished point; run the command without --front-only first"
        )
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
    """Show a progress bar on a terminal, and one line per point elsewhere."""
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
    """Write the results next to the points they are computed from, and print them."""
    from bdlm.data.files import write_atomically
    from bdlm.harness.figures import FIGURES, draw
    from bdlm.harness.frontier import read_settings
    from bdlm.harness.summary import page, summarise

    summary = summarise(measured, read_settings(folder), left)
    write_atomically(
        folder / "frontier.json", (json.dumps(summary.to_json(), indent=1) + "\n").encode()
    )
    drawn = [draw(summary, name, folder / f"frontier-{name}.png").name for name in FIGURES]
    write_atomically(folder / "frontier.md", page(summary, command(options), drawn).encode())
    print(json.dumps(summary.to_json()) if options.json else _told(summary, folder))


def command(options: Options) -> str:
    """Write the options as the command line that gives them."""
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
