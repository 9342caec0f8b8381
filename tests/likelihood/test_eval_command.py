"""`bdlm eval` and `LM.score`: views, methods and fitted counts from the command line, and what goes
wrong in one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bdlm import cli


@pytest.fixture
def run(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Any:
    """`run("--method", "exact")` -> the report as a dictionary; exit codes other than 0 give the
    error line."""

    def call(*words: Any, data: Any = text_file) -> Any:
        code = cli.run(
            [
                str(w)
                for w in (
                    "eval",
                    "--model",
                    tiny_model,
                    "--data",
                    data,
                    "--max-tokens",
                    120,
                    "--json",
                    *words,
                )
            ]
        )
        said = capsys.readouterr()
        return json.loads(said.out) if code == 0 else (code, said.err.strip())

    return call


def test_exact_is_below_the_bounds_on_the_same_tokens(run: Any) -> None:
    exact, bound, loose = (run("--method", m) for m in ("exact", "nelbo-exact", "k-orders"))
    assert exact["nats_per_token"] <= loose["nats_per_token"] + 5 * loose["stderr_monte_carlo"]
    assert exact["nats_per_token"] <= bound["nats_per_token"]
    assert exact["tokens"] == bound["tokens"] == loose["tokens"]
    assert (exact["passes"], exact["estimator"], loose["estimator"], loose["replicates"]) == (
        15,
        None,
        "16 orders",
        4,
    )


def test_counts_can_be_fitted_on_other_data(run: Any, text_file: Path) -> None:
    found = run("--estimator", "importance", "--fit-on", text_file)
    assert found["estimator"] == "importance"
    assert found["stderr_monte_carlo"] > 0
    assert "fitted on other data" in run("--estimator", "importance")[1]


def test_a_target_that_is_not_reached_is_said(
    run: Any, tiny_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = run("--target-stderr", "1e-9", "--max-replicates", 3, "--replicates", 2)
    assert (facts["replicates"], facts["target_stderr"], facts["target_reached"]) == (
        3,
        1e-9,
        False,
    )
    assert (
        "target_stderr 1e-09 was not reached" in facts["remark"]
        and f"{facts['stderr_monte_carlo']:.2g} after 3 draws" in facts["remark"]
    )
    assert (
        cli.run(
            [
                "eval",
                "--model",
                str(tiny_model),
                "--data",
                str(text_file),
                "--max-tokens",
                "120",
                "--target-stderr",
                "1e-9",
                "--max-replicates",
                "3",
                "--replicates",
                "2",
            ]
        )
        == 0
    )
    assert facts["remark"] in capsys.readouterr().out
    met = run(
        "--target-stderr",
        2 * facts["stderr_monte_carlo"] + 1,
        "--max-replicates",
        3,
        "--replicates",
        2,
    )
    assert (met["replicates"], met["target_reached"], met["remark"]) == (2, True, None)
    assert (
        run("--target-stderr", 0.5, "--max-replicates", 1, "--replicates", 1)["target_reached"]
        is False
    ), "one draw tells no error"
    assert (
        run()["target_reached"] is None
        and run("--method", "exact", "--target-stderr", 0)["target_reached"] is True
    )


def test_a_bar_is_off_the_screen_however_an_evaluation_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rich.progress import Progress

    from bdlm.likelihood.bound import _shown

    ended: list[bool] = []
    monkeypatch.setattr(Progress, "stop", lambda self: ended.append(True))
    with pytest.raises(KeyboardInterrupt), _shown(True) as told:
        told(1, 2)
        raise KeyboardInterrupt
    assert ended


def test_views(run: Any, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text(
        "".join(f"the cat sat on mat number {i} and the dog saw it\n" for i in range(40))
    )
    whole = run("--view", "documents", "--split", "line", data=lines)
    slid = run("--view", "sliding", "--split", "line", "--stride", 8, "--positions", 16, data=lines)
    assert whole["unit"] == slid["unit"] == "window", "few documents in so few tokens"
    assert whole["units"] == 3, "few documents in so few tokens"
    assert [p["first"] for p in slid["positions"]] == [0, 16, 32]
    assert (
        run("--view", "documents", "--split", "line", "--unit", "document", data=lines)["unit"]
        == "document"
    )
    cut = run(
        "--view",
        "documents",
        "--split",
        "line",
        "--document-tokens",
        32,
        "--positions",
        16,
        data=lines,
    )
    assert [p["tokens"] for p in cut["positions"]] == [
        15 * cut["units"],
        16 * cut["units"],
    ], "the first cell of each is given"


def test_the_target_is_reached(run: Any) -> None:
    target = run()["stderr_monte_carlo"] / 2
    found = run("--target-stderr", target)
    assert found["replicates"] > 4
    assert found["stderr_monte_carlo"] <= target


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "exact", "--block-size", 16), "use method 'k-orders'"),
        (("--view", "slide"), "did you mean 'sliding'"),
        (("--view", "sliding", "--stride", 32), "1 <= stride < window"),
        (("--document-tokens", 32), "with view 'sliding' or 'documents'"),
        (("--schedule", "clipped:0.3,0.8", "--estimator", "time"), "training distribution"),
        (("--unit", "doc"), "unit is 'doc'"),
        (("--max-tokens", 0), "--max-tokens is 0"),
        (("--detokenizer", "ptbb"), "did you mean 'ptb'"),
    ],
)
def test_mistakes(run: Any, words: tuple[Any, ...], message: str) -> None:
    code, line = run(*words)
    assert code == 2
    assert message in line
    assert len(line.splitlines()) == 1


def test_scores_of_long_texts_slide(tiny_model: Path) -> None:
    import bdlm

    lm = bdlm.load(tiny_model)
    long = "the cat sat on the mat. " * 5
    found = lm.score(long, method="exact")
    assert found.tokens == len(long) > 3 * lm.spec.max_length, (
        "behind its opening token every byte is scored"
    )
    assert lm.score(["the cat", "the dog sat"]).tokens == 7 + 11
