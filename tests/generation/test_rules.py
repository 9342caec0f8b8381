"""The rules that hold a decoder and a model of the user: raised errors, not asserts, so that they
hold under `python -O` too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bdlm.core.errors import BdlmError, DecoderError, UnsupportedError
from bdlm.core.types import Commit, ModelSpec, Out, Step
from bdlm.generation.decoders import Decoder, View
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.engine import Engine, generate
from bdlm.generation.engine.streaming import feed
from bdlm.generation.full_sequence.engine import generate_full_sequence
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.toy import Inconsistent, toy_spec

MODEL = Inconsistent(toy_spec(4, 16))  # three tokens, 0 to 2, and the mask, 3


@dataclass(frozen=True)
class Does(Decoder):
    """Makes what a function makes of a view and of the sound decision for it: one cell from the
    left."""

    needs: ClassVar[frozenset[str]] = frozenset({"filled"})
    act: Callable[[View, Commit], Any] = lambda view, commit: commit

    def choose(self, view: View) -> Commit:
        first = view.masked & (view.masked.long().cumsum(1) == 1)
        return self.act(view, Commit(first, view.drawn(view.masked)))  # type: ignore[no-any-return]


def everywhere(view: View) -> Tensor:
    return torch.ones_like(view.masked)


BROKEN: dict[str, tuple[Callable[[View, Commit], Any], str]] = {
    "fills a given cell": (
        lambda view, c: replace(c, cells=everywhere(view)),
        "filled a cell that was not masked",
    ),
    "overwrites a given cell": (
        lambda view, c: replace(c, overwrite=everywhere(view)),
        "overwrote a cell that it had not filled",
    ),
    "reopens a given cell": (
        lambda view, c: replace(c, reopen=everywhere(view)),
        "reopened a cell that it had not filled",
    ),
    "writes the mask": (
        lambda view, c: replace(c, ids=torch.full_like(c.ids, 3)),
        "wrote the mask token",
    ),
    "writes no token": (
        lambda view, c: replace(c, ids=torch.full_like(c.ids, 99)),
        "wrote a token outside the vocabulary",
    ),
    "writes a negative token": (
        lambda view, c: replace(c, ids=c.ids - 9),
        "wrote a token outside the vocabulary",
    ),
    "writes a banned token": (
        lambda view, c: replace(c, ids=torch.full_like(c.ids, 1)),
        "wrote a banned token as new token 0",
    ),
    "ends an open block": (
        lambda view, c: Commit(torch.zeros_like(c.cells), c.ids, end_block=everywhere(view)[:, 0]),
        "ended a block before its first cell was filled",
    ),
    "fills nothing": (
        lambda view, c: Commit(torch.zeros_like(c.cells), c.ids),
        "took more decisions than its bound",
    ),
    "returns nothing": (lambda view, c: None, "returned NoneType; return a Commit"),
    "returns other shapes": (
        lambda view, c: replace(c, cells=c.cells[:, :1]),
        r"Commit.cells is torch.bool \[\d, 1\]",
    ),
    "returns other kinds": (
        lambda view, c: replace(c, ids=c.ids.float()),
        "Commit.ids is torch.float32",
    ),
}
# the prompt's last block has no given cell, so "ends an open block" finds its first cell open
PROMPTS = {"ends an open block": [0, 1, 2, 0]}


@pytest.mark.parametrize("what", BROKEN)
def test_a_decoder_that_breaks_a_rule_fails_alone(what: str) -> None:
    act, message = BROKEN[what]
    prompt = PROMPTS.get(what, [0, 2])
    bad = SamplingParams(
        max_new_tokens=6,
        decoder=Does(act),
        banned_token_ids=(1,) if "banned" in what else (),
    )
    good = SamplingParams(max_new_tokens=6, decoder="threshold", seed=2)
    with pytest.raises(DecoderError, match=message) as caught:
        generate(MODEL, [prompt], [bad])
    assert "\n" not in str(caught.value)
    engine = Engine(MODEL, 3)
    for params in (good, bad, good):
        engine.submit(prompt, params)
    ended = {e.request: e for e in engine.run() if e.result is not None}
    assert [ended[i].result.finish_reason for i in range(3)] == ["length", "error", "length"]
    assert (
        ended[0].result.token_ids
        == ended[2].result.token_ids
        == generate(MODEL, [prompt], [good])[0].token_ids
    )


def test_a_sound_decision_is_taken() -> None:
    assert (
        len(
            generate(MODEL, [[0, 2]], SamplingParams(max_new_tokens=6, decoder=Does()))[0].token_ids
        )
        == 6
    )


class Lacks:
    """A model that promises what its `step` does not give."""

    def __init__(self, spec: ModelSpec, lacks: str) -> None:
        self.inner, self.lacks = Inconsistent(spec), lacks
        self.spec = replace(spec, supports=spec.supports | {"attention", "hidden"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, step: Step, cache: Any = None) -> Out:
        out = self.inner.step(replace(step, outputs=frozenset({"logits"})), cache)
        return replace(out, logits=None) if self.lacks == "logits" else out


@pytest.mark.parametrize(
    ("lacks", "decoder"), [("logits", "first-hitting"), ("attention", "attention")]
)
def test_a_model_that_does_not_give_what_it_promises_is_named(lacks: str, decoder: str) -> None:
    with pytest.raises(UnsupportedError, match=f"asked for {lacks} and gave none"):
        generate(
            Lacks(toy_spec(4, 16), lacks), [[0]], SamplingParams(max_new_tokens=4, decoder=decoder)
        )  # type: ignore[arg-type]


def test_writing_under_a_cache_holds_decoders_to_the_same_rules() -> None:
    whole = Inconsistent(replace(toy_spec(16, 16), streams=1))
    for what in ("fills nothing", "writes the mask", "returns nothing"):
        act, message = BROKEN[what]
        with pytest.raises(DecoderError, match=message):
            generate_full_sequence(
                whole, [[0, 2]], SamplingParams(max_new_tokens=6, decoder=Does(act)), "none"
            )


def test_all_rules_are_read_from_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block_state = BlockState(2, 4, 3, "block", torch.device("cpu"))
    every = torch.ones(2, 4, dtype=torch.bool)
    block_state.open(
        torch.arange(2), torch.zeros(2, dtype=torch.long), every, block_state.ids, ~every
    )
    block_state.apply(
        Commit(torch.tensor([[True, False, False, False]] * 2), torch.zeros(2, 4, dtype=torch.long))
    )
    now, read = block_state.filled, []
    for name in ("__bool__", "tolist", "item", "__int__"):
        inner = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, inner=inner: read.append(1) or inner(self))
    commit = Commit(
        block_state.masked,
        torch.zeros(2, 4, dtype=torch.long),
        reopen=now,
        overwrite=now & False,
        end_block=now.any(1),
    )
    block_state.check(commit, 4)
    assert len(read) == 1


def test_events_without_a_result_are_refused() -> None:
    class Streamer:
        def put(self, value: Tensor) -> None: ...

        def end(self) -> None: ...

    with pytest.raises(BdlmError, match="without a result"):
        feed(Streamer(), [1], [], 3)


def test_the_rules_hold_without_asserts() -> None:
    """Under `python -O`, which drops asserts, a decoder that breaks a rule still raises."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-O", "-c", UNDER_O], capture_output=True, text=True, cwd=root, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["optimised", *["DecoderError"] * len(BROKEN), "UnsupportedError"]


UNDER_O = """
from bdlm.core.errors import BdlmError
from tests.generation.test_rules import *
print("optimised" if not __debug__ else "not optimised")
for what, (act, _) in BROKEN.items():
    banned = (1,) if "banned" in what else ()
    params = SamplingParams(max_new_tokens=6, decoder=Does(act), banned_token_ids=banned)
    try:
        generate(MODEL, [PROMPTS.get(what, [0, 2])], params)
        print("nothing")
    except Exception as error:
        print(type(error).__name__)
try:
    params = SamplingParams(max_new_tokens=4, decoder="attention")
    generate(Lacks(toy_spec(4, 16), "attention"), [[0]], params)
except Exception as error:
    print(type(error).__name__)
"""
