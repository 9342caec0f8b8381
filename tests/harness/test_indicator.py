"""The indicator of NI Sampling: labels, training on a tiny model, the file, and the decoder that
reads it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdlm.core.errors import CheckpointError, ConfigError
from bdlm.core.types import Denoiser, ModelSpec, Out, Step
from bdlm.generation.decoders import make_decoder
from bdlm.generation.decoders.confidence import FixedK
from bdlm.generation.decoders.learned import Indicator, load_indicator, save_indicator
from bdlm.generation.engine.engine import generate
from bdlm.generation.sampling_params import SamplingParams, check_fits
from bdlm.harness.indicator import Teacher, compare, replay, teach, train_indicator
from bdlm.models.toy import Inconsistent, TokenCache, toy_spec
from tests.contracts.test_decoders import alone_and_in_company, finishes, slow_end_is_its_reference

PROMPTS = [[i % 3, i // 3 % 3, i // 9] for i in range(24)]


class Stated(Inconsistent):
    """A toy that shows a last state: its log-probabilities."""

    @property
    def spec(self) -> ModelSpec:
        return replace(super().spec, supports=super().spec.supports | {"hidden"})

    def step(self, step: Step, cache: TokenCache | None = None) -> Out:
        out = super().step(replace(step, outputs=frozenset({"logits"})), cache)
        return replace(out, hidden=None if out.logits is None else out.logits.clone())


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return Stated(toy_spec(4, 16), spread=3.0)


@pytest.fixture(scope="module")
def teacher(model: Denoiser) -> Teacher:
    return teach(model, PROMPTS, tokens=9)


@pytest.fixture(scope="module")
def indicator(model: Denoiser, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ni") / "indicator.safetensors"
    loss = train_indicator(model, teacher, path, rounds=1, steps=60)
    share = teacher.label(teacher.seen)[0].double().mean().item()
    assert 0.05 < share < 0.95, "some cells may be filled early, some not"
    assert loss < -(share * math.log(share) + (1 - share) * math.log(1 - share)), (
        "it says more than the share"
    )
    return path


def test_the_teacher_fills_one_cell_a_call_and_its_last_states_are_right(
    model: Denoiser, teacher: Teacher
) -> None:
    assert [t[3:] for t in teacher.texts] == [
        r.token_ids
        for r in generate(model, PROMPTS, SamplingParams(max_new_tokens=9, decoder=FixedK(1)))
    ]
    assert len(teacher.seen.candidate) == 24 * (1 + 10 + 10), (
        "1, then 4 + 3 + 2 + 1 masked cells a block"
    )
    right, known = teacher.label(teacher.seen)
    assert bool(known.all())
    states = zip(
        teacher.seen.seed.tolist(), teacher.seen.place.tolist(), right.tolist(), strict=True
    )
    # a cell is last seen when it is filled
    last = {(seed, place): hit for seed, place, hit in states}
    assert all(last.values())


def test_slow_end_and_oracle_write_the_teachers_text(
    model: Denoiser, teacher: Teacher, indicator: Path
) -> None:
    slow = replay(
        model,
        teacher,
        make_decoder("ni", {"indicator": str(indicator), "accept": 1.0, "conf": 1.0}),
    )[1]
    assert (slow.agreement, slow.same_blocks) == (1.0, 1.0)
    points = {
        p.decoder: p for p in compare(model, teacher, indicator, thresholds=(0.5,), accepts=(0.8,))
    }
    assert points["oracle"].tokens_per_forward > slow.tokens_per_forward
    assert points["oracle"].agreement > 0.9, "right cells filled early may still sway the others"
    assert points["ni 0.8"].tokens_per_forward > slow.tokens_per_forward


def test_it_keeps_the_contract_of_decoders(model: Denoiser, indicator: Path) -> None:
    decoder = make_decoder("ni", {"indicator": str(indicator), "accept": 0.6})
    finishes(model, decoder, 0)
    alone_and_in_company(model, [decoder, decoder, make_decoder("first-hitting"), decoder])
    slow_end_is_its_reference(model, decoder)


def test_the_file_comes_back_and_wrong_ones_are_named(tmp_path: Path, model: Denoiser) -> None:
    path = str(tmp_path / "indicator.safetensors")
    net = Indicator(16, 4)
    save_indicator(net, path)
    back = load_indicator(path)
    assert all(
        torch.equal(a.double(), b)
        for a, b in zip(net.state_dict().values(), back.state_dict().values(), strict=True)
    )
    (tmp_path / "broken").write_text("no")
    with pytest.raises(CheckpointError, match="broken is not an indicator"):
        load_indicator(str(tmp_path / "broken"))
    other = str(tmp_path / "other")
    save_indicator(Indicator(16, 12), other)
    for options, spec, words in (
        ({}, model.spec, "ni.indicator is empty"),
        ({"indicator": other}, model.spec, "trained for 12 tokens"),
        ({"indicator": path}, Inconsistent(toy_spec(4, 16)).spec, "last state"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_fits(SamplingParams(decoder="ni", options=options), [0], spec)
    with pytest.raises(ConfigError, match="last state"):
        train_indicator(Inconsistent(toy_spec(4, 16)), None, path)  # type: ignore[arg-type]


def test_about_40_000_weights_at_the_size_of_the_shipped_model() -> None:
    assert sum(p.numel() for p in Indicator(256, 2048).parameters()) < 50_000
