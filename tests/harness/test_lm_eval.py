"""The evaluation harness's real package on local tasks of each kind, against our own figures.
Skipped without it (extra "eval")."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bdlm import cli
from bdlm.api import LM
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.types import ModelSpec
from bdlm.data.tokenizers import ByteTokenizer
from bdlm.models.toy import Inconsistent

TASKS = {
    "pick": (
        """
task: bdlm_pick
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/pick.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
    ),
    "roll": (
        """
task: bdlm_roll
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/roll.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""
    ),
    "write": (
        """
task: bdlm_write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/write.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
    ),
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
    """-log p of an opened text is what `evaluate` gives; a continuation is the difference of two
    texts at a block border."""
    text = "the cat sat on the mat"
    opened = [model.lm.tokenizer.eos_id, *model.lm.tokenizer.encode(text)]
    from bdlm.likelihood.bound import evaluate
    from bdlm.likelihood.rows import whole_documents

    whole = evaluate(model.lm.model, whole_documents([opened]), method="exact")
    assert model.loglikelihood_rolling(asked((text,))) == [
        pytest.approx(-whole.nats_per_token * whole.tokens)
    ]
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
    wrote = greedy(model, "a cat", 4)
    found = model.loglikelihood(asked(("a cat", wrote), ("a cat", "zzzz")))
    assert [greedy for _, greedy in found] == [True, False]


def greedy(model: Any, context: str, tokens: int) -> str:
    """What the model writes greedily after a context, with the seed that the harness derives from
    the two."""
    ids, _ = model._pair(context, " ")
    params = model._params({"max_gen_toks": tokens}, ids, ignore_eos=True)
    (wrote,) = model.lm.generate_from_ids([ids], [params])
    assert model.lm.tokenizer.encode(wrote.text) == wrote.token_ids, (
        "the bytes are a text that a task can ask for"
    )
    return wrote.text


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_an_answer_is_its_own_whatever_stands_beside_it(
    harness: Any, tiny_model: Path, rows: int
) -> None:
    """Equal requests get equal answers, and the same ones alone, at any batch size and place."""
    how = {"pretrained": str(tiny_model), "replicates": 1}
    alone, model = harness.Harness(batch_size=1, **how), harness.Harness(batch_size=rows, **how)
    pair, text, until = (
        ("the cat sat on the", " mat"),
        ("the dog saw the cat, and the sun rose on the town",),
        {"until": [], "max_gen_toks": 12},
    )
    others = [("a bird", " sang"), ("zzz", "qqqq")]
    ((nats, same),) = alone.loglikelihood(asked(pair))
    found = model.loglikelihood(asked(others[0], pair, pair, others[1], pair, pair))
    assert len(set(found[i] for i in (1, 2, 4, 5))) == 1 and found[1] == (
        pytest.approx(nats, rel=1e-5),
        same,
    )
    (whole,) = alone.loglikelihood_rolling(asked(text))
    rolled = model.loglikelihood_rolling(asked(("a bird sang",), text, ("zzz",), text))
    assert rolled[1] == rolled[3] == pytest.approx(whole, rel=1e-5)
    for wish in (until, until | {"temperature": 1.0, "do_sample": True}):
        (wrote,) = alone.generate_until(asked(("the", wish)))
        wrote_here = model.generate_until(
            asked(("a", wish), ("the", wish), ("b", wish), ("the", wish))
        )
        assert wrote_here[1] == wrote and (wrote_here[3] == wrote) == ("temperature" not in wish), (
            "a sample asked for again is another"
        )


def test_noise_differs_between_requests_and_seeds(harness: Any, tiny_model: Path) -> None:
    one, other = (
        harness.Harness(str(tiny_model), replicates=1, seed=s).loglikelihood(
            asked(("the cat", " sat on the mat"))
        )
        for s in (0, 1)
    )
    assert one[0][0] != other[0][0]
    model = harness.Harness(str(tiny_model))
    assert model._params({}, [1, 2]).seed != model._params({}, [1, 3]).seed


class Few:
    """Three letters and the space, one a token."""

    bos_id = eos_id = None

    def encode(self, text: str) -> list[int]:
        return ["abc ".index(c) for c in text]

    def decode(self, ids: Any) -> str:
        return "".join("abc "[i] for i in ids)


