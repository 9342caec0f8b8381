"""Speed of sampling compared with the plain published sampler and with transformers' `generate`, on
random weights of the same sizes.

    bdlm bench generate --json               the rows of the table in docs/performance.md, in the
                                             order of their targets
    python -m benchmarks.generate --context  cost against the length of the context, as a figure in
                                             runs/results/
    python -m benchmarks.generate --batch    cost against the batch size, as a figure in
                                             runs/results/

Each measurement runs in a process of its own. The sides alternate, and a ratio is the median over
the rounds. The plain sampler can write only one text at a time, so its tokens a second do not grow
with the batch. All rows use exact first-hitting."""

from __future__ import annotations

import json as json_
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bdlm.generation.engine.engine import generate
from bdlm.generation.engine.model_runner import FEW
from bdlm.generation.engine.token_buffer import MANY
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.inference import for_inference
from benchmarks import common, plain
from benchmarks.train import fill


@dataclass(frozen=True)
class Case:
    """One row: its sizes and its goals. `vocab` counts the mask token. new: tokens written after
    the first cell of the text.

    against: "plain" or "llama" (transformers). reference: tokens/s of the authors' own sampler,
    measured once on REFERENCE_MACHINE; None where it was not measured. prompt: cells before the new
    ones.
    plain_new: how many tokens the plain sampler writes (its cost hardly grows with the text)."""

    vocab: int
    block: int
    batch: int
    target: float | None = None
    stretch: float | None = None
    reference: float | None = None
    top_p: float = 1.0
    against: str = "plain"
    decoder: str = "first-hitting"
    new: int = 256
    plain_new: int = 128
    prompt: int = 1
    hidden: int = 256
    layers: int = 8
    heads: int = 8

    @property
    def name(self) -> str:
        nucleus = f", nucleus {self.top_p:g}" if self.top_p < 1 else ""
        other = ", against transformers' generate" if self.against == "llama" else ""
        return f"vocabulary {self.vocab:,}, L'={self.block}, batch {self.batch}{nucleus}{other}"


# CPU and date of the `reference` figures of TABLE; None while there are none
REFERENCE_MACHINE: str | None = None
TABLE = (
    Case(50258, 16, 1, 3.5, 5),
    Case(50258, 4, 1, 3.2, 4),
    Case(257, 16, 1, 1.7, 2.5),
    Case(50258, 4, 16, 12, 20),
    Case(50258, 16, 16, 8, 12),
    Case(50258, 16, 1, top_p=0.9),
    Case(50258, 4, 1, 1, against="llama"),
    Case(50258, 4, 16, 1, against="llama"),
)
CONTEXT = tuple(
    Case(257, size, 1, prompt=n, new=32)
    for size in (4, 16)
    for n in (256, 512, 1024, 2048, 4096, 8192)
)
BATCH = tuple(Case(50258, size, n, new=64) for size in (4, 16) for n in (1, 2, 4, 8, 16, 32, 64))
QUICK = {"hidden": 32, "layers": 2, "heads": 2, "new": 20, "plain_new": 20}


# -- what a worker measures ------------------------------------------------------------------------


def random_weights(case: Case) -> DiT:
    """Make the native model of a case's sizes."""
    length = case.prompt + case.new
    model = DiT(
        DiTConfig(
            case.vocab,
            case.vocab - 1,
            case.hidden,
            case.layers,
            case.heads,
            64,
            length,
            case.block,
            first_token=0,
        )
    )
    fill(model)
    return model.eval()


def _ours(case: Case, held: list[Any]) -> tuple[int, float, dict[str, Any]]:
    if not held:
        held.append(for_inference(random_weights(case)))
    text = torch.arange(case.prompt) % (case.vocab - 1)
    params = SamplingParams(
        max_new_tokens=case.new, top_p=case.top_p, decoder=case.decoder, ignore_eos=True
    )
    prompts = [(text + i).remainder(case.vocab - 1).tolist() for i in range(case.batch)]
    generate(held[0], prompts, params.with_(max_new_tokens=case.block + 1))
    start = time.perf_counter()
    results = generate(held[0], prompts, params)
    seconds = time.perf_counter() - start
    if case.prompt > 1:  # the prompt's own cost: a run that writes one token
        start = time.perf_counter()
        generate(held[0], prompts, params.with_(max_new_tokens=1))
        seconds -= time.perf_counter() - start
    passes = max(r.forward_passes for r in results)
    return sum(len(r.token_ids) for r in results), seconds, {"forward_passes": passes}


