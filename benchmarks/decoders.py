"""Speed of the decoders on a trained model, compared with transformers' `generate` on a random
Llama of the same sizes.

    python -m benchmarks.decoders [--model shakespeare] [--rounds 5] [--json]
    python -m benchmarks.decoders --large        random weights of the sizes of
                                                 `benchmarks.generate`
    python -m benchmarks.decoders --speculation  lossless speculation: forward passes and time, by
                                                 block size and drafts

The Llama has the same layers, width, heads and vocabulary, random weights, and its own sampling
loop with a KV cache. Both write equally many tokens after one known token. `bdlm frontier` measures
the quality of the decoders' texts on the same model. With --large only decoders are shown that
choose cells independently of the model's output, so that random weights write as fast as trained
ones. A round runs all sides in turn with a seed of its own; a ratio is the median over rounds."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch

from bdlm.api import load
from bdlm.core.types import Denoiser
from bdlm.generation.engine.engine import generate
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.dit import DiT
from bdlm.models.inference import for_inference
from benchmarks import common
from benchmarks.generate import SIDES, Case, random_weights

BATCHES = (1, 16)


@dataclass(frozen=True)
class Candidate:
    """A decoder with its options, in blocks of `block` cells."""

    decoder: str
    block: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.decoder, *(f"{k} {v}" for k, v in self.options.items())])

    def params(self, new: int, seed: int = 0) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=new,
            decoder=self.decoder,
            options=self.options,
            block_size=self.block,
            seed=seed,
            ignore_eos=True,
        )


def by_place(block: int) -> list[Candidate]:
    """Decoders that choose cells by position alone: as fast on random weights as on trained
    ones."""
    return [
        Candidate("first-hitting", 4),
        Candidate("first-hitting", block),
        Candidate("interleaved", block, {"gap": 4}),
        Candidate("interleaved", block, {"gap": 3}),
        Candidate("dilated", block, {"stride": 4}),
    ]


def fast(block: int) -> list[Candidate]:
    """The exact sampler in blocks of 4 and of the model's own size, then decoders in order of
    speed, the slowest first."""
    return [
        Candidate("first-hitting", 4),
        Candidate("first-hitting", block),
        Candidate("speculative", block, {"k": 2}),
        Candidate("interleaved", block, {"gap": 4}),
        Candidate("spaced", block, {"k": 3}),
        Candidate("dilated", block, {"stride": 4}),
    ]


def lossless() -> list[Candidate]:
    """Speculation by block size and drafts, each block size after first-hitting (no drafts)."""
    return [
        Candidate("speculative", block, {"k": k}) for block in (2, 4, 8) for k in (0, 1, 2, 3, 4)
    ]


def write(
    model: Denoiser, decoder: Candidate, batch: int, new: int, seed: int
) -> tuple[float, float]:
    """Write a batch; returns tokens a second of all texts together, and tokens per forward."""
    first = 0 if model.spec.first_token is None else model.spec.first_token
    start = time.perf_counter()
    results = generate(model, [[first]] * batch, decoder.params(new, seed))
    seconds = time.perf_counter() - start
    tokens = sum(len(r.token_ids) for r in results)
    return tokens / seconds, tokens / sum(r.forward_passes for r in results)


def llama_of(model: DiT, batch: int, new: int) -> Case:
    """The case of `benchmarks.generate` whose Llama has the model's sizes."""
    config = model.config
    return Case(
        model.spec.vocab_size,
        model.spec.block_size,
        batch,
        against="llama",
        new=new,
        hidden=config.hidden_dim,
        layers=config.n_blocks,
        heads=config.n_heads,
    )


def compare(
    model: DiT, decoders: list[Candidate], batch: int, rounds: int, new: int
) -> list[dict[str, Any]]:
    """Measure a row for each decoder at one batch size."""
    folded, case = for_inference(model), llama_of(model, batch, new)
    held: list[Any] = []  # the Llama, once made
    rate: dict[str, list[float]] = {}
    per_forward: dict[str, list[float]] = {}

    def key(candidate: Candidate) -> str:
        return f"{candidate.name} {candidate.block}"

    for seed in range(-1, rounds):  # the first round warms up
        tokens, seconds, _ = SIDES["llama"](case, held)
        found = {"llama": (tokens / seconds, 1.0)}
        found |= {key(d): write(folded, d, batch, new, 1000 * (seed + 1)) for d in decoders}
        for name, (per_second, tokens_per_forward) in found.items() if seed >= 0 else ():
            rate.setdefault(name, []).append(per_second)
            per_forward.setdefault(name, []).append(tokens_per_forward)
        print(f"batch {batch}, round {seed + 1} of {rounds}", file=sys.stderr, flush=True)
    ratios = {
        key(d): [ours / theirs for ours, theirs in zip(rate[key(d)], rate["llama"], strict=True)]
        for d in decoders
    }
    return [
        {
            "decoder": d.name,
            "block": d.block,
            "batch": batch,
            "ratio_tokens_per_second": median(ratios[key(d)]),
            "tokens_per_forward": mean(per_forward[key(d)]),
            "tokens_per_second": median(rate[key(d)]),
            "baseline": "llama",
            "baseline_tokens_per_second": median(rate["llama"]),
            "rounds": rounds,
            "ratios_of_rounds": ratios[key(d)],
            "machine": common.machine(),
        }
        for d in decoders
    ]


COLUMNS = {
    "decoder": "decoder",
    "block": "L'",
    "batch": "batch",
    "ratio_tokens_per_second": "times generate",
    "tokens_per_forward": "tokens per forward",
    "tokens_per_second": "tokens/s",
    "baseline_tokens_per_second": "generate, tokens/s",
}


@torch.inference_mode()
def main(
    model: str = "shakespeare",
    rounds: int = 5,
    new: int = 255,
    speculation: bool = False,
    large: bool = False,
    json: bool = False,
) -> list[dict[str, Any]]:
    """Measure and print. speculation: the table of lossless speculation, at batch 1. large: random
    weights instead of the model. Returns the rows."""
    torch.set_num_threads(common.THREADS)
    native = random_weights(Case(50258, 8, 1, new=new)) if large else load(model).model
    size = native.spec.block_size
    if speculation:
        rows = compare(native, lossless(), 1, rounds, new)
    else:
        rows = [
            row
            for batch in BATCHES
            for row in compare(native, by_place(size) if large else fast(size), batch, rounds, new)
        ]
    common.show(rows, COLUMNS, json)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shakespeare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=255)
    parser.add_argument("--speculation", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", action="store_true")
    main(**vars(parser.parse_args()))
