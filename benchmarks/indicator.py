"""NI Sampling on one model: trains its indicator on runs of the teacher, and compares its agreement
with new runs to that of the threshold decoder.

    python -m benchmarks.indicator MODEL OUT [--runs 200] [--tokens 64] [--block-size 8] [--json]

OUT is where the indicator goes (for `--decoder ni --option indicator=OUT`). The teacher fills one
cell a call, the most confident one; its prompts are the openings of the held-out scenes, again with
other seeds as often as needed. Decoders are compared on `--tests` runs with seeds that the
indicator has not seen."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bdlm.api import load
from bdlm.harness.indicator import compare, teach, train_indicator
from bdlm.harness.prompts import openings

UNSEEN = 1_000_000  # first seed of the test runs


def measure(
    model: str,
    out: str,
    runs: int,
    tests: int,
    tokens: int,
    block_size: int | None,
    steps: int,
    temperature: float,
) -> dict[str, Any]:
    """Train and compare; returns the figures of the table."""
    lm = load(model)
    given = [lm.tokenizer.encode(p) for p in openings()]
    first = [] if lm.spec.first_token is None else [lm.spec.first_token]
    prompts = [first + given[i % len(given)] for i in range(max(runs, tests))]
    teacher = teach(lm.model, prompts[:runs], tokens, temperature, block_size=block_size)
    loss = train_indicator(lm.model, teacher, out, steps=steps)
    held_out = teach(lm.model, prompts[:tests], tokens, temperature, UNSEEN, block_size)
    points = [asdict(p) for p in compare(lm.model, held_out, out)]
    share = teacher.label(teacher.seen)[0].double().mean().item()
    return {
        "runs": runs,
        "states": len(teacher.seen.candidate),
        "already_right": share,
        "loss_nats": loss,
        "points": points,
    }


def table(points: Sequence[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    rows = [
        f"| {p['decoder']} | {p['tokens_per_forward']:.2f} | {p['agreement']:.3f} |"
        f" {p['same_blocks']:.3f} |"
        for p in points
    ]
    return "\n".join(
        [
            (
                "| decoder | tokens per forward | tokens as the teacher's | blocks without a"
                " difference |"
            ),
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--tests", type=int, default=46)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    as_json, threads = options.pop("json"), options.pop("threads")
    torch.set_num_threads(threads)
    facts = measure(**options)
    print(json.dumps(facts) if as_json else table(facts["points"]))


if __name__ == "__main__":
    main()