def test_greedy_writing_sees_the_context_that_the_likelihood_sees(harness: Any, model: Any) -> None:
    """Spaces at the end of a context are a part of the continuation, and what is beyond the window
    is cut off."""
    other = harness.Harness(LM(Inconsistent(ModelSpec(5, 4, 4, 32)), Few()))
    contexts = ["".join(letters) for letters in itertools.product("abc", repeat=3)]
    spaced = [(c, wrote) for c in contexts if (wrote := greedy(other, c, 4)).startswith(" ")]
    assert spaced, "the test wants a context after which the model writes a space"
    assert all(
        same
        for _, same in other.loglikelihood(
            asked(*((c + " ", wrote[1:]) for c, wrote in spaced if wrote.strip()))
        )
    )
    long = "the cat sat on the mat. " * 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for context in ("the cat", long.rstrip()):
            ids, rest = model._pair(context + "  ", "sat")
            assert len(ids) + len(rest) <= model.lm.spec.max_length
            assert (
                model.lm.tokenizer.decode(ids + rest) in context + "  sat"
                and model.lm.tokenizer.decode(rest) == "  sat"
            )
            ids, _ = model._pair(context, "sits")
            (text,) = model.lm.generate_from_ids(
                [ids], [model._params({"max_gen_toks": 4}, ids, ignore_eos=True)]
            )
            assert (
                model.loglikelihood(asked((context, text.text)))[0][1]
                or model.lm.tokenizer.encode(text.text) != text.token_ids
            )
        (end,) = model.generate_until(asked((long, {"until": [], "max_gen_toks": 8})))
        cut = model._prompt(long)[-(model.lm.spec.max_length - 8) :]
        assert (
            end
            == model.lm.generate_from_ids(
                [cut], [model._params({"max_gen_toks": 8}, model._prompt(long))]
            )[0].text
        )


def test_prompts_are_cut_to_what_fits_before_the_new_tokens(harness: Any) -> None:
    spec = ModelSpec(11, 10, 4, 32)
    assert harness.room_before(spec, 8) == 24 and harness.room_before(spec, 256) == 16
    whole = ModelSpec(11, 10, 32, 32, streams=1)
    assert harness.room_before(whole, 31) == 1
    with pytest.raises(
        ConfigError, match="max_gen_toks is 32, but the model's window has 32 cells; use 31 or less"
    ):
        harness.room_before(whole, 32)


def test_empty_texts_and_continuations_have_a_likelihood_of_one(model: Any) -> None:
    assert model.loglikelihood_rolling(asked(("",), ("the cat",), ("",)))[::2] == [0.0, 0.0]
    assert model.loglikelihood_rolling(asked(("",))) == [0.0]
    found = model.loglikelihood(
        asked(("the cat", ""), ("the cat", " sat"), ("the cat ", ""), ("", ""))
    )
    assert [found[i] for i in (0, 2, 3)] == [(0.0, True)] * 3 and found[1][0] < 0
    assert (
        model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []
    )


def test_without_an_opening_token_a_texts_first_token_is_given(harness: Any) -> None:
    other = harness.Harness(LM(Inconsistent(ModelSpec(257, 256, 4, 32)), ByteTokenizer(end=False)))
    assert other.loglikelihood_rolling(asked(("a",))) == [0.0] and other.loglikelihood(
        asked(("", "a"))
    ) == [(0.0, True)]
    assert other.loglikelihood(asked(("", "ab")))[0][0] == pytest.approx(
        other.loglikelihood(asked(("a", "b")))[0][0]
    )


def test_arguments_that_do_not_exist_or_fit_are_said(harness: Any, model: Any) -> None:
    with pytest.raises(ConfigError, match="no argument 'replicate'; did you mean 'replicates'"):
        harness.Harness(model.lm, replicate=2)
    for wrong in (
        {"batch_size": "many"},
        {"batch_size": ""},
        {"batch_size": 0},
        {"batch_size": "auto", "max_batch_size": "x"},
    ):
        with pytest.raises(ConfigError, match="use 1 or more rows, or 'auto'"):
            harness.Harness(model.lm, **wrong)


def test_the_batch_size_may_be_ours_to_choose(harness: Any, model: Any) -> None:
    made = harness.Harness.create_from_arg_string(
        "method=exact",
        {"batch_size": "auto", "max_batch_size": None, "device": None, "pretrained": model.lm},
    )
    assert made.rows == harness.MOST_ROWS, "a tiny model"
    assert (
        harness.Harness(model.lm, batch_size="auto:4", max_batch_size=8).rows == 8
        and harness.Harness(model.lm, batch_size="3").rows == 3
    )
    large = SimpleNamespace(model=None, spec=ModelSpec(50_258, 50_257, 16, 1024))
    assert harness.rows_of_batch("auto", None, large) == 5


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
    short, long = (
        {"until": ["\n"], "max_gen_toks": 3},
        {
            "until": ["e"],
            "max_gen_toks": 12,
            "temperature": 0.7,
            "do_sample": True,
        },
    )
    mixed = model.generate_until(asked(("a", long), ("the", short), ("b", long)))
    alone = [model.generate_until(asked(a))[0] for a in (("the", short),)]
    assert mixed[1] == alone[0]
    assert len(mixed[1]) <= 3
    assert not any("e" in m for m in (mixed[0], mixed[2]))


def test_the_command_runs_local_tasks(
    harness: Any,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, records in {
        "pick": PICK,
        "roll": ROLL,
        "write": [{"prompt": "the", "answer": "x"}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (tmp_path / f"{name}.yaml").write_text(TASKS[name].replace("DATA", str(tmp_path)))
    words = [
        "lm-eval",
        "--model",
        tiny_model,
        "--include-path",
        tmp_path,
        "--tasks",
        "bdlm_pick",
        "bdlm_roll",
        "bdlm_write",
        "--json",
    ]
    words += ["--batch-size", "auto"]
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
