"""Which distribution a decoder ranks cells by: the model's own, so that the limits of sampling are
greedy decoding."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bdlm.core.types import Denoiser
from bdlm.generation.decoders import DECODERS, Decoder, View, make_decoder
from bdlm.generation.decoders.confidence import SCORES, candidates, score
from bdlm.generation.decoders.learned import LEAD, Indicator, lead, save_indicator
from bdlm.generation.engine.engine import generate
from bdlm.generation.full_sequence.engine import generate_full_sequence
from bdlm.generation.sampling_params import SamplingParams
from tests.contracts.builders import randomised, tiny_dit
from tests.contracts.test_decoders import KNOBS, PROMPTS, fits
from tests.generation.test_decoders_by_hand import decide, see

RANKING = [
    name for name, kind in DECODERS.items() if "confidence" in {f.name for f in fields(kind)}
]
# these look at no probability
PLACED = ("first-hitting", "speculative", "ancestral", "left-to-right", "dilated", "interleaved")
LIMITS: dict[str, dict[str, Any]] = {
    "top_k 1": {"top_k": 1},
    "a tiny temperature": {"temperature": 1e-6},
    "a temperature of a denormal": {"temperature": 1e-40},
    "top_p": {"top_p": 1e-9},
    "min_p 1": {"min_p": 1.0},
    "all": {"top_k": 1, "min_p": 0.5, "temperature": 0.3, "top_p": 0.9},
    "top_p at zero": {"top_p": 0.5, "temperature": 0.0},
}


def native(algo: str) -> Denoiser:
    """The tiny transformer in float64, its weights small enough for its predictions to be
    doubtful."""
    return randomised(tiny_dit(algo), std=0.3).double()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return native("bd3lm")


def decoders(name: str, model: Denoiser, folder: Path) -> list[Decoder]:
    if name == "ni":
        save_indicator(Indicator(16, model.spec.vocab_size), folder / "indicator")
        return [make_decoder(name, {"indicator": str(folder / "indicator"), "accept": 0.4})]
    return [make_decoder(name, options) for options in ({}, *KNOBS.get(name, []))]


def test_every_decoder_that_ranks_by_probability_says_by_which() -> None:
    assert sorted([*RANKING, *PLACED]) == sorted(DECODERS)
    for name in RANKING:
        assert {f.name: f.default for f in fields(DECODERS[name])}["confidence"] == "model"


@pytest.mark.parametrize("name", RANKING)
def test_the_limits_of_sampling_are_greedy_decoding(
    name: str, model: Denoiser, tmp_path: Path
) -> None:
    for decoder in decoders(name, model, tmp_path):
        if not fits(decoder, model):
            continue
        wanted = [
            (r.token_ids, r.forward_passes)
            for r in generate(
                model, PROMPTS, SamplingParams(max_new_tokens=8, decoder=decoder, temperature=0.0)
            )
        ]
        for what, limit in LIMITS.items():
            found = [
                (r.token_ids, r.forward_passes)
                for r in generate(
                    model, PROMPTS, SamplingParams(max_new_tokens=8, decoder=decoder, **limit)
                )
            ]
            assert found == wanted, what


@pytest.mark.parametrize("name", ["eb", "threshold", "fixed-k", "factor"])
def test_filters_change_the_reading_only_if_asked_to(name: str, model: Denoiser) -> None:
    """With one token left, everything is certain to a decoder that reads what is drawn from: a
    block a forward pass."""
    options = {"max_new_tokens": 16, "top_k": 1, "decoder": name}
    passes = {
        reading: (
            generate(
                model, [[1, 2, 0, 1]], SamplingParams(**options, options={"confidence": reading})
            )[0].forward_passes
        )
        for reading in ("model", "sampling")
    }
    assert passes["model"] > passes["sampling"] or name == "fixed-k"
    if name in ("eb", "threshold"):
        assert passes["sampling"] == 4, "blocks of four"


def test_transformers_warpers_at_the_end_count_as_filters(model: Denoiser) -> None:
    from transformers import SuppressTokensLogitsProcessor, TopKLogitsWarper

    shared = {"max_new_tokens": 12, "decoder": "threshold", "options": {"tau": 0.3}}
    off = SuppressTokensLogitsProcessor([4])
    texts = [
        generate(model, PROMPTS, SamplingParams(**shared, **more))
        for more in (
            {"top_k": 1, "banned_token_ids": (4,)},
            {"logits_processor": (off, TopKLogitsWarper(1))},
        )
    ]
    assert [(r.token_ids, r.forward_passes) for r in texts[0]] == [
        (r.token_ids, r.forward_passes) for r in texts[1]
    ]


def test_writing_under_a_cache_ranks_alike() -> None:
    whole = native("mdlm")
    greedy, *limits = (
        generate_full_sequence(
            whole,
            [[1, 2]],
            SamplingParams(max_new_tokens=8, decoder="eb", options={"gamma": 1.5}, **limit),
            "none",
        )[0]
        for limit in ({"temperature": 0.0}, *LIMITS.values())
    )
    assert all(
        (t.token_ids, t.forward_passes) == (greedy.token_ids, greedy.forward_passes) for t in limits
    )


# -- by hand ---------------------------------------------------------------------------------------

MODEL = [[0.5, 0.45, 0.05], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]]


def filtered() -> View:
    """Drawn from: the two likeliest tokens, at cell 0 one alone. So the order by confidence is 2 1
    0, and 0 2 1 after the filters."""
    view = see(MODEL)
    logits = view.logits.clone()
    logits[:, 2], logits[0, 1] = float("-inf"), float("-inf")
    return replace(view, logits=logits, model=view.logits)


def test_confidence_is_the_models_probability_of_the_candidate() -> None:
    view = filtered()
    ids = candidates(view)
    assert score(view, ids, "confidence").tolist()[0] == pytest.approx([0.5, 0.6, 0.7])
    assert score(view.reading("sampling"), ids, "confidence").tolist()[0] == pytest.approx(
        [1.0, 6 / 9, 7 / 9]
    )
    assert [decide("fixed-k", view, k=1, confidence=r) for r in ("model", "sampling")] == [[2], [0]]
    assert [decide("threshold", view, tau=0.65, confidence=r) for r in ("model", "sampling")] == [
        [2],
        [0, 1, 2],
    ]
    for name in SCORES:
        decide("fixed-k", view, score=name, confidence="sampling")


def test_the_best_token_is_one_that_may_be_drawn() -> None:
    view = filtered()
    # a filter that takes the likeliest token away
    view = replace(view, logits=view.logits.roll(1, 1))
    view.logits[:, 0] = float("-inf")
    assert view.best[1][0].tolist() == [1, 1, 1] and view.best[0][0].tolist() == pytest.approx(
        [0.45, 0.3, 0.2]
    )


def test_credit_comes_before_the_filters() -> None:
    view = see([[0.55, 0.45, 0.0]])
    only_best = lambda model, query_mask: model.masked_fill(
        model < model.amax(1, keepdim=True), float("-inf")
    )
    state = {"credit": torch.tensor([[[0.0, 9.0, 0.0, 0.0]]])}
    view = replace(
        view,
        model=view.logits,
        logits=only_best(view.logits, view.query_mask),
        cut=only_best,
        state=state,
    )
    commit = make_decoder("credit").choose(view)
    assert commit.ids[0, 0] == 1, "raised above the token that the filter kept before"


def test_the_lead_is_in_nats_of_the_models_logits() -> None:
    view = see([[0.7, 0.2, 0.1]])
    far = float(torch.tensor(0.7 / 0.2).log())
    assert float(lead(view)) == pytest.approx(far)
    only = view.logits.clone()
    only[:, 1:] = float("-inf")
    assert float(
        lead(replace(view, logits=only, model=view.logits, temperature=torch.ones(1)))
    ) == pytest.approx(far)
    cold = replace(
        view, logits=view.logits / 1e-6, model=view.logits, temperature=torch.full((1,), 1e-6)
    )
    assert float(lead(cold)) == pytest.approx(far, abs=1e-4)
    assert float(lead(replace(view, logits=only))) == LEAD
