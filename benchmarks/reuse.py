"""Cost and savings of approximate caches on a whole-sequence model: the table of docs/decoders.md,
and how well a change of the queries predicts one of keys, values and attention.

    python -m benchmarks.reuse MODEL TEXTS [--texts 16] [--prompt 32] [--tokens 96] [--block 32]
    [--json]

MODEL: a folder of an MDLM model (`bdlm train demo ... --model.algo mdlm --block_sizes "[]"`).
TEXTS: JSONL; the first tokens of its documents are the prompts. Each line compares a cache with the
exact decoder (first-hitting, temperature 1, one token a forward pass). No time is measured."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.api import load
from bdlm.generation.full_sequence.approximate_cache import LayerCache
from bdlm.generation.full_sequence.engine import agreement, generate_full_sequence
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.dit import Block
from bdlm.models.layer_reuse import FullRefresh, LayerState, Mod, Rule, Table, Work

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("prefix", {}),
    ("prefix", {"refresh": 8}),
    ("dual", {}),
    ("dual", {"refresh": 8}),
    ("dllm", {}),
    ("dllm", {"every": 2}),
    ("dllm", {"every": 4, "rho": 0.5}),
    *((name, {"tau": tau}) for name in ("dare-kv", "dare-o") for tau in (0.001, 0.005, 0.02, 0.1)),
]


@dataclass(frozen=True)
class Drift:
    """A rule that computes everything and records how far each cell's query, key, value and
    attention moved since the last forward pass.

    moved: one [m, 4] a layer and forward pass: 1 - cosine of the query; relative changes of key,
    value and attention."""

    moved: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        block: Block,
        x: Tensor,
        mod: Mod,
        table: Table,
        kept: LayerState,
        cells: Tensor,
        work: Work,
    ) -> Tensor:
        before = [t.clone() for t in self._of(kept)]
        after = FullRefresh()(block, x, mod, table, kept, cells, work)
        now = self._of(kept)
        if bool(before[0].any()):
            turned = 1 - torch.cosine_similarity(now[0], before[0], dim=-1)
            change = [
                (b - a).norm(dim=-1) / a.norm(dim=-1)
                for a, b in zip(before[1:], now[1:], strict=True)
            ]
            self.moved.append(torch.stack((turned, *change), 1))
        return after

    @staticmethod
    def _of(kept: LayerState) -> list[Tensor]:
        return [t.transpose(1, 2).flatten(2)[0] for t in (kept.queries, kept.keys, kept.values)] + [
            kept.attention[0]
        ]


@dataclass(frozen=True)
class Watch(LayerCache):
    """The exact decoder under `Drift`."""

    drift: Drift = field(default_factory=Drift)

    def visit(self, call: Any, changed: Tensor) -> tuple[Tensor, Rule]:
        return torch.arange(len(changed), device=changed.device), self.drift


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Compute Spearman's coefficient."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("file", metavar="TEXTS")
    for name, value in (("texts", 16), ("prompt", 32), ("tokens", 96), ("block", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(argv)
    lm = load(chosen.model)
    documents = [
        json.loads(line)["text"]
        for line in Path(chosen.file).read_text(encoding="utf-8").splitlines()[: chosen.texts]
    ]
    first = [] if lm.spec.first_token is None else [lm.spec.first_token]
    prompts = [(first + lm.tokenizer.encode(text))[: chosen.prompt] for text in documents]
    params = SamplingParams(max_new_tokens=chosen.tokens, ignore_eos=True)
    rows = []
    for cache, options in RUNS:
        found = agreement(lm.model, prompts, params, cache, options=options, block=chosen.block)
        rows.append({"cache": cache, "options": options, **asdict(found)})
    watch = Watch()
    generate_full_sequence(lm.model, prompts[:4], params, watch, block=chosen.block)
    moved = torch.cat(watch.drift.moved)
    spearman = {
        name: rank_correlation(moved[:, 0], moved[:, i])
        for i, name in enumerate(("key", "value", "attention"), 1)
    }
    if chosen.json:
        print(json.dumps({"rows": rows, "spearman": spearman}, indent=1))
        return
    print(
        "| cache | computed | same draw, same canvas | total variation | KL, nats | same token,"
        " whole text |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        knobs = ", ".join(f"{k} {v:g}" for k, v in row["options"].items()) or "as published"
        cells = (
            f"{row['share']:.1%} | {row['drawn']:.2%} | {row['total_variation']:.4f} |"
            f" {row['kl']:.4f} | {row['tokens']:.1%}"
        )
        print(f"| {row['cache']} ({knobs}) | {cells} |")
    print(
        "\nrank correlation of the query's turn with the change of "
        + ", ".join(f"{k} {v:.2f}" for k, v in spearman.items())
    )


if __name__ == "__main__":
    main()
