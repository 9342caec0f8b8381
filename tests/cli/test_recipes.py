"""`bdlm recipes`: the list, one recipe as it stands, JSON, and a name that is none."""

from __future__ import annotations

import json

import pytest
import yaml

from bdlm import cli
from bdlm.training.config import load_config
from bdlm.training.recipes import RECIPES, recipe_names


def test_the_list_has_a_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 4 and line.endswith(".") for line in lines)
    assert cli.run(["recipes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [f"{r['name']} {r['description']}" for r in told] == [
        " ".join(line.split()) for line in lines
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_printed_as_it_stands(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    assert cli.run(["recipes", name]) == 0
    text = capsys.readouterr().out
    assert text == (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "mine.yaml", ["data.train=x"]) == load_config(
        name, ["data.train=x"]
    )
    assert cli.run(["recipes", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == yaml.safe_load(text)


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "shakespear"]) == 2
    assert "did you mean 'shakespeare'" in capsys.readouterr().err
