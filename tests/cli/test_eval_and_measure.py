"""`bdlm eval`, `measure` and `frontier`: the JSON contract, and what each says of its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_eval_json_contract(bdlm: Run, tiny_model: Path, text_file: Path) -> None:
    code, out, _ = bdlm(
        "eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 300, "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert {
        "nats_per_token",
        "stderr",
        "perplexity",
        "bits_per_byte",
        "tokens",
        "method",
    } <= facts.keys()
    assert facts["perplexity"] == pytest.approx(2.718281828 ** facts["nats_per_token"], rel=1e-6)
    # bytes: a token is a byte
    assert facts["bits_per_byte"] == pytest.approx(facts["nats_per_token"] / 0.6931471806, rel=0.02)
    assert (
        json.loads(
            bdlm("eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 300, "--json")[
                1
            ]
        )
        == facts
    )


def test_eval_says_what_the_error_of_one_window_holds(
    bdlm: Run, tiny_model: Path, text_file: Path
) -> None:
    words = ("eval", "--model", tiny_model, "--data", text_file, "--max-tokens", 20)
    assert "one window: the error is of the noise alone" in bdlm(*words)[1]
    assert "one window: no standard error" in bdlm(*words, "--block-size", 1)[1]
    facts = json.loads(bdlm(*words, "--block-size", 1, "--json")[1])
    assert (facts["stderr"], facts["remark"]) == (None, "one window: no standard error")
    assert json.loads(bdlm(*words[:-1], 200, "--json")[1])["remark"] is None


def test_measure_says_what_it_did_not_measure(bdlm: Run, text_file: Path) -> None:
    code, out, _ = bdlm("measure", "--texts", text_file)
    assert code == 0
    assert "None" not in out
    assert "not measured; needs --held-out" in out
    assert "not measured; needs --training" in out
    assert json.loads(bdlm("measure", "--texts", text_file, "--json")[1])["kl"] is None


def test_frontier_lists_its_points_without_a_folder(
    bdlm: Run, tiny_model: Path, text_file: Path
) -> None:
    words = (
        "frontier",
        "--model",
        tiny_model,
        "--prompts",
        text_file,
        "--list",
        "--decoders",
        "fixed-k",
    )
    code, out, err = bdlm(*words)
    assert code == 0
    assert "5 points" in out
    assert "left out: fixed-k k 6" in err, "blocks of the model have 4 cells"


def test_frontier_lists_its_points_as_json(bdlm: Run, tiny_model: Path, text_file: Path) -> None:
    words = (
        "frontier",
        "--model",
        tiny_model,
        "--prompts",
        text_file,
        "--texts",
        8,
        "--list",
        "--json",
        "--decoders",
        "fixed-k",
    )
    code, out, err = bdlm(*words)
    facts = json.loads(out)
    assert code == 0 and (facts["texts"], facts["max_new_tokens"]) == (8, 256)
    assert [point["options"].get("k") for point in facts["points"]] == [None, 1, 2, 3, 4]
    assert [f"left out: {line}" for line in facts["left_out"]] == err.splitlines()