def _plain(case: Case, held: list[Any]) -> tuple[int, float, dict[str, Any]]:
    if not held:
        held.append(
            plain.PlainDiT(
                case.vocab,
                case.hidden,
                case.layers,
                case.heads,
                64,
                case.prompt + case.new,
                case.block,
            )
        )
        fill(held[0])
        held[0].eval()
    count = -(-case.plain_new // case.block) * case.block
    plain.sample(held[0], 0, case.block, case.top_p)
    start = time.perf_counter()
    plain.sample(held[0], 0, count, case.top_p)
    return count - 1, time.perf_counter() - start, {}


def _llama(case: Case, held: list[Any]) -> tuple[int, float, dict[str, Any]]:
    """Run transformers' own sampling loop with its KV cache on a Llama of the same width, depth and
    vocabulary.

    Its gated MLP has three matrices, which together are as large as the two of the DiT.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if not held:
        torch.manual_seed(0)
        inner = case.hidden * 8 // 3
        config = LlamaConfig(
            vocab_size=case.vocab,
            hidden_size=case.hidden,
            intermediate_size=inner,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            max_position_embeddings=case.prompt + case.new,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        held.append(LlamaForCausalLM(config).eval())
    prompt = torch.zeros(case.batch, case.prompt, dtype=torch.long)
    options = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "use_cache": True,
        "attention_mask": torch.ones_like(prompt),
    }
    with torch.no_grad():
        held[0].generate(prompt, max_new_tokens=4, **options)
        start = time.perf_counter()
        out = held[0].generate(prompt, max_new_tokens=case.new, **options)
    return (out.shape[1] - case.prompt) * case.batch, time.perf_counter() - start, {}


SIDES = {"ours": _ours, "plain": _plain, "llama": _llama}


def work(side: str, case: Case) -> dict[str, Any]:
    """Measure tokens a second of one side; for ours also what it multiplies and reads."""
    torch.set_num_threads(common.THREADS)
    held: list[Any] = []
    with torch.inference_mode():
        tokens, seconds, facts = SIDES[side](case, held)
    facts |= {"tokens_per_second": tokens / seconds, "seconds": seconds}
    if side == "ours":
        few = case.top_p == 1 and case.batch <= FEW and "logit_bounds" in held[0].spec.supports
        facts |= _load(case, facts["forward_passes"], few)
    return facts


def _load(case: Case, passes: int, few: bool) -> dict[str, float]:
    """Floating-point operations and bytes that the forward passes of one run must cost at least:
    the products of their cells, attention over half the text on average, the head on one cell a
    row; weights once a forward pass, keys and values once.

    few: the head is read in 8 bits, and in float32 once for MANY cells."""
    width, layers, rows = case.hidden, case.layers, case.batch
    # the block of each forward pass, and every cell once more when its block is committed
    cells = passes * rows * case.block + rows * case.new
    trunk, head = layers * 12 * width * width, case.vocab * width
    context = case.prompt + case.new / 2
    flops = 2 * (cells * trunk + passes * rows * head) + 4 * cells * context * width * layers
    head_bytes = 1 + 4 * rows / MANY if few else 4
    read = passes * (4.0 * trunk + head_bytes * head + 4.0 * rows * context * 2 * width * layers)
    return {"gflop": flops / 1e9, "gbyte": read / 1e9}


# -- rows ------------------------------------------------------------------------------------------


def compare(case: Case, rounds: int, peaks: tuple[float, float]) -> dict[str, Any]:
    """Measure one row of the table: both sides, alternating. peaks: matrix products in GFLOP/s,
    reading in GB/s."""
    done: dict[str, list[dict[str, Any]]] = {case.against: [], "ours": []}
    for _ in range(rounds):
        for side, results in done.items():
            results.append(
                common.worker("benchmarks.generate", {"side": side, "case": asdict(case)})
            )
    rate = {side: [r["tokens_per_second"] for r in results] for side, results in done.items()}
    ratios = [a / b for a, b in zip(rate["ours"], rate[case.against], strict=True)]
    ours = sorted(done["ours"], key=lambda r: r["seconds"])[rounds // 2]
    return {
        "name": case.name,
        "ratio_tokens_per_second": median(ratios),
        "target_tokens_per_second": case.target,
        "stretch_tokens_per_second": case.stretch,
        "tokens_per_second": median(rate["ours"]),
        "baseline": case.against,
        "baseline_tokens_per_second": median(rate[case.against]),
        "reference_tokens_per_second": case.reference,
        "reference_machine": REFERENCE_MACHINE,
        "share_of_matmul_peak": ours["gflop"] / ours["seconds"] / peaks[0],
        "share_of_bandwidth": ours["gbyte"] / ours["seconds"] / peaks[1],
        "rounds": rounds,
        "ratios_of_rounds": ratios,
    }


def run(cases: tuple[Case, ...], rounds: int) -> list[dict[str, Any]]:
    """Measure all rows."""
    peaks, rows = (common.matmul_peak(), common.copy_peak()), []
    for case in cases:
        rows.append(compare(case, rounds, peaks))
        rows[-1] |= {
            "matmul_peak_gflops": peaks[0],
            "bandwidth_peak_gb": peaks[1],
            "machine": common.machine(),
        }
        print(
            f"{case.name}: {rows[-1]['ratio_tokens_per_second']:.2f} x tokens/s",
            file=sys.stderr,
            flush=True,
        )
    return rows


def curve(cases: tuple[Case, ...], axis: str) -> list[dict[str, Any]]:
    """Measure this library alone along one axis ("prompt" or "batch"): milliseconds a forward pass,
    tokens a second, shares of the machine's peaks."""
    peaks, rows = (common.matmul_peak(), common.copy_peak()), []
    for case in cases:
        done = common.worker("benchmarks.generate", {"side": "ours", "case": asdict(case)})
        rows.append(
            {
                "block": case.block,
                axis: getattr(case, axis),
                "ms_per_call": 1000 * done["seconds"] / case.new,
                "tokens_per_second": done["tokens_per_second"],
                "share_of_matmul_peak": done["gflop"] / done["seconds"] / peaks[0],
                "share_of_bandwidth": done["gbyte"] / done["seconds"] / peaks[1],
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


AXES = {"prompt": ("context (cells)", "context"), "batch": ("batch size (texts)", "batch")}


def draw(rows: list[dict[str, Any]], axis: str, folder: Path, title: str = "") -> Path:
    """Draw the curve, with its numbers as JSON in a file next to the figure. title: what was
    measured; the figure puts it above the name of the method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    label, name = AXES[axis]
    places = sorted({row[axis] for row in rows})
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.8))
    curves = (
        (left, "ms_per_call", "", "-", 1),
        (middle, "tokens_per_second", "", "-", 1),
        (right, "share_of_matmul_peak", ", of matrix products", "-", 100),
        (right, "share_of_bandwidth", ", of reading memory", ":", 100),
    )
    for number, block in enumerate(sorted({row["block"] for row in rows})):
        mine = [row for row in rows if row["block"] == block]
        for panel, key, told, style, times in curves:
            values = [times * row[key] for row in mine]
            panel.plot(
                [row[axis] for row in mine],
                values,
                style,
                marker="o",
                color=f"C{number}",
                label=f"L' = {block}{told}",
            )
    heads = (
        "milliseconds a forward pass",
        "tokens a second, all texts together",
        "% of the machine's measured peak",
    )
    for panel, head in zip((left, middle, right), heads, strict=True):
        common.dress(panel, label, head, places)
        panel.set_ylim(bottom=0)
    told = f"{title}\nexact first-hitting, float32, {common.THREADS} threads, CPU".strip()
    return common.keep(figure, told, folder / f"generate_{name}.svg", rows)


COLUMNS = {
    "name": "8 layers, width 256, 8 heads, 256 new tokens",
    "ratio_tokens_per_second": "tokens/s, ratio to the baseline",
    "target_tokens_per_second": "at least",
    "stretch_tokens_per_second": "stretch",
    "tokens_per_second": "ours, tokens/s",
    "baseline_tokens_per_second": "baseline, tokens/s",
    "reference_tokens_per_second": "reference, tokens/s",
    "share_of_matmul_peak": "share of matmul peak",
    "share_of_bandwidth": "share of bandwidth",
}


def main(
    json: bool = False,
    quick: bool = False,
    context: bool = False,
    batch: bool = False,
    rounds: int = 3,
    figures: Path = common.FIGURES,
) -> list[dict[str, Any]]:
    """Measure and print. json: a JSON list instead of a table. quick: tiny sizes, to see that it
    runs.

    context, batch: cost along that axis instead, drawn into `figures`. Returns the rows.
    """

    def small(cases: tuple[Case, ...]) -> tuple[Case, ...]:
        if not quick:
            return cases
        sizes: dict[str, Any] = QUICK
        return tuple(
            replace(c, **sizes, vocab=min(c.vocab, 300), prompt=min(c.prompt, 40)) for c in cases
        )

    if context or batch:
        axis = "prompt" if context else "batch"
        cases = tuple(dict.fromkeys(small(CONTEXT if context else BATCH)))
        rows, one = curve(cases, axis), cases[0]
        sizes = f"{one.layers} layers, width {one.hidden}, vocabulary {one.vocab:,}, random weights"
        varied = (
            f"{one.batch} text, {one.new} new tokens"
            if context
            else f"{one.new} new tokens from an empty prompt"
        )
        print(draw(rows, axis, figures, f"{sizes}; {varied}"), file=sys.stderr)
        print(
            json_.dumps(rows, indent=1)
            if json
            else common.table(rows, {k: k.replace("_", " ") for k in rows[0]})
        )
        return rows
    rows = run(small(TABLE), 1 if quick else rounds)
    common.show(rows, COLUMNS, json)
    if REFERENCE_MACHINE is not None and not json:
        print(f"\nreference: the authors' own code, measured on {REFERENCE_MACHINE}")
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        job = json_.loads(sys.argv[2])
        print(json_.dumps(work(job["side"], Case(**job["case"]))))
    else:
        flags = {word.removeprefix("--"): True for word in sys.argv[1:]}
        main(**flags)  # type: ignore[arg-type]
