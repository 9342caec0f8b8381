"""Every name that was removed is answered with the new one, wherever users may still write it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bdlm
from bdlm.api import LM
from bdlm.cli import COMMANDS, run
from bdlm.commands import train as train_command
from bdlm.core.errors import nearest
from bdlm.core.removed_names import MODULES, REMOVED, successor
from bdlm.core.validation import hints
from bdlm.experiments.measurements import MEASUREMENTS
from bdlm.experiments.plan import load_plan
from bdlm.generation.decoders import DECODERS
from bdlm.generation.sampling_params import sampling_params
from bdlm.training.config import TrainConfig, load_config

Ask = Callable[[str], object]
RECORDS = (
    bdlm.SamplingParams,
    bdlm.RequestOutput,
    bdlm.Chunk,
    bdlm.Score,
    bdlm.Step,
    bdlm.Out,
    bdlm.ModelSpec,
    bdlm.Canvas,
    bdlm.Commit,
    bdlm.Layout,
)
# answered where another module defines the new name
ELSEWHERE = {"make_params", "make_policy", "policies", "params", "rough", "tried"}


def made(kind: type) -> Any:
    """A record without its fields: only what is missing is asked for."""
    return object.__new__(kind)


def public(kind: type) -> set[str]:
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return names | {name for name in dir(kind) if name[0] != "_"}


def sections(kind: Any, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """(path, fields) of a config and of each section in it."""
    yield prefix, {f.name for f in dataclasses.fields(kind)}
    for name, hint in hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from sections(hint, f"{prefix}{name}.")


def python(lm: LM) -> Iterator[tuple[str, set[str], Ask]]:
    """(surface, the names that it knows, how a user writes a name there)."""
    options = {f.name for f in dataclasses.fields(bdlm.SamplingParams)}
    yield "the package", set(bdlm.__all__), lambda old: getattr(bdlm, old)
    for kind in RECORDS:
        yield f"{kind.__name__}.x", public(kind), lambda old, kind=kind: getattr(made(kind), old)
        fields = {f.name for f in dataclasses.fields(kind)}
        yield f"{kind.__name__}(x=)", fields, lambda old, kind=kind: kind(**{old: 1})
    for method in ("generate", "stream"):
        call = getattr(lm, method)
        known = options | {"context_window"}
        yield method, known, lambda old, call=call: call("a", **{old: 1})
    yield "infill", options, lambda old: lm.infill("a", "b", **{old: 1})
    yield "score", {"batch_size"}, lambda old: lm.score("a", **{old: 1})
    yield "evaluate", {"batch_size"}, lambda old: lm.evaluate("a", **{old: 1})
    yield "sampling_params", options, lambda old: sampling_params(**{old: 1})
    of_engine = set(inspect.signature(bdlm.Engine).parameters)
    yield "Engine", of_engine, lambda old: bdlm.Engine(lm.model, **{old: 1})


def written(folder: Path) -> Iterator[tuple[str, set[str], Ask]]:
    """The same of recipes, configs and plans."""

    def plan(section: str, old: str) -> object:
        path = folder / "plan.yaml"
        train = f"train: {{limits: {{steps: 1}}, {section}: {{{old}: 1}}}}"
        path.write_text(f"title: x\nclaim: y\nruns: [{{name: a, {train}}}]\n", encoding="utf-8")
        return load_plan(str(path))

    yield "a plan's noise", {"distribution"}, lambda old: plan("noise", old)
    yield "a plan's optim", {"batch_size"}, lambda old: plan("optim", old)
    for path, fields in sections(TrainConfig):
        yield (
            f"recipe {path}",
            fields,
            lambda old, path=path: load_config("tiny", [f"{path}{old}=1"]),
        )
        yield (
            f"config {path}",
            fields,
            lambda old, path=path: TrainConfig.from_dict(nested(f"{path}{old}")),
        )


def nested(path: str) -> dict[str, Any]:
    head, dot, rest = path.partition(".")
    return {head: nested(rest)} if dot else {head: 1}


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LM:
    return bdlm.load(tiny_model)


@pytest.fixture(scope="module")
def surfaces(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, set[str], Ask]]:
    return [*python(lm), *written(tmp_path_factory.mktemp("plans"))]


def due(old: str, known: set[str]) -> str | None:
    """The new name that a surface must answer an old one with, None where it does not apply."""
    return None if old in known else next((new for new in REMOVED[old] if new in known), None)


@pytest.mark.parametrize("old", REMOVED)
def test_a_removed_name_is_answered_with_the_new_one(
    old: str, surfaces: list[tuple[str, set[str], Ask]]
) -> None:
    asked = 0
    for surface, known, ask in surfaces:
        if (new := due(old, known)) is None:
            continue
        with pytest.raises((bdlm.ConfigError, AttributeError)) as error:
            ask(old)
        assert f"'{old}' is now called '{new}'" in str(error.value), surface
        asked += 1
    assert asked or old in ELSEWHERE or on_a_command(old)


def flags(command: str) -> set[str]:
    if command == "train":
        return {name for name, _, _ in train_command._fields(TrainConfig)}
    kind = importlib.import_module(f"bdlm.commands.{command.replace('-', '_')}").Options
    return {f.name for f in dataclasses.fields(kind)}


def on_a_command(old: str) -> bool:
    return any(due(old, flags(command)) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_removed_flag_is_answered_with_the_new_one(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BDLM_DEBUG", "0")
    known = flags(command)
    places = {"", *(f"{name.rpartition('.')[0]}." for name in known if "." in name)}
    for old, place in ((old, place) for old in REMOVED for place in places):
        own = {n.removeprefix(place) for n in known if n.startswith(place)}
        if (new := due(old, own)) is None:
            continue
        flag = f"--{place}{old}".replace("_", "-") if command != "train" else f"--{place}{old}"
        words = [command, "tiny"] if command == "train" else [command]
        assert run([*words, flag, "1"]) == 2
        said = capsys.readouterr().err
        assert f"'{flag}' is now called '--" in said, said
        assert said.replace("-", "_").rstrip().endswith(f"{new}'"), said
        assert said.count("\n") == 1


def test_the_flags_that_people_type_most(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["generate", "--policy", "eb"], "'--policy' is now called '--decoder'"),
        (["generate", "--window=9"], "'--window' is now called '--context-window'"),
        (["eval", "--batch-rows", "4"], "'--batch-rows' is now called '--batch-size'"),
        (["variance", "--laws", "time"], "'--laws' is now called '--distributions'"),
        (["train", "tiny", "--noise.law", "time"], "is now called '--noise.distribution'"),
        (["generate", "--model", "shakespeare", "--option", "over=gap"], "called 'infill_mode'"),
    ):
        assert run(words) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("old", MODULES)
def test_a_removed_module_is_answered_with_the_new_one(old: str) -> None:
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(old)
    # of a module in a package that is gone, the package is what Python misses first
    gone = next(name for name in (old.rpartition(".")[0], old) if name in MODULES)
    assert str(error.value) == f"'{gone}' is now called '{MODULES[gone]}'"
    assert importlib.util.find_spec(MODULES[old]) is not None


def test_a_decoder_of_a_removed_module_is_answered() -> None:
    with pytest.raises(bdlm.ConfigError, match=r"is now called 'bdlm\.generation\.decoders'"):
        sampling_params(decoder="bdlm.generation.policies.exact:FirstHitting")


def test_new_names_are_not_removed_ones() -> None:
    assert not {new for several in REMOVED.values() for new in several} & REMOVED.keys()
    assert not set(MODULES.values()) & MODULES.keys()
    assert not DECODERS.keys() & REMOVED.keys() and not MEASUREMENTS.keys() & REMOVED.keys()


def test_a_name_is_answered_only_where_the_new_one_exists() -> None:
    assert successor("policy", ["decoder"]) == "decoder"
    assert successor("--batch-rows", ["--batch-size"]) == "--batch-size"
    assert successor("noise.law", ["noise.distribution"]) == "noise.distribution"
    assert successor("policy", ["depth"]) is None
    assert successor("unknown", ["decoder"]) is None
    assert nearest("policy", ["depth"]) == "; known: depth"
