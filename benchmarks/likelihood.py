"""Likelihood of a model: how far its bound lies from it at each block size, and how noisy each
estimator of the bound is.

    python -m benchmarks.likelihood --model shakespeare --data runs/corpus/heldout.jsonl

Prints the Markdown tables of docs/results.md, each as it is done; `--json` prints the rows. All of
them come from one set of passes, over every masked set of every block: a block's loss depends on
its own set alone, so draws of an estimator, and of orders, are looked up. Bound and exact figures
are those of `bdlm eval --method nelbo-exact` and `exact`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bdlm
from bdlm.commands.arguments import parse
from bdlm.core.blockmap import Contiguous
from bdlm.core.counts import CountDistribution
from bdlm.core.estimators import Grid, enumerate_blocks, revealed_sets, summed_sets
from bdlm.core.forward import extend, layout_at, predict
from bdlm.core.objectives import log_probs
from bdlm.core.schedules import SCHEDULES
from bdlm.core.statistics import mean_estimate, ratio_estimate
from bdlm.core.types import Canvas, Denoiser, Layout, NoisedBatch
from bdlm.data.packing import Packing, prepare
from bdlm.likelihood.bound import device_of, evaluating, fit_counts
from bdlm.likelihood.methods import Draw, noise
from bdlm.likelihood.rows import Rows, rows_of


@dataclass(frozen=True)
class Options:
    """Measure bound, likelihood and estimators of one model."""

    model: str = "shakespeare"
    """Name or folder of a model."""
    data: tuple[str, ...] = ()
    """Text that the model was not trained on."""
    fit_on: tuple[str, ...] = ()
    """Other text, to fit importance-sampled counts on; without it they are left out."""
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Block sizes to enumerate."""
    tokens: int = 4096
    """Tokens whose blocks are enumerated."""
    orders: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    """Random orders of the bound between the two, at the largest block size."""
    check: int = 4
    """Blocks that are computed a second time from all orders of writing them, by cached forward
    passes."""
    passes: int = 64
    """Forward passes of each window for which the errors of the estimators are stated, at the
    largest block size."""
    replicates: int = 1000
    """Draws of each estimator from which its error is computed."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Remembered:
    """Windows with the losses of every masked set of their blocks. nll: float32 [2^n - 1, R, B, n],
    by revealed set as bits."""

    rows: Rows
    where: Layout
    grid: Grid
    nll: Tensor

    @classmethod
    def of(cls, model: Denoiser, windows: Rows, size: int, batch_size: int = 16) -> Remembered:
        parts, device = [], device_of(model)
        with evaluating(model):
            for _, part in windows.batches(batch_size):
                part = part.to(device)
                sets = revealed_sets(
                    model, part.ids, part.layout(Contiguous(size), model.spec.context), part.scored
                )
                parts.append(torch.stack([nll.float() for _, nll in sets]).cpu())
        layout = windows.layout(Contiguous(size), model.spec.context)
        return cls(windows, layout, Grid.of(layout, windows.scored), torch.cat(parts, 1))

    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Nats of the bound and of the exact likelihood, and scored tokens, of each window, float64
        [R]."""
        found = summed_sets(enumerate(self.nll.double()), self.grid.sizes)
        return found.bound.sum(1), found.exact.sum(1), found.tokens.sum(1).double()

    def drawn(self, noised: NoisedBatch) -> float:
        """The estimate that a draw of noise makes of the bound, nats per token; its pairs are added
        up."""
        total, (rows, block, column) = 0.0, (len(self.rows), self.grid.block, self.grid.column)
        for masked, weight in zip(
            noised.masked.split(rows), noised.weight.split(rows), strict=True
        ):
            shown = (self.rows.scored & ~masked).long() << column
            sets = (
                torch.zeros_like(self.grid.sizes)
                .scatter_add_(1, block, shown)
                .gather(1, block)
                .clamp(max=len(self.nll) - 1)
            )
            nll = self.nll[sets, torch.arange(rows)[:, None], block, column]
            total += float((weight * nll)[masked].double().sum())
        return total / self.rows.tokens

    def by_orders(self, count: int, seed: int) -> float:
        """-log of the mean probability over `count` random orders of writing each block, nats per
        token."""
        sizes, widest = self.grid.sizes, self.nll.shape[-1]
        keys = torch.rand(
            count, *sizes.shape, widest, generator=torch.Generator().manual_seed(seed)
        )
        order = torch.where(torch.arange(widest) < sizes[..., None], keys, 2.0).argsort(-1)
        shown, path = (
            torch.zeros(order.shape[:-1], dtype=torch.long),
            torch.zeros(order.shape[:-1], dtype=torch.float64),
        )
        row, block = torch.meshgrid(
            torch.arange(sizes.shape[0]), torch.arange(sizes.shape[1]), indexing="ij"
        )
        for place, cell in enumerate(order.unbind(-1)):
            real = place < sizes
            path += torch.where(
                real, self.nll[shown.clamp(max=len(self.nll) - 1), row, block, cell], 0
            )
            shown |= real.long() << cell
        return float((math.log(count) - path.neg().logsumexp(0)).sum()) / self.rows.tokens


