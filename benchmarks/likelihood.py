"""The likelihood sheet of a model: what its bound hides at each block size, and what each estimator of the bound costs in noise.

    python -m benchmarks.likelihood --model shakespeare --data runs/corpus/heldout.jsonl

Prints the Markdown tables of docs/results.md, each as it is done; `--json` prints the rows. Bound and exact figures are those of `bdlm
eval --method nelbo-exact` and `exact`, here from one set of passes.
"""

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
from bdlm.core.calls import extend, places, predict
from bdlm.core.estimators import enumerate_blocks
from bdlm.core.objectives import log_probs
from bdlm.core.statistics import ratio_estimate
from bdlm.core.types import Canvas, Denoiser
from bdlm.data.packing import Packing, prepare
from bdlm.likelihood.bound import device_of, evaluate, evaluating, fit_counts
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
    orders: tuple[int, ...] = (1, 4, 16)
    """Random orders of the bound between the two, at the largest block size, on the same tokens."""
    check: int = 4
    """Blocks whose figures are made once more from all orders of writing them, by cached calls."""
    passes: int = 128
    """Forwards of every window that each estimator gets."""
    noise_tokens: int = 8192
    """Tokens that the estimators are compared on."""
    json: bool = False
    """Print JSON."""


def gaps(lm: bdlm.LM, windows: Rows, sizes: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """Bound and exact likelihood of the same windows from the same passes, by block size. The gap is paired: its error is its own."""
    windows, rows = rows_of(windows, tokens), []
    for size in sizes:
        bound, exact, count = enumerated(lm.model, windows, size)
        estimates = {"bound": bound, "exact": exact, "gap": bound - exact}
        found = {name: ratio_estimate(nats, count) for name, nats in estimates.items()}
        values = {name: value for name, e in found.items() for name, value in ((name, e.mean), (f"{name}_stderr", e.stderr))}
        rows.append({"block_size": size, "passes": (1 << size) - 1, "tokens": windows.tokens, **values})
    return rows


def enumerated(model: Denoiser, windows: Rows, size: int, batch_rows: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of the bound and of the exact likelihood, and scored tokens, of each window, float64 [N]."""
    parts = []
    with evaluating(model):
        for _, part in windows.batches(batch_rows):
            part = part.to(device_of(model))
            found = enumerate_blocks(model, part.ids, part.where(Contiguous(size), model.spec.context), part.scored)
            parts.append(torch.stack([found.bound.sum(1), found.exact.sum(1), found.tokens.sum(1).double()]).cpu())
    bound, exact, count = torch.cat(parts, 1)
    return bound, exact, count


@torch.no_grad()
def checks(lm: bdlm.LM, windows: Rows, size: int, blocks: int) -> list[dict[str, Any]]:
    """Nats of whole blocks near the start of the first window, enumerated and by brute force over the n! orders of writing them.

    The orders take their probabilities from cached calls, as the sampler makes them, so neither the two-stream pass nor the programme over
    subsets takes part.
    """
    ids, rows = windows.ids[0], []
    found = enumerate_blocks(lm.model, ids[None], windows[slice(0, 1)].where(Contiguous(size), lm.spec.context), windows.scored[:1])
    order = torch.tensor(list(itertools.permutations(range(size))))
    for block in range(1, blocks + 1):
        nll, shown = _cached_nll(lm.model, ids, size, block), torch.zeros(len(order), dtype=torch.long)
        path = torch.zeros(len(order), dtype=torch.float64)
        for cell in order.unbind(1):
            path += nll[shown, cell]
            shown |= 1 << cell
        exact = math.log(len(order)) - float(path.neg().logsumexp(0))
        by_orders = {"bound_by_orders": float(path.mean()), "exact_by_orders": exact}
        rows.append({"block": block, "bound": float(found.bound[0, block]), "exact": float(found.exact[0, block]), **by_orders})
    return rows


def _cached_nll(model: Denoiser, ids: Tensor, size: int, block: int) -> Tensor:
    """-log p of each cell of a block given each set of the others, float64 [2^n - 1, n]; row S shows the cells whose bit is set."""
    sets, first = torch.arange((1 << size) - 1), block * size
    masked = (sets[:, None] >> torch.arange(size)) & 1 == 0
    cache, before = model.new_cache(len(sets), first + size), ids[:first].expand(len(sets), -1)
    extend(model, before, places(Contiguous(size), torch.arange(first).expand_as(before)), cache)
    target = ids[first : first + size].expand(len(sets), -1)
    canvas = Canvas(
        torch.where(masked, model.spec.mask_id, target),
        masked,
        places(Contiguous(size), torch.arange(first, first + size).expand_as(target)),
    )
    logits = predict(model, canvas, cache).logits
    assert logits is not None
    nll = -log_probs(logits, model.spec.mask_id).double().gather(1, target[masked][:, None])[:, 0]
    return torch.zeros(masked.shape, dtype=torch.float64).masked_scatter(masked, nll)


def between(lm: bdlm.LM, windows: Rows, size: int, orders: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """The bound of K random orders on the tokens of `gaps`, by K: K = 1 has the expectation of the NELBO, many have the exact law."""
    rows = []
    for count in orders:
        found = evaluate(lm.model, windows, max_tokens=tokens, method="k-orders", block_size=size, orders=count, replicates=1)
        rows.append({"block_size": size, "orders": count, "passes": found.passes, "nats_per_token": found.nats_per_token})
    return rows


def estimators(lm: bdlm.LM, windows: Any, fit_on: Any, passes: int, tokens: int) -> list[dict[str, Any]]:
    """Monte-Carlo error of the bound at equal passes, from independent replicates (known to 1 in sqrt(2 (replicates - 1)))."""
    kinds = ["time", "count", "complementary"]
    counts = None
    if fit_on is not None:
        counts = fit_counts(lm.model, fit_on)
        kinds.append("importance")
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        replicates = passes // 2 if kind == "complementary" else passes
        found = evaluate(lm.model, windows, max_tokens=tokens, estimator=kind, replicates=replicates, counts=counts)
        noise = found.stderr_monte_carlo or 0.0
        share = noise / rows[0]["noise"] if rows else 1.0
        rows.append({"estimator": kind, "nats_per_token": found.nats_per_token, "noise": noise, "replicates": replicates, "of_time": share})
    return rows


def main(words: Sequence[str] | None = None) -> None:
    import sys

    options = parse(Options, sys.argv[1:] if words is None else words, "python -m benchmarks.likelihood")
    lm = bdlm.load(options.model)
    packing = Packing(lm.spec.max_length, lm.tokenizer.eos_id is not None)
    windows = rows_of(prepare(list(options.data), lm.tokenizer, packing), unit="window")
    fit_on = prepare(list(options.fit_on), lm.tokenizer, packing) if options.fit_on else None
    made = {
        "gaps": lambda: gaps(lm, windows, options.sizes, options.tokens),
        "checks": lambda: checks(lm, windows, max(options.sizes), options.check),
        "orders": lambda: between(lm, windows, max(options.sizes), options.orders, options.tokens),
        "estimators": lambda: estimators(lm, windows, fit_on, options.passes, options.noise_tokens),
    }
    found = {}
    for name, make in made.items():
        found[name] = make()
        if not options.json:
            print(TABLES[name](found[name]), flush=True)
    if options.json:
        print(json.dumps(found))


def gap_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| block size | passes | bound | exact | gap | perplexity of bound | of the exact law |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row[name]:.3f} ± {row[name + '_stderr']:.3f}" for name in ("bound", "exact", "gap")]
        cells += [f"{math.exp(row[name]):.1f}" for name in ("bound", "exact")]
        lines.append(f"| {row['block_size']} | {row['passes']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def check_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| block | bound | by all orders | exact | by all orders |", "| --- | --- | --- | --- | --- |"]
    cells = [[f"{row[name]:.4f}" for name in ("bound", "bound_by_orders", "exact", "exact_by_orders")] for row in rows]
    return "\n".join(lines + [f"| {row['block']} | " + " | ".join(c) + " |" for row, c in zip(rows, cells, strict=True)]) + "\n"


def order_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| block size | random orders | passes | nats per token |", "| --- | --- | --- | --- |"]
    lines += [f"| {row['block_size']} | {row['orders']} | {row['passes']} | {row['nats_per_token']:.3f} |" for row in rows]
    return "\n".join(lines) + "\n"


def estimator_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| estimator | replicates | bound | Monte-Carlo error | of `time` |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        error = row["of_time"] * math.sqrt(1 / (2 * (row["replicates"] - 1)) + 1 / (2 * (rows[0]["replicates"] - 1)))
        share = "1" if row is rows[0] else f"{row['of_time']:.2f} ± {error:.2f}"
        lines.append(f"| {row['estimator']} | {row['replicates']} | {row['nats_per_token']:.3f} | {row['noise']:.5f} | {share} |")
    return "\n".join(lines) + "\n"


TABLES = {"gaps": gap_table, "checks": check_table, "orders": order_table, "estimators": estimator_table}


if __name__ == "__main__":
    main()
