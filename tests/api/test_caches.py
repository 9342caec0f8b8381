"""Approximate caches of full-sequence models, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bdlm
from bdlm import LM
from bdlm.cli import run
from bdlm.generation.full_sequence.engine import generate_full_sequence
from bdlm.training.config import load_config
from bdlm.training.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A tiny MDLM."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sizes = [
        "model.algo=mdlm",
        "model.hidden_dim=32",
        "model.length=48",
        "model.block_size=48",
        "block_sizes=[]",
        "optim.batch_size=8",
        "limits.steps=12",
        "valid.every_steps=null",
        "valid.rows=4",
    ]
    result = train(
        load_config("tiny", [*sizes, f"data.train={text_file}", f"out={out}", "log.progress=false"])
    )
    assert result.model is not None
    return Path(result.model)


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return bdlm.load(folder)


@pytest.mark.parametrize("cache", [name for name in bdlm.CACHES if name != "none"])
def test_texts_are_those_of_the_engine_for_caches(lm: LM, cache: str) -> None:
    prompts = ["the cat", "a"]
    made = lm.generate(prompts, max_new_tokens=16, seed=5, cache=cache, block_size=8)
    ids = [m.prompt_token_ids for m in made]
    params = bdlm.SamplingParams(max_new_tokens=16, seed=5)
    for one, other in zip(
        made, generate_full_sequence(lm.model, ids, params, cache, block=8), strict=True
    ):
        assert one.token_ids == other.token_ids
        assert f"computed {other.work.share():.1%} of the exact multiply-adds" in one.notes[-1]
        assert other.work.share() < 1
    assert [m.prompt for m in made] == prompts
    assert made[0].text == lm.tokenizer.decode(made[0].token_ids)


def test_a_cache_that_keeps_nothing_is_exact(lm: LM) -> None:
    plain = lm.generate("the", max_new_tokens=12, seed=1, cache="none", block_size=12)
    every = lm.generate(
        "the",
        max_new_tokens=12,
        seed=1,
        cache="prefix",
        cache_options={"refresh": 1},
        block_size=12,
    )
    assert plain.token_ids == every.token_ids
    torch.testing.assert_close(
        torch.tensor(plain.log_probs), torch.tensor(every.log_probs), atol=1e-3, rtol=1e-3
    )
    assert "100.0%" in every.notes[-1]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"cache": "duel"}, "did you mean 'dual'"),
    "option": ({"cache": "dual", "cache_options": {"refesh": 2}}, "did you mean 'refresh'"),
    "kind": ({"cache": "dual", "cache_options": {"refresh": 2.5}}, "cache.refresh is 2.5"),
    "text": ({"cache": "dual", "cache_options": {"refresh": "x"}}, "cache_options is"),
    "range": ({"cache": "dllm", "cache_options": {"rho": 2}}, "cache.rho is 2"),
    "stop": ({"cache": "dual", "stop": "x"}, "stop is ('x',)"),
    "criteria": ({"cache": "dual", "stopping_criteria": [bool]}, "stopping_criteria is"),
    "window": ({"cache": "dual", "context_window": 9}, "context_window does not work with cache"),
    "length": ({"cache": "dual", "max_new_tokens": 99}, "max_new_tokens is 99"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line(lm: LM, mistake: str) -> None:
    options, said = WRONG[mistake]
    with pytest.raises(bdlm.BdlmError) as error:
        lm.generate("the", **{"max_new_tokens": 8, **options})  # type: ignore[call-overload]
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_command_writes_under_a_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(folder), "--max-new-tokens", "8", "--json"]
    words += ["--prompt", "the", "--cache", "dual", "--cache-option", "refresh=2"]
    assert run(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 8 and "of the exact multiply-adds" in facts["notes"][-1]
    for wrong, said in (
        (["--cache-option", "refesh=2"], "did you mean 'refresh'"),
        (["--cache-option", "refresh=x"], "cache.refresh is 'x'"),
    ):
        assert run([*words[:-2], *wrong]) == 2
        assert said in capsys.readouterr().err
    assert run([*words[:-4], "--cache-option", "refresh=2"]) == 2
    assert "--cache-option came without --cache" in capsys.readouterr().err


def test_a_model_that_caches_exactly_takes_none(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--model", str(tiny_model), "--cache", "prefix"]) == 2
    said = capsys.readouterr().err
    assert "this model caches exactly; leave cache out" in said and said.count("\n") == 1
