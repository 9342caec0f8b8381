"""The evaluation harness's real package on local tasks of each kind, against our own figures. Skipped without it (extra "eval")."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bdlm import cli
from bdlm.core.errors import UnsupportedError

TASKS = {
    "pick": """
task: bdlm_pick
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/pick.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "roll": """
task: bdlm_roll
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/roll.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "write": """
task: bdlm_write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/write.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}
PICK = [
    {"question": "the cat sat on the", "choices": [" mat", " qzx"], "answer": 0},
    {"question": "a bird", "choices": ["zzzz", " sang"], "answer": 1},
]
ROLL = [{"text": "the cat sat on the mat and the dog saw the cat"}, {"text": "a bird sang"}]


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("lm_eval", reason="optional: pip install 'bdlm[eval]'")
    from bdlm.harness import lm_eval

    return lm_eval


@pytest.fixture(scope="module")
def model(harness: Any, tiny_model: Path) -> Any:
    return harness.Harness(str(tiny_model), method="exact", batch_size=4)


def asked(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=a) for a in args]


def test_it_is_registered_under_our_name(harness: Any) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("bdlm") is harness.Harness


def test_likelihoods_are_those_of_the_library(model: Any) -> None:
    """-log p of an opened text is what `evaluate` gives; a continuation is the difference of two texts at a block border."""
    text = "the cat sat on the mat"
    opened = [model.lm.tokenizer.eos_id, *model.lm.tokenizer.encode(text)]
    from bdlm.likelihood.bound import evaluate
    from bdlm.likelihood.rows import whole_documents

    whole = evaluate(model.lm.model, whole_documents([opened]), method="exact")
    assert model.loglikelihood_rolling(asked((text,))) == [pytest.approx(-whole.nats_per_token * whole.tokens)]
    (both,) = model.loglikelihood_rolling(asked((text,)))
    cut = 11  # the opening token and 11 bytes are three blocks of 4
    (head,) = model.loglikelihood_rolling(asked((text[:cut],)))
    ((rest, greedy),) = model.loglikelihood(asked((text[:cut], text[cut:])))
    assert rest == pytest.approx(both - head, abs=1e-4)
    assert greedy is False
    ((empty, _),) = model.loglikelihood(asked(("", text)))
    assert empty == pytest.approx(both, abs=1e-6), "an empty context is the opening token"


def test_long_texts_are_scored_whole(model: Any) -> None:
    long = "the cat sat on the mat. " * 8
    (total,) = model.loglikelihood_rolling(asked((long,)))
    assert len(long) > 3 * model.lm.spec.max_length
    assert -total / len(long) == pytest.approx(5, abs=1.5)
    ((tail, _),) = model.loglikelihood(asked((long, " the end")))
    assert -20 * 8 < tail < 0


def test_what_greedy_writing_gives_is_marked_greedy(model: Any) -> None:
    wrote = model.lm.generate("a cat", max_new_tokens=4, temperature=0.0, ignore_stop=True)
    assert model.lm.tokenizer.encode(wrote.text) == wrote.ids, "the bytes are a text that a task can ask for"
    found = model.loglikelihood(asked(("a cat", wrote.text), ("a cat", "zzzz")))
    assert [greedy for _, greedy in found] == [True, False]


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model: Any) -> None:
    (one, _), (two, _) = model.loglikelihood(asked(("the cat ", "sat"), ("the cat", " sat")))
    assert one == two


def test_a_token_that_would_reach_over_the_cut_is_split(harness: Any, model: Any) -> None:
    from bdlm.data.tokenizers import train_bpe

    pieces = train_bpe(["the cat and the other cat " * 50], 270)
    other = harness.Harness(replace(model.lm, tokenizer=pieces))
    for context, continuation in (("the c", "at"), ("the", " cat"), ("the cat ", "and")):
        head, tail = other._pair(context, continuation)
        assert tail
        assert pieces.decode([*head[len(other._opening()) :], *tail]) == context + continuation


def test_texts_keep_their_places_and_stop(model: Any) -> None:
    short, long = {"until": ["\n"], "max_gen_toks": 3}, {"until": ["e"], "max_gen_toks": 12, "temperature": 0.7, "do_sample": True}
    mixed = model.generate_until(asked(("a", long), ("the", short), ("b", long)))
    alone = [model.generate_until(asked(a))[0] for a in (("the", short),)]
    assert mixed[1] == alone[0]
    assert len(mixed[1]) <= 3
    assert not any("e" in m for m in (mixed[0], mixed[2]))


def test_the_command_runs_local_tasks(
    harness: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, records in {"pick": PICK, "roll": ROLL, "write": [{"prompt": "the", "answer": "x"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (tmp_path / f"{name}.yaml").write_text(TASKS[name].replace("DATA", str(tmp_path)))
    words = ["lm-eval", "--model", tiny_model, "--include-path", tmp_path, "--tasks", "bdlm_pick", "bdlm_roll", "bdlm_write", "--json"]
    assert cli.run([str(w) for w in words]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 <= found["bdlm_pick"]["acc,none"] <= 1
    assert found["bdlm_write"]["exact_match,none"] == 0
    model = harness.Harness(str(tiny_model))
    nats = -sum(model.loglikelihood_rolling(asked(*((r["text"],) for r in ROLL))))
    bits = nats / math.log(2) / sum(len(r["text"]) for r in ROLL)
    assert found["bdlm_roll"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdlm.commands import lm_eval

    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'bdlm\[eval\]'"):
        lm_eval.run(lm_eval.Options(model="x", tasks=("y",)))