def gap(seen: Remembered, size: int) -> dict[str, Any]:
    """Bound and exact likelihood of the same windows. The gap is paired: its error is its own."""
    bound, exact, count = seen.estimates()
    found = {
        name: ratio_estimate(nats, count)
        for name, nats in {"bound": bound, "exact": exact, "gap": bound - exact}.items()
    }
    values = {
        name: value
        for name, e in found.items()
        for name, value in ((name, e.mean), (f"{name}_stderr", e.stderr))
    }
    return {"block_size": size, "passes": (1 << size) - 1, "tokens": seen.rows.tokens, **values}


@torch.no_grad()
def checks(lm: bdlm.LM, windows: Rows, size: int, blocks: int) -> list[dict[str, Any]]:
    """Nats of whole blocks near the start of the first window, enumerated and by brute force over
    the n! orders of writing them.

    The orders take their probabilities from cached forward passes, as the sampler does. Neither the
    two-stream pass nor the recursion over subsets takes part."""
    ids, rows = windows.ids[0], []
    found = enumerate_blocks(
        lm.model,
        ids[None],
        windows[slice(0, 1)].layout(Contiguous(size), lm.spec.context),
        windows.scored[:1],
    )
    order = torch.tensor(list(itertools.permutations(range(size))))
    for block in range(1, blocks + 1):
        nll, shown = (
            _cached_nll(lm.model, ids, size, block),
            torch.zeros(len(order), dtype=torch.long),
        )
        path = torch.zeros(len(order), dtype=torch.float64)
        for cell in order.unbind(1):
            path += nll[shown, cell]
            shown |= 1 << cell
        exact = math.log(len(order)) - float(path.neg().logsumexp(0))
        by_orders = {"bound_by_orders": float(path.mean()), "exact_by_orders": exact}
        rows.append(
            {
                "block": block,
                "bound": float(found.bound[0, block]),
                "exact": float(found.exact[0, block]),
                **by_orders,
            }
        )
    return rows


def _cached_nll(model: Denoiser, ids: Tensor, size: int, block: int) -> Tensor:
    """-log p of each cell of a block given each set of the others, float64 [2^n - 1, n]; row S
    shows the cells whose bit is set."""
    sets, first = torch.arange((1 << size) - 1), block * size
    masked = (sets[:, None] >> torch.arange(size)) & 1 == 0
    cache, before = model.new_cache(len(sets), first + size), ids[:first].expand(len(sets), -1)
    extend(model, before, layout_at(Contiguous(size), torch.arange(first).expand_as(before)), cache)
    target = ids[first : first + size].expand(len(sets), -1)
    canvas = Canvas(
        torch.where(masked, model.spec.mask_id, target),
        masked,
        layout_at(Contiguous(size), torch.arange(first, first + size).expand_as(target)),
    )
    logits = predict(model, canvas, cache).logits
    assert logits is not None
    nll = -log_probs(logits, model.spec.mask_id).double().gather(1, target[masked][:, None])[:, 0]
    return torch.zeros(masked.shape, dtype=torch.float64).masked_scatter(masked, nll)


def between(
    seen: Remembered, size: int, orders: Sequence[int], replicates: int = 16
) -> list[dict[str, Any]]:
    """The bound of K random orders, by K: that of one order has the NELBO as its mean, that of many
    the exact likelihood."""
    rows = []
    for count in orders:
        found = mean_estimate(
            torch.tensor([seen.by_orders(count, seed) for seed in range(replicates)])
        )
        rows.append(
            {
                "block_size": size,
                "orders": count,
                "passes": count * size,
                "nats_per_token": found.mean,
                "stderr": found.stderr,
            }
        )
    return rows


