"""Whatever a recipe holds: either a run can be built from it, or one line of ours says why not."""

import functools
import json
import os
import typing

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from training_runs import SMALL

from bdlm.core.errors import BdlmError
from bdlm.training.accelerator import make_accelerator
from bdlm.training.config import TrainConfig, load_config
from bdlm.training.prepare import build_model, check_warm_start, prepare_data
from bdlm.training.trainer import Trainer


def fields(kind=TrainConfig, prefix=""):
    """Dotted name -> type of every field, the sections themselves among them."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        found[prefix + name] = hint
        if hasattr(hint, "__dataclass_fields__"):
            found |= fields(hint, f"{prefix}{name}.")
    return found


NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    -1,
    2**31,
    2**63,
    10**400,
    1e30,
    -1e30,
    0.5,
    -0.0,
    1e-320,
    float("nan"),
    float("inf"),
    -float("inf"),
]
TEXTS = [
    "",
    " ",
    "nan",
    "inf",
    "1e3",
    "1e999",
    "-",
    "null",
    "a\nb",
    "\0",
    "é😀",
    "x" * 300,
    "cosine",
    "clipped:2,1",
    "[",
    "none",
]
plain = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS + TEXTS)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(plain.filter(lambda k: k == k), inner, max_size=2)
    ),
    max_leaves=5,
)
# what the field wants, or nearly, so that many configs come through
near = {
    int: st.integers(-2, 70),
    float: st.floats(-0.5, 1.5),
    bool: st.booleans(),
    str: st.sampled_from(TEXTS),
}


def value_of(hint):
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(kinds) | values
    fitting = [near[kind] for kind in kinds if kind in near]
    return st.one_of(values, *fitting)


def changes():
    """One to three fields and what they are set to."""
    one = st.sampled_from(sorted(fields())).flatmap(
        lambda name: st.tuples(st.just(name), value_of(fields()[name]))
    )
    return st.lists(one, min_size=1, max_size=3)


@functools.cache
def base_text(text, folder):
    return json.dumps(
        load_config(None, [*SMALL, f"data.train=[{text}]", f"out={folder}"]).to_dict()
    )


def base(text, folder):
    """The values of a small run, to be changed."""
    return json.loads(base_text(text, folder))


def changed(recipe, made):
    for path, value in made:
        here, (*parents, last) = recipe, path.split(".")
        for parent in parents:
            here = (
                here[parent] if isinstance(here.get(parent), dict) else here.setdefault("other", {})
            )
        here[last] = value
    return recipe


def one_line(error):
    message = str(error)
    assert message and "\n" not in message and len(message) < 1000, message


def check_loading(text, folder, made, words):
    """From a mapping, from a JSON recipe, from a YAML one (JSON is YAML), and from overrides."""
    recipe = changed(base(text, folder), made)
    for suffix in ("json", "yaml"):
        file = folder / f"recipe.{suffix}"
        try:
            file.write_text(json.dumps(recipe))
        except (TypeError, ValueError):  # keys or numbers that JSON does not have
            continue
        try:
            load_config(file)
        except BdlmError as error:
            one_line(error)
    try:
        TrainConfig.from_dict(recipe)
    except BdlmError as error:
        one_line(error)
    try:
        load_config(
            None, [*SMALL, f"data.train=[{text}]", *(f"{path}={word}" for path, word in words)]
        )
    except BdlmError as error:
        one_line(error)


def check_building(text, folder, made):
    """The parts of a run, as the loop makes them, and a step."""
    for path, value in made:  # no other data than ours, and no look at a hub
        names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        assume(
            not (
                path.startswith("data")
                and any(isinstance(n, str) and (os.path.exists(n) or ":" in n) for n in names)
            )
        )
        assume(path not in ("data", "model"))
        assume(not (isinstance(value, str) and value.startswith("/")))
    try:
        config = TrainConfig.from_dict(changed(base(text, folder), made))
        check_warm_start(config)
        accelerator = make_accelerator(config)
        data = prepare_data(config, folder, accelerator)
        model = build_model(config, data.tokenizer)
        trainer = Trainer(config, accelerator, model, data.stream(config, accelerator))
        assert config.model.length * config.optim.batch_size < 1 << 20, "keep it small"
        trainer.step(0.5)
    except BdlmError as error:
        one_line(error)
    except AssertionError as error:
        assert "keep it small" in str(error)


@pytest.fixture
def alone(monkeypatch, tmp_path_factory):
    """A machine of little memory without a network, and a working directory of its own."""
    import huggingface_hub.constants
    import psutil

    class Memory:
        total = 64 << 20

    folder = tmp_path_factory.mktemp("runs")
    (folder / "run").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder / "run"


name_or_text = st.sampled_from(sorted(fields())) | st.text(max_size=6)
words = st.lists(st.tuples(name_or_text, st.text(max_size=12) | st.sampled_from(TEXTS)), max_size=3)
quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(quiet, max_examples=60)
@given(made=changes(), words=words)
def test_loading_finds_no_error_but_ours(text, alone, made, words):
    check_loading(text, alone, made, words)


@settings(quiet, max_examples=25)
@given(made=changes())
def test_building_finds_no_error_but_ours(text, alone, made):
    check_building(text, alone, made)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(quiet, max_examples=1000)
@given(made=changes(), words=words)
def test_loading_finds_no_error_but_ours_in_a_thousand_trials(text, alone, made, words):
    check_loading(text, alone, made, words)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(quiet, max_examples=1000)
@given(made=changes())
def test_building_finds_no_error_but_ours_in_a_thousand_trials(text, alone, made):
    check_building(text, alone, made)


@pytest.mark.parametrize(
    "name", [name for name, hint in fields().items() if not hasattr(hint, "__dataclass_fields__")]
)
def test_every_field_refuses_or_takes_each_odd_value(text, tmp_path, name):
    for value in [*NUMBERS, *TEXTS, None, True, [], [1], [[]], {}, {"a": 1}, [None], ["x", 2]]:
        try:
            TrainConfig.from_dict(changed(base(text, tmp_path), [(name, value)]))
        except BdlmError as error:
            one_line(error)
            assert (
                name.rsplit(".", 1)[-1] in str(error)
                or "block_sizes" in str(error)
                or "limits" in str(error)
            ), (value, str(error))


@pytest.mark.parametrize(
    "content",
    [
        "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 3000,
        "seed: 2020-13-45",
        "!!bool x",
        "? [a]\n: b",
        "&a [*a]",
    ],
)
def test_yaml_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    for load in (
        lambda: load_config(tmp_path / "recipe.yaml"),
        lambda: load_config(None, [f"seed={content}"]),
    ):
        with pytest.raises(BdlmError) as caught:
            load()
        one_line(caught.value)


@pytest.mark.parametrize("name", ["\0", "x" * 300, "x/" * 3000])
def test_a_recipe_by_an_impossible_name(name):
    with pytest.raises(BdlmError) as caught:
        load_config(name)
    one_line(caught.value)


def test_a_run_after_another_may_have_another_precision(small):
    made = [
        make_accelerator(small(f"precision={name}")).mixed_precision
        for name in ("fp32", "bf16", "fp32")
    ]
    assert made == ["no", "bf16", "no"]
