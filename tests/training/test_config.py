"""Configs: every wrong value is one line that names the field; recipes and overrides give what they
say."""

import dataclasses
import subprocess
import sys

import pytest
import yaml

from bdlm.core.errors import ConfigError
from bdlm.training.config import TrainConfig, load_config, recipe_names

NEEDED = ["data.train=[a.txt]", "limits.steps=3"]


def test_overrides_reach_their_fields_in_order():
    config = load_config(
        None,
        [
            *NEEDED,
            "optim.lr=3e-4",
            "model.block_size=4",
            "block_sizes=[[0.0, 1], [0.5, 4]]",
            "noise.interval=[0.3,0.8]",
            "optim.lr=1e-3",
        ],
    )
    assert (config.optim.lr, config.block_sizes, config.noise.interval) == (
        1e-3,
        ((0.0, (1,)), (0.5, (4,))),
        (0.3, 0.8),
    )
    assert config.data.train == ("a.txt",)


def test_there_and_back(tmp_path):
    config = load_config(
        None,
        [
            *NEEDED,
            "limits.minutes=2.5",
            "model.block_size=4",
            "block_sizes=[[0.0, 1], [0.5, 4]]",
            "data.detokenizer=lm1b",
        ],
    )
    assert TrainConfig.from_dict(config.to_dict()) == config
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(recipe) == config
    assert load_config(recipe, ["seed=7"]) == dataclasses.replace(config, seed=7)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'lr'"]),
        ("optimm.lr=1", ["optimm", "did you mean 'optim'"]),
        ("seeed=1", ["seeed", "did you mean 'seed'"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "a number"]),
        ("optim.lr=nan", ["optim.lr", "a number"]),
        ("optim.lr=-1", ["optim.lr", "-1", "positive"]),
        ("optim.batch_size=2.5", ["optim.batch_size", "whole number"]),
        ("optim.accumulation=5", ["optim.accumulation", "divisor"]),
        ("optim.decay=cosin", ["optim.decay", "did you mean 'cosine'"]),
        ("model.compile=7", ["model.compile", "true or false"]),
        ("model.block_size=0", ["model.block_size", "1 or more"]),
        ("model.block_size=1000", ["model.block_size", "1000", "256"]),
        ("noise.interval=[0.8,0.3]", ["noise.interval"]),
        ("noise.interval=[0.8]", ["noise.interval", "2 values"]),
        ("noise.distribution=importnce", ["noise.distribution", "did you mean 'importance'"]),
        (
            "noise={distribution: importance, search: true}",
            ["noise.distribution", "covers every mask rate"],
        ),
        (
            "noise={distribution: importance, interval: [0.3, 0.8]}",
            ["noise.distribution", "'importance'"],
        ),
        ("noise.refresh_steps=0", ["noise.refresh_steps", "1 or more"]),
        ("noise.mask_single_token_blocks=7", ["noise.mask_single_token_blocks", "true or false"]),
        ("noise.gradient_batches=1", ["noise.gradient_batches", "0, or 2 or more"]),
        ("valid.every_steps=0", ["valid.every_steps", "1 or more, or null"]),
        ("valid.block_sizes=[0]", ["valid.block_sizes[0]", "1 or more"]),
        ("valid.block_sizes=[999]", ["valid.block_sizes", "999", "model.length (256)"]),
        ("data.bad_records=1.5", ["data.bad_records", "a whole number of records"]),
        ("data.train=[' ']", ["data.train[0]", "empty text"]),
        ("model.dropout=.inf", ["model.dropout", "[0, 1)"]),
        ("out=''", ["out", "name a folder"]),
        ('resume="a\\tb"', ["resume", "control characters"]),
        ("seed=-1", ["seed", "2^63"]),
        ("noise.floor=0", ["noise.floor", "above 0"]),
        ("noise.floor=1.5", ["noise.floor", "at most 1"]),
        ("block_sizes=[[0.2,8]]", ["block_sizes", "from 0.0"]),
        ("block_sizes=[[0,1],[0.5,4]]", ["block_sizes", "model.block_size"]),
        ("block_sizes=[[0,x]]", ["block_sizes[0][1][0]", "whole number"]),
        ("limits.steps=0", ["limits.steps", "positive"]),
        ("limits.steps=null", ["limits", "limits.minutes"]),
        ("data.train=[]", ["data.train"]),
        ("model=3", ["model", "mapping"]),
        ("seed.x=3", ["seed"]),
        ("seed", ["no '='"]),
        ("seed=[", ["seed", "YAML"]),
        ("precision=fp16", ["precision", "bf16"]),
    ],
)
def test_a_wrong_value_names_field_and_fix(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*NEEDED, override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'shakespeare'"):
        load_config("shakespear")


def test_a_recipe_that_is_not_text_or_no_mapping(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.yaml").write_text("- 1\n")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_config(tmp_path / name)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_along_is_valid(name):
    config = load_config(name, ["data.train=[x]"])
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_loads_no_torch():
    code = "import sys, bdlm.training.config as c; c.recipe_names(); print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )
