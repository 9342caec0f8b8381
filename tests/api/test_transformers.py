"""The conventions of transformers: the same names give the same text, and its processors, criteria
and streamers work as they do there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import bdlm
from bdlm import LM
from tests.models.causal_folders import causal_folder

PROMPT, NEW = "the quick brown", 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def causal(folder: Path) -> LM:
    return bdlm.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def blocks(tiny_model: Path) -> LM:
    return bdlm.load(tiny_model)


def both(causal: LM, theirs: tuple[Any, Any], ours: Any, **options: Any) -> tuple[Any, list[int]]:
    """What the library and transformers generate under options of the same names."""
    model, tokenizer = theirs
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    # the rows of the embedding that no token has are never written here
    spare = sorted(causal.spec.unused_ids)
    made = causal.generate(PROMPT, max_new_tokens=NEW, **ours, **options)
    said = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, suppress_tokens=spare, **options
    )[0].tolist()
    return made, said


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}])
def test_greedy_text_is_that_of_transformers(
    causal: LM, theirs: tuple[Any, Any], greedy: dict[str, Any]
) -> None:
    made, said = both(causal, theirs, greedy)
    assert made.tokens == NEW
    assert made.sequences == said


def test_criteria_end_a_text_where_transformers_ends_it(
    causal: LM, theirs: tuple[Any, Any]
) -> None:
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    whole = causal.generate(PROMPT, max_new_tokens=NEW, temperature=0)
    token = whole.token_ids[7]

    def met(input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return input_ids[:, -1] == token

    for criteria in ([met], [MaxLengthCriteria(len(whole.prompt_token_ids) + 5)]):
        asked = {"stopping_criteria": StoppingCriteriaList(criteria)}
        made, said = both(causal, theirs, {"temperature": 0}, **asked)
        assert made.sequences == said and made.tokens < NEW
        assert made.finish_reason == "stopping_criteria"


def test_processors_are_those_of_transformers(causal: LM, theirs: tuple[Any, Any]) -> None:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    asked = {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])}
    plain = causal.generate(PROMPT, max_new_tokens=NEW, temperature=0)
    made, said = both(causal, theirs, {"temperature": 0}, **asked)
    assert made.sequences == said != plain.sequences


def test_a_streamer_gets_what_transformers_puts(causal: LM, theirs: tuple[Any, Any]) -> None:
    class Ids:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    ours, other = Ids(), Ids()
    made = causal.generate(PROMPT, max_new_tokens=NEW, temperature=0, streamer=ours)
    model, tokenizer = theirs
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=sorted(causal.spec.unused_ids),
        streamer=other,
    )
    assert ours.got == other.got == made.sequences
    assert ours.ended == other.ended == 1


def test_criteria_are_asked_after_each_token_of_a_finished_block(blocks: LM) -> None:
    plain = blocks.generate("the", max_new_tokens=20, seed=2)
    start, seen = len(plain.prompt_token_ids), []

    def never(input_ids: torch.Tensor, scores: Any) -> bool:
        assert input_ids.dtype == torch.long and input_ids.shape[0] == 1 and scores is None
        seen.append(input_ids[0].tolist())
        return False

    assert (
        blocks.generate("the", max_new_tokens=20, seed=2, stopping_criteria=[never]).token_ids
        == plain.token_ids
    )
    assert seen == [plain.sequences[: start + n] for n in range(1, 21)]
    for n in (1, 6, 7, 20):
        at = [lambda ids, _, n=n: ids.shape[1] == start + n]
        made = blocks.generate("the", max_new_tokens=20, seed=2, stopping_criteria=at)
        assert made.token_ids == plain.token_ids[:n]
        assert made.finish_reason == "stopping_criteria"
        pieces = list(blocks.stream("the", max_new_tokens=20, seed=2, stopping_criteria=at))
        assert "".join(c.text for c in pieces if c.kind == "text") == made.text
        late = {"min_new_tokens": 10, "stopping_criteria": at}
        after = blocks.generate("the", max_new_tokens=20, seed=2, **late)
        assert after.tokens == (n if n >= 10 else 20)
    yes = [lambda ids, _: torch.ones(1, dtype=torch.bool)]
    made = blocks.generate("the", max_new_tokens=20, min_new_tokens=9, stopping_criteria=yes)
    assert made.tokens == 9


def test_a_criterion_and_a_stop_string_end_at_the_first(blocks: LM) -> None:
    plain = blocks.generate("the", max_new_tokens=20, seed=2)
    start = len(plain.prompt_token_ids)
    late = [lambda ids, _: ids.shape[1] >= start + 9]
    stop = plain.text[4:6]
    made = blocks.generate("the", max_new_tokens=20, seed=2, stop=stop, stopping_criteria=late)
    assert made.finish_reason == "stop_text" and made.text == plain.text[: plain.text.index(stop)]
    early = [lambda ids, _: ids.shape[1] >= start + 2]
    made = blocks.generate("the", max_new_tokens=20, seed=2, stop=stop, stopping_criteria=early)
    assert made.finish_reason == "stopping_criteria" and made.token_ids == plain.token_ids[:2]


def test_a_criterion_that_raises_is_told(blocks: LM) -> None:
    def broken(input_ids: torch.Tensor, scores: Any) -> bool:
        raise KeyError("of the criterion")

    with pytest.raises(KeyError, match="of the criterion"):
        blocks.generate("the", max_new_tokens=8, stopping_criteria=[broken])


def test_diffusion_processors_get_the_steps_that_remain(blocks: LM) -> None:
    class Watch:
        any_order = True

        def __init__(self) -> None:
            self.steps: list[int] = []

        def __call__(self, input_ids: Any, scores: Any, cur_step: int) -> Any:
            self.steps.append(cur_step)
            return scores

    watch = Watch()
    made = blocks.generate("", max_new_tokens=8, logits_processor=[watch])
    size = blocks.spec.block_size
    assert len(watch.steps) == 8, "a step for each token"
    assert watch.steps[0] == size > 1
    assert all(b in (a - 1, size) for a, b in itertools.pairwise(watch.steps)), "counted down"
    assert watch.steps.count(size) in (2, 3), "from the block's size in each block"
    assert made.token_ids == blocks.generate("", max_new_tokens=8).token_ids


def test_the_temperature_schedule_of_transformers_runs(blocks: LM) -> None:
    module = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and "cur_step" in getattr(kind.__call__, "__annotations__", {})
    ]
    if not kinds:
        pytest.skip("this transformers has no processor that takes cur_step")
    size = blocks.spec.block_size
    schedule = kinds[0](1e-4, 1e-4, size)  # cold at every step, so that draws are greedy
    schedule.any_order = True
    cold = blocks.generate("the", max_new_tokens=12, temperature=0)
    assert (
        blocks.generate("the", max_new_tokens=12, logits_processor=[schedule]).token_ids
        == cold.token_ids
    )
