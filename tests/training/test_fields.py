"""Every field of the training config says what it is, in the source and in `bdlm train --help`."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from bdlm.commands.train import parse
from bdlm.training.config import TrainConfig
from bdlm.training.fields import field_docs

SECTIONS = [
    TrainConfig,
    *(
        hint
        for hint in typing.get_type_hints(TrainConfig).values()
        if dataclasses.is_dataclass(hint)
    ),
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_docstring_of_one_sentence(section):
    docs = field_docs(section)
    assert docs.keys() == {f.name for f in dataclasses.fields(section)}
    for name, doc in docs.items():
        assert doc.endswith(".") and ". " not in doc and len(doc) > 10, name


def test_docstrings_are_read_from_the_source_once():
    assert field_docs(TrainConfig) is field_docs(TrainConfig)
    assert field_docs(int) == {}

    @dataclasses.dataclass
    class Made:
        x: int = 1

    assert field_docs(Made) == {}


def test_help_says_each_field_with_its_default_under_its_section(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    joined = " ".join(text.split())
    for section in SECTIONS[1:]:
        prefix = next(
            name for name, hint in typing.get_type_hints(TrainConfig).items() if hint is section
        )
        title = text.index(f"\n{prefix}: ")
        for f in dataclasses.fields(section):
            assert text.index(f"  --{prefix}.{f.name}  ") > title
    for section in SECTIONS:
        for name, doc in field_docs(section).items():
            assert doc in joined, name
    assert "--optim.lr float (default: 0.0003)" in joined
    assert "--data.train tuple[str, ...] (default: [])" in joined
    assert "--limits.steps int or null (default: null)" in joined
    assert "--model.algo bd3lm|mdlm|sedd|ar (default: bd3lm)" in joined


def test_help_loads_no_torch():
    code = (
        "import sys; from bdlm import cli; cli.run(['train', '--help']); cli.run(['recipes']);"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
