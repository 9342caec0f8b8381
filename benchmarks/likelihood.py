"""The likelihood sheet of a model: what its bound hides at each block size, and what each estimator of the bound costs in noise.

    python -m benchmarks.likelihood --model shakespeare --data runs/corpus/heldout.jsonl

Prints the Markdown tables of docs/results.md; `--json` prints the rows. Every figure comes from `LM.evaluate` or `likelihood.variance`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import bdlm
from bdlm.commands.arguments import parse
from bdlm.data.packing import Packing, prepare
from bdlm.likelihood.bound import evaluate, fit_counts
from bdlm.likelihood.report import Report
from bdlm.likelihood.rows import rows_of


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
    passes: int = 128
    """Forwards of every window that each estimator gets."""
    noise_tokens: int = 8192
    """Tokens that the estimators are compared on."""
    json: bool = False
    """Print JSON."""


def gaps(lm: bdlm.LM, windows: Any, sizes: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """Bound and exact likelihood on the same windows, by block size, with the gap's own error over windows (the two are paired)."""
    rows = []
    for size in sizes:
        bound, exact = (_evaluate(lm, windows, tokens, block_size=size, method=m) for m in ("nelbo-exact", "exact"))
        gap, error = paired(bound, exact)
        rows.append({"block_size": size, "bound": bound.to_json(), "exact": exact.to_json(), "gap": gap, "gap_stderr": error})
    return rows


def _evaluate(lm: bdlm.LM, windows: Any, tokens: int, **options: Any) -> Report:
    return evaluate(lm.model, windows, max_tokens=tokens, tokenizer=lm.tokenizer, unit="window", **options)


def paired(one: Report, other: Report) -> tuple[float, float]:
    """Difference in nats per token and its standard error over the units that both scored."""
    tokens = torch.tensor(one.unit_tokens, dtype=torch.float64)
    difference = torch.tensor(one.unit_nats, dtype=torch.float64) - torch.tensor(other.unit_nats, dtype=torch.float64)
    mean = float(difference.sum() / tokens.sum())
    n = len(tokens)
    return mean, math.sqrt(float((difference - mean * tokens).square().sum()) * n / max(n - 1, 1)) / float(tokens.sum())


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
        found = _evaluate(lm, windows, tokens, estimator=kind, replicates=replicates, counts=counts)
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
    found = {
        "gaps": gaps(lm, windows, options.sizes, options.tokens),
        "estimators": estimators(lm, windows, fit_on, options.passes, options.noise_tokens),
    }
    print(json.dumps(found) if options.json else tables(found))


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| block size | passes | bound | exact | gap | perplexity of bound | of the exact law |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["gaps"]:
        bound, exact = row["bound"], row["exact"]
        lines.append(
            f"| {row['block_size']} | {exact['passes']} | {bound['nats_per_token']:.3f} ± {bound['stderr']:.3f} | "
            f"{exact['nats_per_token']:.3f} ± {exact['stderr']:.3f} | {row['gap']:.3f} ± {row['gap_stderr']:.3f} | "
            f"{bound['perplexity']:.1f} | {exact['perplexity']:.1f} |"
        )
    lines += ["", "| estimator | replicates | bound | Monte-Carlo error | of `time` |", "| --- | --- | --- | --- | --- |"]
    for row in found["estimators"]:
        error = row["of_time"] * math.sqrt(1 / (2 * (row["replicates"] - 1)) + 1 / (2 * (found["estimators"][0]["replicates"] - 1)))
        share = "1" if row is found["estimators"][0] else f"{row['of_time']:.2f} ± {error:.2f}"
        lines.append(f"| {row['estimator']} | {row['replicates']} | {row['nats_per_token']:.3f} | {row['noise']:.5f} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
