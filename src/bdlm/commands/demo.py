"""`bdlm demo`: train a small model, measure it and the packaged one, and show a passage being
written.

Every run has its own folder, `runs/demo-N`. A run that was interrupted resumes where it stopped.
Nothing is overwritten."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from bdlm.commands import terminal
from bdlm.core.paths import user_path
from bdlm.core.validation import AtLeast, Count, Positive
from bdlm.training.config import TrainConfig, load_config

PROMPT = "ACT I, SCENE I. A heath near the sea.\n\n[Thunder. Enter MACBETH and VIOLA.]\n\nVIOLA:\n"


@dataclass(frozen=True)
class Options:
    """Train a small block diffusion model on Shakespeare, report its likelihood on held-out plays,
    and write a passage."""

    minutes: Positive = 2.5
    """Training time in minutes, above 0."""
    tokens: Annotated[int, AtLeast(2)] = 4000
    """Number of held-out tokens to measure on, 2 or more."""
    max_new_tokens: Count = 200
    """Length of the passage in tokens, 1 or more."""
    prompt: str = PROMPT
    """Beginning of the passage."""
    seed: int = 1
    """Seed of the passage."""
    decoder: str = "eb"
    """Decoder of the passage; eb first fills the positions where the model is most confident."""
    temperature: Annotated[float, AtLeast(0, "use 0 (greedy) or more, a finite number")] = 0.7
    """Temperature of the passage, 0 (greedy) or more. With eb, 0.7 gave the packaged model's best
    texts in a sweep from 0.6 to 1 (docs/decoders.md)."""
    out: str = "runs"
    """Folder in which the demo creates its own folder, demo-N."""
    option: tuple[str, ...] = ()
    """Fields of the training recipe to change, as name=value; may be repeated."""


def run(options: Options) -> None:
    """Train, measure, write a passage, and print where the files are."""
    from rich.text import Text

    from bdlm.api import load
    from bdlm.data.shakespeare import write_corpus
    from bdlm.generation.sampling_params import sampling_params
    from bdlm.models.model_folder import packaged

    sampling_params(**_request(options))  # a mistake is reported before the training, not after it
    console, folder = terminal.console(), next_folder(user_path(options.out, "--out"))
    data = folder / "data"
    config = _config(options, folder, data)
    console.rule(Text.assemble(("bdlm demo", "bold"), f"  {folder}"))
    write_corpus(data)
    model = _train(options, config, console)
    found = {"trained just now": load(model)}
    if "shakespeare" in packaged():
        found["packaged: shakespeare"] = load("shakespeare")
    console.rule(Text("2. Likelihood of two held-out plays", style="bold"))
    report = [
        facts
        for name, lm in found.items()
        for facts in _measure(name, lm, data / "heldout.jsonl", options.tokens, console)
    ]
    console.print(_table(report))
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    name, writer = list(found.items())[-1]
    console.rule(
        Text(
            f"3. A passage written in blocks of {writer.spec.block_size} by the model {name}",
            style="bold",
        )
    )
    _write(options, writer, folder, console)
    _close(folder, model, console)


def next_folder(out: Path) -> Path:
    """Choose `out/demo-N`: the newest one if its training was interrupted, else a new one."""
    numbers = [int(p.name[5:]) for p in out.glob("demo-*") if p.name[5:].isdigit()]
    newest = max(numbers, default=0)
    if newest and not (out / f"demo-{newest}" / "model" / "config.json").is_file():
        return out / f"demo-{newest}"
    return out / f"demo-{newest + 1}"


def _config(options: Options, folder: Path, data: Path) -> TrainConfig:
    chosen = [
        f"data.train={data / 'train.jsonl'}",
        f"data.valid={data / 'valid.jsonl'}",
        f"out={folder}",
    ]
    return load_config("demo", [*chosen, f"limits.minutes={options.minutes}", *options.option])


def _train(options: Options, config: TrainConfig, console: Any) -> str:
    from rich.text import Text

    from bdlm.api import train

    console.rule(Text("1. Training", style="bold"))
    plan = (
        f"36 plays, two more held out, about {options.minutes:g} minutes; blocks of 1, then 4,"
        " then 8"
    )
    console.print(f"{plan}. Ctrl-C stops; the same command resumes.")
    result = train(config)
    if result.model is None:
        raise KeyboardInterrupt
    return result.model


def _measure(name: str, lm: Any, heldout: Path, tokens: int, console: Any) -> list[dict[str, Any]]:
    """Measure the bound at the model's block size, and the exact likelihood at block size 1."""
    from rich.text import Text

    facts = []
    for size in (lm.spec.block_size, 1):
        # a spinner of characters that every encoding has
        with console.status(Text(f"{name}: blocks of {size}"), spinner="line"):
            score = lm.evaluate(heldout, block_size=size, max_tokens=tokens)
        facts.append({"model": name, "parameters": lm.parameters, **score.to_json()})
    return facts


def _table(report: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(
        "model", "parameters", "blocks of", "nats per token", "perplexity", "bits per byte", ""
    )
    for row in report:
        sign, kind = ("", "exact") if row["block_size"] == 1 else ("≤ ", "bound")
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
        nats = f"{sign}{row['nats_per_token']:.3f}{error}"
        cells = (nats, f"{sign}{row['perplexity']:.1f}", f"{sign}{row['bits_per_byte']:.3f}", kind)
        table.add_row(row["model"], f"{row['parameters']:,}", str(row["block_size"]), *cells)
    tokens = max(row["tokens"] for row in report)
    table.caption = (
        f"about {tokens:,} tokens of Macbeth and Twelfth Night, both held out; ± is one standard"
        " error"
    )
    return table


def _request(options: Options) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name in ("max_new_tokens", "seed", "decoder", "temperature")
    }


def _write(options: Options, lm: Any, folder: Path, console: Any) -> None:
    from rich.text import Text

    from bdlm.commands.live import show

    result = show(lm, options.prompt, **_request(options))
    (folder / "passage.txt").write_text(options.prompt + result.text + "\n", encoding="utf-8")
    rate = result.tokens / max(result.seconds, 1e-9)
    said = (
        f"{result.tokens} tokens, {result.forward_passes} forward passes, {result.seconds:.1f} s"
        f" ({rate:,.0f} tokens a second)"
    )
    console.print(Text(f"\n{said}", style="dim"))


def _close(folder: Path, model: str, console: Any) -> None:
    from rich.text import Text

    console.rule(Text("Files", style="bold"))
    rows = {
        model: "the model trained just now",
        f"{folder}/curve.png": "its learning curve",
        f"{folder}/report.json": "the likelihoods above",
        f"{folder}/passage.txt": "the passage",
    }
    width = max(map(len, rows))
    for path, what in rows.items():
        console.print(f"  {path:<{width}}  {what}", soft_wrap=True)
    own, made, recipe = terminal.program(), shlex.quote(model), shlex.quote(f"{folder}/config.json")
    console.print(
        f"\nnext:  {own} generate --model {made} --prompt 'KING LEAR' --decoder eb --temperature"
        " 0.7 --live",
        soft_wrap=True,
    )
    console.print(f"       {own} train {recipe} --max-minutes 10", soft_wrap=True)
