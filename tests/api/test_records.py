"""What comes back: one record of a finished text, and parameters as a record or as keywords."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from pathlib import Path

import pytest

import bdlm
from bdlm import LM, SamplingParams


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LM:
    return bdlm.load(tiny_model)


def test_a_record_tells_the_whole_story(lm: LM) -> None:
    made = lm.generate("the cat", max_new_tokens=10, seed=4)
    first = lm.spec.first_token
    ids = ([] if first is None else [first]) + lm.tokenizer.encode("the cat")
    assert made.prompt == "the cat" and made.prompt_token_ids == ids
    assert made.sequences == ids + made.token_ids
    assert made.tokens == len(made.token_ids) == len(made.log_probs) == 10
    assert made.text == lm.tokenizer.decode(made.token_ids)
    assert made.tokens_per_forward == made.tokens / made.forward_passes
    assert made.finish_reason == "length" and made.seconds > 0
    assert "text=" in repr(made) and "token_ids" not in repr(made)
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    chunk = list(lm.stream("the cat", max_new_tokens=10, seed=4))[-1].result
    assert chunk is not None and chunk.sequences == made.sequences


def test_params_as_a_record_are_params_as_keywords(lm: LM) -> None:
    asked = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 5, "seed": 9, "decoder": "fixed-k"}
    params = SamplingParams(**asked, options={"k": 2})  # type: ignore[arg-type]
    by_name = lm.generate(["the", "a"], **asked, k=2)  # type: ignore[call-overload]
    for given in (params, [params, params.with_(seed=10)]):
        made = lm.generate(["the", "a"], given)
        assert [m.token_ids for m in made] == [m.token_ids for m in by_name]
    assert lm.generate("the", sampling_params=params).token_ids == by_name[0].token_ids
    (last,) = [c.result for c in lm.stream("the", params) if c.kind == "end"]
    assert last is not None and last.token_ids == by_name[0].token_ids
    ids = [m.prompt_token_ids for m in by_name]
    assert [m.token_ids for m in lm.generate_from_ids(ids, params)] == [
        m.token_ids for m in by_name
    ]


def test_infilling_takes_a_record(lm: LM) -> None:
    params = SamplingParams(temperature=0.5, seed=3)
    made = lm.infill("the ", " mat", 6, params)
    assert made.text.endswith(" mat")
    assert made.token_ids == lm.infill("the ", " mat", 6, temperature=0.5, seed=3).token_ids


def test_a_missing_attribute_names_the_nearest(lm: LM) -> None:
    made = lm.generate("a", max_new_tokens=2)
    with pytest.raises(AttributeError, match="did you mean 'token_ids'"):
        made.tokens_ids  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(made, "__fspath__")
    assert {f.name for f in fields(made)} >= {"text", "notes", "context_window"}
