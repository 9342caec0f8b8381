"""Repeated flags: values of a flag that takes a list accumulate, of any other flag the last one
counts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest

from bdlm import cli
from bdlm.commands import train
from bdlm.commands.arguments import parse
from bdlm.core.errors import ConfigError
from bdlm.core.validation import hints
from bdlm.training.config import load_config
from tests.cli.conftest import Run

NEEDED = {  # required words of the commands that have list-valued flags, without those flags
    "data": ("inspect",),
    "experiment": ("list",),
}


def list_flags() -> Iterator[tuple[str, str]]:
    """Every flag of every command that takes a list, read from the annotations."""
    for command in cli.COMMANDS:
        if command != "train":
            module = importlib.import_module(f"bdlm.commands.{command.replace('-', '_')}")
            for name, hint in hints(module.Options).items():
                if get_origin(hint) is tuple:
                    yield command, name


def test_the_flags_are_found() -> None:
    found = set(list_flags())
    assert {("generate", "option"), ("generate", "stop"), ("eval", "data")} <= found
    assert {command for command, _ in found} >= {"demo", "frontier", "lm-eval", "measure"}


@pytest.mark.parametrize(("command", "name"), list_flags())
def test_values_of_a_repeated_flag_accumulate(command: str, name: str) -> None:
    kind = importlib.import_module(f"bdlm.commands.{command.replace('-', '_')}").Options
    numbers = get_args(hints(kind)[name])[0] is float
    values = ("1.5", "2", "0.5", "4") if numbers else ("a=1", "b=2", "c=3", "-d")
    required = {
        field: ("--" + field, "x")
        for field in ("model", "data", "tasks")
        if field in kind.__dataclass_fields__ and field != name and command not in NEEDED
    }
    words = [*NEEDED.get(command, ()), *(w for pair in required.values() for w in pair)]
    flag = "--" + name.replace("_", "-")
    words += [flag, *values[:2], f"{flag}={values[2]}", "--json"]
    words = [w for w in words if w != "--json" or "json" in kind.__dataclass_fields__]
    words += [f"{flag}={values[3]}"]
    found = getattr(parse(kind, words, f"bdlm {command}"), name)
    assert found == (tuple(map(float, values)) if numbers else values)


def test_of_other_repeated_flags_the_last_one_counts() -> None:
    from bdlm.commands.generate import Options

    words = ["--model", "x", "--seed", "1", "--stop", "a", "--seed", "2", "--model=y"]
    found = parse(Options, words, "bdlm generate")
    assert (found.model, found.seed, found.stop) == ("y", 2, ("a",))


def test_a_mistake_in_a_repeated_flag_is_found() -> None:
    from bdlm.commands.frontier import Options

    words = ["--model", "x", "--temperatures", "1", "--temperatures", "warm"]
    with pytest.raises(ConfigError, match=r"--temperatures cannot be read from \['warm'\]; see"):
        parse(Options, words, "bdlm frontier")


def test_every_repeated_option_reaches_the_request(bdlm: Run, tiny_model: Path) -> None:
    words = ("generate", "--model", tiny_model, "--prompt", "the", "--max-new-tokens", 12, "--json")
    top_k, steps = ("--option", "top_k=1"), ("--option", "steps=3")
    both = json.loads(bdlm(*words, "--decoder", "ancestral", *top_k, *steps)[1])
    once = json.loads(bdlm(*words, "--decoder", "ancestral", "--option", "top_k=1", "steps=3")[1])
    last = json.loads(bdlm(*words, "--decoder", "ancestral", *steps)[1])
    assert both["text"] == once["text"] != last["text"]
    code, _, err = bdlm(*words, "--option", "stpes=3", "--option", "top_k=1")
    assert code == 2 and "stpes" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "a", "--data", "b"], ("a", "b")),
        (["--data.train", "a", "--data=[b, c]", "data.train=d"], ("a", "b", "c", "d")),
        (["--data", "[a, b]"], ("a", "b")),
    ],
)
def test_repeated_fields_of_a_recipe_accumulate(words: list[str], expected: tuple[str]) -> None:
    options = train.parse(["tiny", *words, "--max-steps", "1", "--max-steps", "2"])
    config = load_config(options.recipe, options.overrides)
    assert config.data.train == expected
    assert config.limits.steps == 2


def test_fields_of_fixed_length_do_not_accumulate() -> None:
    options = train.parse(["--optim.betas", "[0.9, 0.9]", "--optim.betas", "[0.8, 0.9]"])
    assert options.overrides[-1] == "optim.betas=[0.8, 0.9]"
    assert load_config("tiny", [*options.overrides, "data.train=x"]).optim.betas == (0.8, 0.9)
