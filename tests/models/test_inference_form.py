"""What is written follows the weights, however they change, and no form is made again while they do
not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bdlm
from bdlm.generation.engine.engine import generate
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.inference_form import InferenceFormCache, fingerprint
from tests.contracts.builders import randomised, tiny_dit


def swap(w: torch.Tensor) -> None:
    w.data.copy_(w.data.flip(0))


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda w: w.data.mul_(2),
    "one bit": lambda w: w.data.view(torch.int32).view(-1)[-1:].bitwise_xor_(1),
    "a sign": lambda w: w.data.view(-1)[:1].neg_(),
    "every sign": lambda w: w.data.neg_(),
    "the order": swap,
    "other memory": lambda w: w.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_texts_follow_the_weights(change: str) -> None:
    model: Any = randomised(tiny_dit("bd3lm", length=40, vocab=200), std=0.5)
    forms = InferenceFormCache(model)
    before = forms.form()
    assert forms.form() is before
    CHANGES[change](model.backbone.output_layer.linear.weight)
    assert forms.form() is not before
    write = lambda m: generate(m, [[1, 2]], SamplingParams(max_new_tokens=16))[0].log_probs
    assert write(forms.form()) == write(copy.deepcopy(model))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"]
)
def test_a_copy_has_weights_of_its_own(copied: Callable[[Any], Any]) -> None:
    lm = bdlm.load("shakespeare")
    text = lm.generate("", max_new_tokens=8).text
    other = copied(lm)
    other.model.backbone.output_layer.linear.weight.data.mul_(0)
    assert (
        lm.generate("", max_new_tokens=8).text == text != other.generate("", max_new_tokens=8).text
    )


def test_any_kind_of_numbers_counts() -> None:
    values = torch.arange(3000.0)
    for tensor in (
        values.bfloat16()[:13],
        values.half()[1:6],
        values.double()[:1],
        values[3:],
        values.view(50, 60).T,
        values[:0],
        values[0],
    ):
        before = fingerprint([tensor])
        assert torch.equal(fingerprint([tensor.clone()]), before)
        if tensor.numel():
            tensor.view(-1)[-1:].add_(999) if tensor.is_contiguous() else tensor[-1].add_(999)
            assert not torch.equal(fingerprint([tensor]), before)


def test_a_model_loaded_in_inference_mode_writes_and_is_scored() -> None:
    plain = bdlm.load("shakespeare")
    with torch.inference_mode():
        lm = bdlm.load("shakespeare")
    assert lm.generate("O", max_new_tokens=8).text == plain.generate("O", max_new_tokens=8).text
    assert lm.score("O king").nats_per_token == plain.score("O king").nats_per_token


def test_texts_do_not_depend_on_torchs_default_number_type() -> None:
    lm = bdlm.load("shakespeare")
    options: list[dict[str, Any]] = [
        {},
        {"decoder": "remdm"},
        {"decoder": "credit"},
        {"guidance_scale": 1.5},
        {"top_p": 0.9, "decoder": "eb"},
    ]
    write = lambda: [
        (t.text, t.log_probs)
        for t in (lm.generate("O king", max_new_tokens=10, **own) for own in options)
    ]
    score = lambda: lm.score("O king", method="nelbo-exact").nats_per_token
    expected = write(), score()
    torch.set_default_dtype(torch.float64)
    try:
        assert (write(), score()) == expected
    finally:
        torch.set_default_dtype(torch.float32)
