"""Training speed and memory compared with the plain published algorithm, on the same weights, masks
and optimiser.

    bdlm bench train --json               the rows of the table in docs/performance.md
    python -m benchmarks.train --lengths  cost against the window's length, as a figure in
                                          runs/results/
    python -m benchmarks.train --native   this library alone: precision and torch.compile at the
                                          sizes of the shipped model

Each measurement runs in a process of its own. The two sides alternate, and a ratio is the median
over the rounds. Memory is the peak of resident memory in the steps after the first, minus what is
resident when the first step has ended (weights and optimiser state)."""

from __future__ import annotations

import json as json_
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bdlm.core.blockmap import Contiguous, make_layout, maskable
from bdlm.core.corruption import corrupt
from bdlm.core.objectives import total_nats
from bdlm.core.schedules import Linear
from bdlm.core.types import NoisedBatch
from bdlm.models.dit import DiT, DiTConfig
from bdlm.training.accelerator import keep_freed_memory
from benchmarks import common, plain


@dataclass(frozen=True)
class Case:
    """One row: its sizes and its goals. `vocab` counts the mask token.

    reference: tokens/s and MB above state of the authors' own training step, measured once on
    REFERENCE_MACHINE; None where it was not measured.
    target_speed, target_memory: the goals, as multiples of that reference."""

    vocab: int
    length: int
    block: int
    batch: int
    steps: int = 5
    hidden: int = 256
    layers: int = 8
    heads: int = 8
    reference: tuple[float, float] | None = None
    target_speed: float | None = None
    target_memory: float | None = None
    compile: bool = False
    bf16: bool = False
    # masked share of every block; None draws it from the linear schedule
    share: float | None = None

    @property
    def name(self) -> str:
        return f"vocabulary {self.vocab:,}, L={self.length}, L'={self.block}, batch {self.batch}"


# CPU and date of the `reference` figures of TABLE; None while there are none
REFERENCE_MACHINE: str | None = None
TABLE = (
    Case(50258, 256, 4, 2, 7, target_speed=4.0, target_memory=0.3),
    Case(50258, 1024, 4, 2, 3, target_speed=4.5, target_memory=0.2),
    Case(257, 256, 16, 4, 9, target_speed=1.6, target_memory=0.5),
)
LENGTHS = tuple(Case(257, n, 16, 1, 5 if n <= 1024 else 2) for n in (256, 512, 1024, 2048, 4096))
NATIVE = tuple(
    Case(1025, 256, size, 8, 6, compile=c, bf16=b, share=s)
    for size, s in ((1, 1.0), (8, None))
    for b in (False, True)
    for c in (False, True)
)


def batches(case: Case, count: int) -> list[NoisedBatch]:
    """Noised windows, the same for both sides."""
    layout, made = make_layout(Contiguous(case.block), case.length), []
    cells = maskable(layout).expand(case.batch, -1)
    for step in range(count):
        draw = torch.Generator().manual_seed(step)
        clean = torch.randint(case.vocab - 1, (case.batch, case.length), generator=draw)
        distribution = "all" if case.share == 1.0 else "time"
        row = torch.arange(case.batch)
        made.append(
            corrupt(
                clean,
                layout,
                cells,
                Linear(),
                seed=1,
                step=step,
                row=row,
                distribution=distribution,
                mask_id=case.vocab - 1,
            )
        )
    return made


def fill(model: nn.Module) -> None:
    """Set weights that depend on their names alone, so that both sides start equal."""
    for name, p in model.named_parameters():
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            p.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=draw)


class Ours:
    """This library's training pass."""

    def __init__(self, case: Case) -> None:
        self.model = DiT(
            DiTConfig(
                case.vocab,
                case.vocab - 1,
                case.hidden,
                case.layers,
                case.heads,
                64,
                case.length,
                case.block,
            )
        )
        if case.compile:
            self.model.compile_trunk()

    def loss(self, batch: NoisedBatch) -> Tensor:
        return total_nats(self.model, batch, batch.scored.sum())


class Plain:
    """The plain published algorithm."""

    def __init__(self, case: Case) -> None:
        self.model = plain.PlainDiT(
            case.vocab, case.hidden, case.layers, case.heads, 64, case.length, case.block
        )
        if case.compile:
            for block in self.model.backbone.blocks:
                block.compile(dynamic=False)

    def loss(self, batch: NoisedBatch) -> Tensor:
        return plain.training_loss(self.model, batch.noisy, batch.clean, batch.weight, batch.scored)


