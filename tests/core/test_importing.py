"""Code that a name refers to runs only if the user chose the name, and one module alone imports
it."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

import bdlm
from bdlm.core.errors import CheckpointError, ConfigError, DataError
from bdlm.core.importing import import_object
from bdlm.data.tokenizers import load_tokenizer
from bdlm.models.model_folder import load, save
from tests.models.test_model_folder import tiny

ROOT = Path(bdlm.__file__).parent
# our own modules and fixed optional packages by name: nothing that data could carry
OWN = {"cli.py", "__init__.py", "commands/bench.py", "likelihood/embeddings.py"}


def test_one_module_imports_by_name() -> None:
    found = set()
    for path in ROOT.rglob("*.py"):
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        if names & {"import_module", "__import__", "exec", "eval_code"}:
            found.add(path.relative_to(ROOT).as_posix())
    assert found - OWN == {"core/importing.py"}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module "evil_mod" and a package "evil-mod" that leave a file behind when they run."""
    left = tmp_path / "ran"
    code = f"open({str(left)!r}, 'w').close()\nName = dict\n"
    (tmp_path / "evil_mod.py").write_text(code)
    (tmp_path / "evil-mod.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield left
    sys.modules.pop("evil_mod", None)
    sys.modules.pop("evil-mod", None)


@pytest.mark.parametrize(
    "name", ["evil_mod:Name", "evil-mod:Name", "evil_mod", "this", "", 7, ["evil_mod:Name"], None]
)
def test_a_backbone_of_a_folder_is_not_imported_unasked(
    name: object, marker: Path, tmp_path: Path
) -> None:
    folder = save(tiny(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "backbone": name}))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="trust_code=True"):
        load(folder)
    assert not marker.exists()


def test_a_trusted_name_must_be_whole(marker: Path) -> None:
    for name in ("this", "evil_mod", "evil-mod:Name", ":Name", "evil_mod:", 3):
        with pytest.raises(ConfigError, match=r"write it as package\.module:Name"):
            import_object("backbone", name, trusted=True)
    assert not marker.exists()
    assert import_object("backbone", "evil_mod:Name", trusted=True) is dict
    assert marker.exists()


def test_a_module_that_fails_is_an_error_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_mod.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be imported") as caught:
        import_object("decoder", "broken_mod:Name", trusted=True)
    assert "\n" not in str(caught.value)


def test_code_of_a_tokenizer_folder_is_neither_run_nor_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, left = tmp_path / "tokenizer", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(left)!r}, 'w').close()\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(folder)
    assert not left.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2", "runs/missing"])
def test_a_missing_folder_is_not_looked_up_elsewhere(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("looked up"))
    with pytest.raises(DataError, match=f"'{name}' cannot be loaded .*no such folder.*hf:NAME"):
        load_tokenizer(name)
