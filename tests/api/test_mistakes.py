"""Mistakes from Python: each is a `BdlmError` in one line that names the argument, the value and
the suggested fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bdlm
from bdlm.api import LM
from bdlm.generation.decoders import DECODERS
from bdlm.training.config import TrainConfig, load_config
from bdlm.training.sections import DataSection, ModelSection

NAN = float("nan")
OF_MODEL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "score, unknown": (lambda lm: lm.score("a", foo=1), "has no argument 'foo'"),
    "score, misspelt": (lambda lm: lm.score("a", replicate=2), "did you mean 'replicates'"),
    "score, nothing": (lambda lm: lm.score(), "missing a required argument: 'text'"),
    "score, unknown and nothing": (lambda lm: lm.score(foo=1), "has no argument 'foo'"),
    "score, a number": (lambda lm: lm.score(3), "text is 3; use text"),
    "score, a number among texts": (lambda lm: lm.score(["a", 3]), "text is ['a', 3]"),
    "score, bytes": (lambda lm: lm.score(b"abc"), "text is b'abc'"),
    "score, half a block": (lambda lm: lm.score("abc", block_size=2.5), "block_size is 2.5"),
    "score, method": (lambda lm: lm.score("abc", method=3), "method is 3"),
    "score, seed": (lambda lm: lm.score("abc", seed="x"), "seed is 'x'; use a whole number"),
    "score, batch": (lambda lm: lm.score("abc", batch_size=NAN), "batch_size is nan"),
    "score, tokenizer": (
        lambda lm: lm.score("abc", tokenizer=3),
        "has no argument 'tokenizer'",
    ),
    "evaluate, tokenizer": (
        lambda lm: lm.evaluate(__file__, tokenizer=3),
        "has no argument 'tokenizer'",
    ),
    "score, counts": (
        lambda lm: lm.score("abc", counts=3, estimator="importance"),
        "counts is 3; use a CountDistribution",
    ),
    "score, no UTF-8": (lambda lm: lm.score("\ud800"), "not valid UTF-8"),
    "evaluate, a number": (lambda lm: lm.evaluate(3), "data is 3; use text, a path"),
    "evaluate, no window": (lambda lm: lm.evaluate("story.txt", length=0), "length is 0"),
    "evaluate, length": (lambda lm: lm.evaluate("story.txt", length="x"), "length is 'x'"),
    "evaluate, mask": (lambda lm: lm.evaluate("story.txt", document_mask="x"), "true or false"),
    "evaluate, misspelt": (lambda lm: lm.evaluate("story.txt", viw="x"), "did you mean 'view'"),
    "generate, unknown": (lambda lm: lm.generate(foo=1), "option 'foo' is unknown"),
    "generate, misspelt": (
        lambda lm: lm.generate("a", max_new_token=64),
        "did you mean 'max_new_tokens'",
    ),
    "generate, prompt": (lambda lm: lm.generate(3), "prompt is 3; use text or a list of texts"),
    "generate, prompt twice": (
        lambda lm: lm.generate("a", prompt="b"),
        "multiple values for argument 'prompt'",
    ),
    "generate, tokens": (
        lambda lm: lm.generate("a", max_new_tokens=True),
        "max_new_tokens is True",
    ),
    "generate, a number": (
        lambda lm: lm.generate("a", 40),
        "or name the option: max_new_tokens=40",
    ),
    "generate, params of text": (
        lambda lm: lm.generate("a", "eb"),
        "sampling_params is 'eb'; use a SamplingParams",
    ),
    "generate, params and options": (
        lambda lm: lm.generate("a", bdlm.SamplingParams(), temperature=1.0),
        "use sampling_params.with_(temperature=...)",
    ),
    "generate, params and a decoder's option": (
        lambda lm: lm.generate("a", sampling_params=bdlm.SamplingParams(decoder="eb"), gamma=1.0),
        "use sampling_params.with_(gamma=...)",
    ),
    "generate, params of others": (
        lambda lm: lm.generate(["a", "b"], [bdlm.SamplingParams()] * 3),
        "2 prompts came with 3 params",
    ),
    "params, misspelt": (
        lambda lm: bdlm.SamplingParams(temprature=1.0),
        "SamplingParams has no argument 'temprature'; did you mean 'temperature'",
    ),
    "generate, criteria": (
        lambda lm: lm.generate("a", stopping_criteria=[3]),
        "stopping_criteria is [3]",
    ),
    "generate, a cache that is not needed": (
        lambda lm: lm.generate("a", cache="dual"),
        "this model caches exactly; leave cache out",
    ),
    "generate, options of no cache": (
        lambda lm: lm.generate("a", cache_options={"refresh": 2}),
        "cache_options came without a cache",
    ),
    "generate, cache and window": (
        lambda lm: lm.generate("a", cache="dual", context_window=8),
        "context_window does not work with cache",
    ),
    "stream, cache": (
        lambda lm: lm.stream("a", cache="dual"),
        "cache is an option of generate",
    ),
    "generate, window": (
        lambda lm: lm.generate("a", context_window="x"),
        "context_window is 'x'",
    ),
    "generate, block": (
        lambda lm: lm.generate("a", max_new_tokens=4, block_size=2.0),
        "block_size is 2.0",
    ),
    "generate, stop": (
        lambda lm: lm.generate("a", max_new_tokens=4, stop=3),
        "stop is 3; use text or a list of texts",
    ),
    "generate, stop at nothing": (
        lambda lm: lm.generate("a", max_new_tokens=4, stop=""),
        "empty text",
    ),
    "generate, stop tokens": (
        lambda lm: lm.generate("a", max_new_tokens=4, stop_token_ids=["x"]),
        "a list of whole numbers",
    ),
    "generate, switch": (
        lambda lm: lm.generate("a", max_new_tokens=4, ignore_eos="x"),
        "true or false",
    ),
    "generate, given": (
        lambda lm: lm.generate("a", max_new_tokens=4, known_tokens=[3]),
        "known_tokens is [3]; use a dictionary",
    ),
    "generate, entropy": (
        lambda lm: lm.generate("a", max_new_tokens=4, min_entropy="x"),
        "min_entropy is 'x'",
    ),
    "generate, guidance": (
        lambda lm: lm.generate("a", max_new_tokens=4, guidance_scale=float("inf")),
        "guidance_scale is inf",
    ),
    "generate, decoder": (
        lambda lm: lm.generate("a", max_new_tokens=4, decoder=None),
        "decoder is None",
    ),
    "generate, of a decoder": (
        lambda lm: lm.generate("a", max_new_tokens=4, decoder="eb", gamma="x"),
        "eb.gamma is 'x'; use a number",
    ),
    "generate, unknown decoder": (
        lambda lm: lm.generate("a", max_new_tokens=4, decoder="ebb", gamma=1),
        "decoder 'ebb' is unknown; did you mean 'eb'",
    ),
    "generate, streamer": (
        lambda lm: lm.generate("a", max_new_tokens=4, streamer=3),
        "streamer is 3",
    ),
    "infill, nothing after": (lambda lm: lm.infill("a"), "missing a required argument: 'after'"),
    "infill, after": (lambda lm: lm.infill("a", 3), "after is 3; use text"),
    "infill, fewer than none": (lambda lm: lm.infill("a", "b", -3), "new_tokens is -3"),
    "infill, what is its own": (
        lambda lm: lm.infill("a", "b", 4, known_tokens={1: 2}),
        "known_tokens does not belong to infill",
    ),
    "stream, several": (lambda lm: lm.stream(["a"]), "prompt is ['a']; use text"),
    "stream, drafts": (lambda lm: lm.stream("a", max_new_tokens=4, drafts="x"), "drafts is 'x'"),
    "stream, misspelt": (
        lambda lm: lm.stream("a", max_new_tokens=4, draft=True),
        "did you mean 'drafts'",
    ),
}
ANY: Any = bdlm
ALONE: dict[str, tuple[Callable[[], Any], str]] = {
    "load, a number": (lambda: ANY.load(3), "name_or_path is 3; use text or a path"),
    "load, no name": (lambda: ANY.load(""), "name_or_path is ''"),
    "load, nothing": (lambda: ANY.load(), "missing a required argument: 'name_or_path'"),
    "load, misspelt": (lambda: ANY.load("shakespeare", devic="cpu"), "did you mean 'device'"),
    "load, device": (
        lambda: ANY.load("shakespeare", device="tpu"),
        "device is 'tpu'; use cpu, cuda or auto",
    ),
    "load, dtype": (lambda: ANY.load("shakespeare", dtype=3), "dtype is 3"),
    "train, a name": (lambda: ANY.train("tiny"), "config is 'tiny'; use a TrainConfig"),
    "train, nothing": (lambda: ANY.train(), "missing a required argument: 'config'"),
    "a recipe that is none": (lambda: load_config(3), "recipe is 3; use text, a path or None"),
    "an override for a list": (
        lambda: load_config("tiny", "seed=3"),
        "overrides is 'seed=3'; use a list of texts",
    ),
    "a section that is none": (lambda: TrainConfig(limits=ANY), "limits is <module 'bdlm'"),
    "a width of text": (
        lambda: ModelSection(hidden_dim="wide"),
        "model.hidden_dim is 'wide'; use a whole number",
    ),
    "a decoder's number": (lambda: DECODERS["eb"](gamma="x"), "eb.gamma is 'x'; use a number"),
    "a model that is none": (lambda: ANY.LM(3, None), "model is 3; use a Denoiser"),
    "a spec of text": (
        lambda: ANY.ModelSpec("7", 6, 4, 8),
        "vocab_size is '7'; use a whole number",
    ),
    "a noise that is none": (
        lambda: ANY.ModelSpec(7, 6, 4, 8, noise="maks"),
        "'mask', 'uniform' or 'none'",
    ),
}


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LM:
    return bdlm.load(tiny_model)


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(bdlm.BdlmError) as error:
        call()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mistake", OF_MODEL)
def test_a_mistake_with_a_model(
    mistake: str, lm: LM, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_file.parent)
    call, said = OF_MODEL[mistake]
    refused(lambda: call(lm), said)


@pytest.mark.parametrize("mistake", ALONE)
def test_a_mistake(mistake: str) -> None:
    refused(*ALONE[mistake])


def test_one_file_stands_for_a_list_of_it() -> None:
    assert DataSection(train="my.txt").train == ("my.txt",)


def test_a_decoder_of_any_module_takes_its_own_options(lm: LM) -> None:
    named = "bdlm.generation.decoders.confidence:FixedK"
    assert (
        lm.generate("a", max_new_tokens=9, decoder=named, k=3).token_ids
        == lm.generate("a", max_new_tokens=9, decoder="fixed-k", k=3).token_ids
    )
    refused(lambda: lm.generate("a", max_new_tokens=9, decoder=named, kk=3), "did you mean 'k'")


def test_a_model_with_no_tokenizer(lm: LM) -> None:
    refused(lambda: LM(lm.model, None), "tokenizer is None")


def test_an_unknown_name_of_the_package_says_the_nearest() -> None:
    with pytest.raises(AttributeError, match="did you mean 'load'"):
        ANY.Load  # noqa: B018
