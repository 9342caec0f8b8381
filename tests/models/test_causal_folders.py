"""transformers' own folders, as they are downloaded: they load, and write what transformers
writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import bdlm
from bdlm.core.errors import CheckpointError, ConfigError, DataError
from tests.models.causal_folders import SPARE, causal_folder

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
PROMPTS = ("the quick brown", "pack my box", "x")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_folder(tmp_path_factory.mktemp("causal") / request.param, request.param)


def theirs(folder: Path, prompt: str, tokens: int, banned: list[int]) -> tuple[list[int], str]:
    """What transformers writes greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(
        **given, do_sample=False, max_new_tokens=tokens, suppress_tokens=banned or None
    )[0, given.input_ids.shape[1] :].tolist()
    out = out[: out.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in out else out
    return out, tokenizer.decode(out, skip_special_tokens=True)


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    lm = bdlm.load(folder)
    spec = lm.spec
    assert (spec.block_size, spec.noise, spec.mask_id) == (1, "none", -1)
    spare = sorted(spec.unused_ids)
    assert len(spare) == SPARE and spare[-1] == spec.vocab_size - 1
    for prompt in PROMPTS:
        ids, text = theirs(folder, prompt, 20, spare)
        made = lm.generate(prompt, max_new_tokens=20, temperature=0.0)
        assert (made.token_ids, made.text) == (ids, text)


def test_a_table_of_positions_ends_what_can_be_asked_for(tmp_path: Path) -> None:
    """GPT-2 looks positions up in a table; the last token that it writes is never looked up."""
    lm = bdlm.load(causal_folder(tmp_path / "m", "gpt2"))
    assert lm.spec.max_position == lm.spec.max_length
    room = lm.spec.max_length - len(lm.prompt_ids("x")) + 1
    made = lm.generate("x", max_new_tokens=room, ignore_eos=True)
    assert len(made.token_ids) == room
    with pytest.raises(ConfigError, match="positions that this model has; ask for fewer"):
        lm.generate("x", max_new_tokens=room + 1, ignore_eos=True)
    assert bdlm.load(causal_folder(tmp_path / "l", "llama")).spec.max_position is None


def test_spare_rows_are_never_written(folder: Path) -> None:
    lm = bdlm.load(folder)
    with torch.no_grad():  # the spare rows are the likeliest by far
        head = lm.model.head.weight
        head[-SPARE:] = 50 * head[:-SPARE].mean(0)
    for made in lm.generate(list(PROMPTS) * 3, max_new_tokens=16, temperature=2.0):
        assert not set(made.token_ids) & lm.spec.unused_ids


def test_the_last_token_of_a_full_vocabulary_can_be_written(tmp_path: Path) -> None:
    rows = bdlm.load(causal_folder(tmp_path / "a", "gpt2")).tokenizer.vocab_size
    lm = bdlm.load(
        causal_folder(tmp_path / "b", "gpt2", vocab_size=rows, tie_word_embeddings=False)
    )
    assert not lm.spec.unused_ids
    made = lm.generate("x", max_new_tokens=3, temperature=0.0, allowed_token_ids=[rows - 1])
    assert made.token_ids == [rows - 1] * 3


def test_likelihood_is_that_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    lm = bdlm.load(folder)
    text = "the quick brown fox"
    ids = torch.tensor([lm.prompt_ids(text)])
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert lm.score(text).nats_per_token == pytest.approx(
        float(model(ids, labels=ids).loss.detach()), rel=1e-5
    )


def test_an_empty_prompt_begins_with_the_opening_token(folder: Path) -> None:
    lm = bdlm.load(folder)
    assert lm.prompt_ids("") == [lm.tokenizer.bos_id]
    assert lm.generate("", max_new_tokens=3).tokens <= 3


def test_all_ending_tokens_of_the_folder_end_a_text(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path / "m", "qwen2")
    free = bdlm.load(folder).generate("x", max_new_tokens=8, temperature=0.0).token_ids
    ends = [0, free[4]]
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    made = bdlm.load(folder).generate("x", max_new_tokens=8, temperature=0.0)
    assert made.finish_reason == "stop_token" and made.token_ids == free[: free.index(free[4])]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path / "m", "llama", vocab_size=200)
    with pytest.raises(
        DataError, match="the tokenizer has 300 ids but the model has vocab_size 200"
    ):
        bdlm.load(folder)


def test_a_load_says_nothing_of_its_own(tmp_path: Path) -> None:
    """Not even about ids of the config beyond its vocabulary, which end or open no text."""
    folder = causal_folder(tmp_path / "m", "gpt2", bos_token_id=50256, eos_token_id=50256)
    code = f"import bdlm; lm = bdlm.load({str(folder)!r}); lm.generate('x', max_new_tokens=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_mask_token_of_a_prompt_is_not_asked_for(tmp_path: Path) -> None:
    lm = bdlm.load(causal_folder(tmp_path / "m", "qwen3"))
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        lm.generate("x", max_new_tokens=2, banned_token_ids=[-1])


def test_adapters_and_quantized_weights_are_refused(tmp_path: Path) -> None:
    folder = causal_folder(tmp_path / "m", "llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(CheckpointError, match="adapter"):
        bdlm.load(folder)
