"""Quality of the shipped model: its likelihood on two held-out plays, compared with an
autoregressive model, a 5-gram and xz.

    python -m benchmarks.shipped MODEL [--ar FOLDER] [--json]

This prints the table of docs/performance.md and of the model card. MODEL is a model folder or a
packaged name. FOLDER holds an autoregressive model of the same sizes trained on equally many
tokens: `bdlm train shakespeare ... --model.algo ar --model.block_size 1 --block_sizes "[]"
--limits.tokens N`. All are scored on the same tokens: every held-out scene, end of text included,
first token given."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from bdlm.api import LM, load
from bdlm.data.shakespeare import write_corpus
from bdlm.likelihood.baselines import KneserNey, xz
from bdlm.likelihood.text_statistics import overlap

SIZES = (1, 2, 4, 8)
SAMPLES, SAMPLE_TOKENS = 64, 256


def texts(path: Path) -> list[str]:
    """Read the documents of a JSONL file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def likelihoods(lm: LM, heldout: Path) -> list[dict[str, Any]]:
    """Score the bound at each block size, and the exact likelihood where a few forward passes
    enumerate the blocks."""
    rows = []
    for size in SIZES:
        bound = lm.evaluate(heldout, block_size=size, replicates=4)
        exact = lm.evaluate(heldout, block_size=size, method="exact") if 1 < size <= 4 else None
        rows.append(
            {
                "model": f"blocks of {size}",
                **facts(bound),
                "exact": None if exact is None else exact.bits_per_byte,
            }
        )
    return rows


def facts(score: Any) -> dict[str, Any]:
    """Pick the figures of a report that the table shows."""
    return {
        "nats_per_token": score.nats_per_token,
        "stderr": score.stderr,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "method": score.method,
    }


def baselines(lm: LM, train: Path, heldout: Path) -> list[dict[str, Any]]:
    """Score a 5-gram over the same tokens and xz over the same bytes."""
    encode = lambda path: torch.tensor(
        [i for t in texts(path) for i in [*lm.tokenizer.encode(t), lm.tokenizer.eos_id]]
    )
    model, stream = KneserNey.fit(encode(train), lm.tokenizer.vocab_size), encode(heldout)
    nats = model.nats(stream)
    raw = "".join(texts(heldout)).encode()
    packed = xz(raw, "".join(texts(train)).encode())
    per_token = {"nats_per_token": float(nats.mean()), "tokens": len(stream)}
    return [
        {
            "model": "5-gram, modified Kneser-Ney",
            **per_token,
            "bits_per_byte": float(nats.sum()) / math.log(2) / len(raw),
        },
        {"model": "xz -9e, alone", "bits_per_byte": packed.alone},
        {"model": "xz -9e, after the training text", "bits_per_byte": packed.after_training},
    ]


def shared(lm: LM, train: Path, heldout: Path, n: int = 6) -> dict[str, float]:
    """Count the share of the n-grams of samples that occur in the training text, and the same share
    for held-out text, as a comparison."""
    encode = lambda path: [lm.tokenizer.encode(t) for t in texts(path)]
    written = [
        w.token_ids for w in lm.generate([""] * SAMPLES, max_new_tokens=SAMPLE_TOKENS, seed=1)
    ]
    training = encode(train)
    return {
        "samples": overlap(written, training, n),
        "heldout": overlap(encode(heldout), training, n),
        "n": n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--ar", default=None, help="folder of the autoregressive model")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    lm = load(chosen.model)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus)
        train, heldout = corpus / "train.jsonl", corpus / "heldout.jsonl"
        rows = likelihoods(lm, heldout)
        if chosen.ar:
            rows.append(
                {
                    "model": "autoregressive, same sizes and tokens",
                    **facts(load(chosen.ar).evaluate(heldout)),
                }
            )
        rows += baselines(lm, train, heldout)
        report = {"parameters": lm.parameters, "rows": rows, "overlap": shared(lm, train, heldout)}
    if chosen.json:
        print(json.dumps(report, indent=1))
        return
    print(
        "| | bits per byte | nats per token | exact, bits per byte | method |\n| --- | --- | --- |"
        " --- | --- |"
    )
    for row in rows:
        nats = (
            "-"
            if "nats_per_token" not in row
            else f"{row['nats_per_token']:.4f}"
            + (f" ± {row['stderr']:.4f}" if row.get("stderr") else "")
        )
        exact = "-" if row.get("exact") is None else f"{row['exact']:.3f}"
        print(
            f"| {row['model']} | {row['bits_per_byte']:.3f} | {nats} | {exact} |"
            f" {row.get('method', '-')} |"
        )
    seen = report["overlap"]
    print(
        f"\n6-grams of tokens that stand in the training text: samples {seen['samples']:.2%},"
        f" held-out plays {seen['heldout']:.2%}"
    )


if __name__ == "__main__":
    main()
