"""One model used from several threads at once gives each the results that it gives alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import bdlm
from bdlm.generation.engine.engine import generate
from bdlm.generation.full_sequence.engine import generate_full_sequence
from bdlm.generation.sampling_params import SamplingParams
from bdlm.likelihood.bound import evaluating
from bdlm.models.inference import for_inference
from tests.contracts.builders import randomised, tiny_dit
from tests.models.tiny_hf import MASK, tiny

THREADS = 4


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each job returns or raises, all of them run at once."""
    found: list[Any] = [None] * len(jobs)

    def work(first: int) -> None:
        for i in range(first, len(jobs), THREADS):
            try:
                found[i] = jobs[i]()
            except Exception as error:
                found[i] = repr(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_way_in_to_the_packaged_model() -> None:
    lm = bdlm.load("shakespeare")
    prompts = ["KING LEAR:\n", "", "To be, or not", "O Romeo, wherefore art thou"]
    ways: list[Callable[[int, str], Any]] = [
        lambda i, p: lm.generate(p, max_new_tokens=20, seed=i).text,
        lambda i, p: "".join(
            c.text for c in lm.stream(p, max_new_tokens=20, seed=i) if c.kind == "text"
        ),
        lambda i, p: lm.infill(p, " the king.", 6, seed=i).text,
        lambda i, p: lm.score(f"{p} and so to bed", seed=i).nats_per_token,
        lambda i, p: lm.generate([p, "Enter"], max_new_tokens=12, decoder="eb", seed=i)[0].text,
    ]
    jobs = [lambda i=i, p=p, way=way: way(i, p) for i, p in enumerate(prompts) for way in ways]
    alone = [job() for job in jobs]
    assert together(jobs) == alone


def _jobs(model: Any, decoders: list[str], tokens: int = 12) -> list[Callable[[], Any]]:
    write = lambda i, p: (
        generate(
            model,
            [[1, 2, 3][: i % 3 + 1]],
            SamplingParams(max_new_tokens=tokens, decoder=p, seed=i),
        )[0].token_ids
    )
    return [lambda i=i, p=p: write(i, p) for i in range(8) for p in decoders]


@pytest.mark.parametrize(
    ("model", "decoders"),
    [
        (lambda: tiny("qwen3", mask_id=MASK), ["first-hitting", "attention"]),
        (lambda: tiny("llama", autoregressive=True), ["first-hitting"]),
        (
            lambda: for_inference(randomised(tiny_dit("mdlm", length=40), std=0.2)),
            ["first-hitting", "threshold"],
        ),  # type: ignore[arg-type]
        (
            lambda: for_inference(randomised(tiny_dit("bd3lm", length=40), std=0.5)),
            ["first-hitting", "attention"],
        ),  # type: ignore[arg-type]
        (lambda: randomised(tiny_dit("sedd", length=40), std=0.5), ["first-hitting"]),
    ],
    ids=["adapter", "autoregressive adapter", "whole sequences", "blocks", "time-conditioned"],
)
def test_every_kind_of_model(model: Callable[[], Any], decoders: list[str]) -> None:
    shared = model()
    alone = [job() for job in _jobs(shared, decoders)]
    assert len({tuple(tokens) for tokens in alone}) > 2
    assert together(_jobs(shared, decoders)) == alone


def test_writing_under_caches() -> None:
    model: Any = randomised(tiny_dit("mdlm", length=40), std=0.3)
    write = lambda i, c: (
        generate_full_sequence(
            model, [[1, 2]], SamplingParams(max_new_tokens=12, seed=i), c, block=4
        )[0].token_ids
    )
    jobs = [lambda i=i, c=c: write(i, c) for i in range(4) for c in ("none", "dual", "dllm")]
    alone = [job() for job in jobs]
    assert together(jobs) == alone


def test_a_pass_that_shows_its_attention_leaves_the_kernels_of_other_passes() -> None:
    model, seen = tiny("llama", mask_id=MASK), set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *_: seen.add(model.model.config._attn_implementation)
    )
    try:
        generate(model, [[1, 2]], SamplingParams(max_new_tokens=8, decoder="attention"))
    finally:
        hook.remove()
    assert seen == {"sdpa"}


def test_a_model_in_training_is_measured_until_the_last_is_done() -> None:
    model = tiny_dit("bd3lm").train()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        first, second = evaluating(model), evaluating(model)
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert not model.training, "the second still measures"
        other.submit(second.__exit__, None, None, None).result()
    assert model.training
