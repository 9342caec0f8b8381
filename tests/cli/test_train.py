"""`bdlm train`: a run from recipe to text, and what is refused without changing a file."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_train_then_eval_then_generate(bdlm: Run, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = (
        "--model.hidden_dim",
        32,
        "--model.length",
        32,
        "--valid.rows",
        4,
        "--log.progress",
        "false",
        "--optim.batch_size=8",
    )
    code, said, _ = bdlm(
        "train", "tiny", "--data", text_file, "--max-steps", 4, "--out", out, *sizes, "--json"
    )
    assert code == 0
    model = json.loads(said)["model"]
    code, said, _ = bdlm(
        "eval", "--model", model, "--data", text_file, "--max-tokens", 200, "--json"
    )
    assert code == 0
    assert json.loads(said)["tokens"] >= 200
    code, said, _ = bdlm("generate", "--model", model, "--max-new-tokens", 5, "--json")
    assert code == 0
    assert json.loads(said)["tokens"] <= 5
    assert (
        bdlm(
            "train",
            "tiny",
            "--data",
            text_file,
            "--max-steps",
            4,
            "--out",
            out,
            *sizes,
            "--resume",
            "never",
        )[0]
        == 2
    )


def test_a_refused_command_changes_no_file(bdlm: Run, tiny_model: Path) -> None:
    """Another seed, width, tokenizer or folder of the run that is there: every file of it stays
    what it was."""
    run = tiny_model.parent
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = (
        (("--seed", 7), "seed"),
        (("--model.hidden_dim", 64), "model.hidden_dim"),
        (("--data.tokenizer", "bytes-no-end"), "data.tokenizer"),
        (("--resume", "never"), "resume"),
        (("--resume", run / "nowhere"), "nowhere"),
    )
    for words, expected in refused:
        code, _, err = bdlm("train", run / "config.json", *words)
        assert code == 2, err
        assert expected in err, err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_limit_below_what_a_run_has_behind_it_is_refused(bdlm: Run, tiny_model: Path) -> None:
    recipe = tiny_model.parent / "config.json"
    for words, said in (
        (("--max-steps", 10), "limits.steps is 10, but the run in"),
        (("--max-tokens", 10), "limits.tokens is 10, but the run in"),
    ):
        code, _, err = bdlm("train", recipe, *words)
        assert code == 2
        assert said in err
        assert "raise it" in err
        assert len(err.splitlines()) == 1
    assert json.loads(recipe.read_text())["limits"]["steps"] == 12