def estimators(
    lm: bdlm.LM, seen: Remembered, counts: CountDistribution | None, passes: int, replicates: int
) -> list[dict[str, Any]]:
    """Monte-Carlo error of the bound after so many passes, from independent stratified draws (known
    to 1 in sqrt(2 replicates))."""
    rows: list[dict[str, Any]] = []
    for kind in ("time", "count", "complementary", *(["importance"] if counts else [])):
        draws = [
            seen.drawn(
                noise(
                    lm.spec,
                    seen.rows,
                    seen.where,
                    Draw(0, number, len(seen.rows), 0),
                    kind,
                    SCHEDULES["linear"],
                    counts,
                )
            )
            for number in range(replicates)
        ]
        cost, values = 2 if kind == "complementary" else 1, torch.tensor(draws, dtype=torch.float64)
        error = float(values.std()) * math.sqrt(cost / passes)
        share = error / rows[0]["noise"] if rows else 1.0
        rows.append(
            {
                "estimator": kind,
                "nats_per_token": float(values.mean()),
                "noise": error,
                "draws": replicates,
                "of_time": share,
            }
        )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    import sys

    options = parse(
        Options, sys.argv[1:] if words is None else words, "python -m benchmarks.likelihood"
    )
    lm = bdlm.load(options.model)
    packing = Packing(lm.spec.max_length, lm.tokenizer.eos_id is not None)
    windows = rows_of(prepare(list(options.data), lm.tokenizer, packing), options.tokens, "window")
    found: dict[str, list[dict[str, Any]]] = {"gaps": []}
    for size in sorted(options.sizes):
        seen = Remembered.of(lm.model, windows, size)  # the last is the largest
        found["gaps"].append(gap(seen, size))
    show = lambda name: None if options.json else print(TABLES[name](found[name]), flush=True)
    show("gaps")
    found["checks"] = checks(lm, windows, size, options.check)
    show("checks")
    found["orders"] = between(seen, size, options.orders)
    show("orders")
    counts = (
        fit_counts(lm.model, prepare(list(options.fit_on), lm.tokenizer, packing), block_size=size)
        if options.fit_on
        else None
    )
    found["estimators"] = estimators(lm, seen, counts, options.passes, options.replicates)
    show("estimators")
    if options.json:
        print(json.dumps(found))


def gap_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        (
            "| block size | passes | bound | exact | gap | perplexity of bound | of the exact"
            " distribution |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            f"{row[name]:.3f} ± {row[name + '_stderr']:.3f}" for name in ("bound", "exact", "gap")
        ]
        cells += [f"{math.exp(row[name]):.1f}" for name in ("bound", "exact")]
        lines.append(f"| {row['block_size']} | {row['passes']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def check_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| block | bound | by all orders | exact | by all orders |",
        "| --- | --- | --- | --- | --- |",
    ]
    cells = [
        [f"{row[name]:.4f}" for name in ("bound", "bound_by_orders", "exact", "exact_by_orders")]
        for row in rows
    ]
    return (
        "\n".join(
            lines
            + [
                f"| {row['block']} | " + " | ".join(c) + " |"
                for row, c in zip(rows, cells, strict=True)
            ]
        )
        + "\n"
    )


def order_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| block size | random orders | passes | nats per token |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['block_size']} | {row['orders']} | {row['passes']} |"
            f" {row['nats_per_token']:.3f} ± {row['stderr']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def estimator_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| estimator | mean of the draws | Monte-Carlo error | of `time` |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        share = (
            "1"
            if row is rows[0]
            else f"{row['of_time']:.2f} ± {row['of_time'] / math.sqrt(row['draws']):.2f}"
        )
        lines.append(
            f"| {row['estimator']} | {row['nats_per_token']:.3f} | {row['noise']:.5f} | {share} |"
        )
    return "\n".join(lines) + "\n"


TABLES = {
    "gaps": gap_table,
    "checks": check_table,
    "orders": order_table,
    "estimators": estimator_table,
}


if __name__ == "__main__":
    main()