SIDES = {"ours": Ours, "plain": Plain}


def work(side: str, case: Case) -> dict[str, Any]:
    """Measure one side: seconds of each step, memory above the state, and the losses, which show
    that both sides compute the same."""
    torch.set_num_threads(common.THREADS)
    keep_freed_memory()  # as `bdlm train` does; both sides
    held, data = SIDES[side](case), batches(case, case.steps + 2)
    fill(held.model)
    held.model.train()
    optimiser = torch.optim.AdamW(held.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: NoisedBatch) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
            loss = held.loss(batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    losses = [step(data[0])]
    state = common.resident()
    common.reset_peak()
    seconds = []
    for batch in data[1:]:
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    top = common.peak()
    from torch.utils.flop_counter import FlopCounterMode

    flops = 0
    if not case.compile:
        with FlopCounterMode(display=False) as counter:
            step(data[1])
        flops = counter.get_total_flops()
    return {
        "seconds": seconds[1:],
        "memory": top - state,
        "state": state,
        "losses": losses,
        "flops": flops,
    }


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Measure one row of the table: both sides, alternating."""
    tokens = case.batch * case.length
    done: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for side, results in done.items():
            results.append(common.worker("benchmarks.train", {"side": side, "case": asdict(case)}))
    apart = max(
        abs(a - b) / abs(b)
        for a, b in zip(done["ours"][0]["losses"], done["plain"][0]["losses"], strict=True)
    )
    assert apart < 1e-3, (
        f"the two sides compute different losses: {done['ours'][0]['losses']} and"
        f" {done['plain'][0]['losses']}"
    )
    step = {side: [median(r["seconds"]) for r in results] for side, results in done.items()}
    memory = {side: median(r["memory"] for r in results) for side, results in done.items()}
    ours, theirs = median(step["ours"]), median(step["plain"])
    row = {
        "name": case.name,
        "ratio_tokens_per_second": median(
            b / a for a, b in zip(step["ours"], step["plain"], strict=True)
        ),
        "ratio_peak_memory": memory["ours"] / memory["plain"],
        "target_tokens_per_second": case.target_speed,
        "target_peak_memory": case.target_memory,
        "tokens_per_second": tokens / ours,
        "plain_tokens_per_second": tokens / theirs,
        "reference_tokens_per_second": case.reference and case.reference[0],
        "reference_peak_memory_mb": case.reference and case.reference[1],
        "reference_machine": REFERENCE_MACHINE,
        "peak_memory_mb": memory["ours"] / 1e6,
        "plain_peak_memory_mb": memory["plain"] / 1e6,
        "rounds": rounds,
        "ratios_of_rounds": [b / a for a, b in zip(step["ours"], step["plain"], strict=True)],
        "compile": case.compile,
        "loss_difference": apart,
    }
    if not case.compile:
        row["gflops"], row["plain_gflops"] = (
            done["ours"][0]["flops"] / ours / 1e9,
            done["plain"][0]["flops"] / theirs / 1e9,
        )
    return row


def run(cases: tuple[Case, ...], rounds: int) -> list[dict[str, Any]]:
    """Measure all rows, with their share of the machine's matrix-product peak."""
    best, rows = common.matmul_peak(), []
    for case in cases:
        row = compare(case, rounds)
        if "gflops" in row:
            row["share_of_peak"], row["plain_share_of_peak"] = (
                row["gflops"] / best,
                row["plain_gflops"] / best,
            )
        rows.append({**row, "matmul_peak_gflops": best, "machine": common.machine()})
        print(
            f"{case.name}: {row['ratio_tokens_per_second']:.2f} x tokens/s,"
            f" {row['ratio_peak_memory']:.2f} x memory",
            file=sys.stderr,
            flush=True,
        )
    return rows


def native(cases: tuple[Case, ...] = NATIVE) -> list[dict[str, Any]]:
    """Measure this library alone, by precision and compilation."""
    rows = []
    for case in cases:
        done = common.worker("benchmarks.train", {"side": "ours", "case": asdict(case)})
        rate = case.batch * case.length / median(done["seconds"])
        kind = {
            "precision": "bfloat16" if case.bf16 else "float32",
            "trunk": "compiled" if case.compile else "eager",
        }
        rows.append(
            {
                "name": case.name,
                **kind,
                "tokens_per_second": rate,
                "peak_memory_mb": done["memory"] / 1e6,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


QUICK = {"hidden": 32, "layers": 2, "heads": 2, "length": 32, "batch": 1, "steps": 2}
COLUMNS = {
    "name": "8 layers, width 256, 8 heads",
    "ratio_tokens_per_second": "tokens/s, ratio to plain",
    "ratio_peak_memory": "memory above state, ratio to plain",
    "tokens_per_second": "ours, tokens/s",
    "plain_tokens_per_second": "plain, tokens/s",
    "peak_memory_mb": "ours, MB",
    "plain_peak_memory_mb": "plain, MB",
    "reference_tokens_per_second": "reference, tokens/s",
    "reference_peak_memory_mb": "reference, MB",
    "target_tokens_per_second": "goal, times the reference's tokens/s",
    "target_peak_memory": "goal, times its memory",
    "share_of_peak": "ours, share of matmul peak",
    "plain_share_of_peak": "plain, share",
}


def draw(rows: list[dict[str, Any]], folder: Path, title: str) -> Path:
    """Draw cost against the window's length, with the numbers as JSON in a file next to the figure.
    title: what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.8))
    lengths = [row["length"] for row in rows]
    curves = (
        (0, "tokens_per_second", "this library"),
        (0, "plain_tokens_per_second", "plain published algorithm"),
        (1, "peak_memory_mb", "this library"),
        (1, "plain_peak_memory_mb", "plain published algorithm"),
        (2, "ratio_tokens_per_second", "tokens a second"),
        (2, "ratio_peak_memory", "memory"),
    )
    for number, (panel, key, told) in enumerate(curves):
        panels[panel].plot(
            lengths,
            [row[key] for row in rows],
            marker="o",
            color=f"C{number % 2 + 2 * (panel == 2)}",
            label=told,
        )
    heads = ("tokens a second", "peak memory above state (MB)", "this library over plain")
    for panel, head in zip(panels, heads, strict=True):
        common.dress(panel, "window length L (tokens)", head, lengths)
        panel.set_yscale("linear" if panel is panels[2] else "log")
    panels[2].set_ylim(bottom=0)
    return common.keep(
        figure, f"{title}; state: weights and optimiser", folder / "train_lengths.svg", rows
    )


def main(
    json: bool = False,
    quick: bool = False,
    lengths: bool = False,
    compile: bool = False,
    rounds: int = 3,
    figures: Path = common.FIGURES,
) -> list[dict[str, Any]]:
    """Measure and print. json: a JSON list instead of a table. quick: tiny sizes, to see that it
    runs.

    lengths: cost against L instead, drawn into `figures`. compile: compile the layers of both sides
    with torch.compile. Returns the rows."""
    cases = LENGTHS if lengths else TABLE
    if quick:
        kept = {"length", "batch"} if lengths else set()
        small = {name: value for name, value in QUICK.items() if name not in kept}
        cases, rounds = (
            tuple(
                replace(c, **small, vocab=min(c.vocab, 300))
                for c in (cases[:3] if lengths else cases)
            ),
            1,
        )  # type: ignore[arg-type]
    rows = run(tuple(replace(c, compile=compile) for c in cases), rounds)
    if lengths:
        rows, one = (
            [{"length": case.length, **row} for case, row in zip(cases, rows, strict=True)],
            cases[0],
        )
        sizes = (
            f"one training step of one window: {one.layers} layers, width {one.hidden}, vocabulary"
            f" {one.vocab}, L'={one.block}"
        )
        print(
            draw(
                rows,
                figures,
                f"{sizes}\nfloat32, {common.THREADS} threads, CPU, eager; median of {rounds}"
                " round(s)",
            ),
            file=sys.stderr,
        )
    common.show(rows, COLUMNS, json)
    if REFERENCE_MACHINE is not None and not json:
        print(f"\nreference: the authors' own code, measured on {REFERENCE_MACHINE}")
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        job = json_.loads(sys.argv[2])
        print(json_.dumps(work(job["side"], Case(**job["case"]))))
    elif "--native" in sys.argv:
        rows_ = native()
        print(
            json_.dumps(rows_)
            if "--json" in sys.argv
            else common.table(rows_, {k: k.replace("_", " ") for k in rows_[0]})
        )
    else:
        flags = {word.removeprefix("--") for word in sys.argv[1:]}
        main(**{name: True for name in flags})  # type: ignore[arg-type]
