"""Going on with a run: its folder moved, copied or reached from elsewhere; branches; what retention
may delete; every file verified."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import losses

from bdlm.core.errors import CheckpointError, ConfigError, TrainingError
from bdlm.training import checkpoint
from bdlm.training.config import load_config
from bdlm.training.loop import train

PLAIN = (
    "noise.search=false",
    "valid.every_steps=null",
    "valid.rows=2",
    "block_sizes=[]",
    "optim.accumulation=1",
    "save.every_steps=2",
    "limits.steps=6",
)


@pytest.fixture
def short(small):
    return lambda *overrides, out="run": small(*PLAIN, *overrides, out=out)


def names(folder):
    return [path.name for path in checkpoint.steps(folder / "checkpoints")]


def step(number):
    return f"step-{number:09d}"


# -- the config of a run folder --------------------------------------------------------------------


def test_a_moved_or_copied_folder_means_itself(text, tmp_path, monkeypatch):
    """Started with relative paths; then from another working directory, from a copy beside the
    original, and through a link."""
    from training_runs import SMALL

    (tmp_path / "here").mkdir()
    shutil.copy(text, tmp_path / "here" / "words.txt")
    monkeypatch.chdir(tmp_path / "here")
    train(load_config(None, [*SMALL, *PLAIN, "data.train=[words.txt]", "out=runs/a"]))
    original, copy = tmp_path / "here" / "runs" / "a", tmp_path / "copy"
    before = {path: path.stat().st_mtime_ns for path in original.rglob("*")}
    shutil.copytree(original, copy)
    monkeypatch.chdir(tmp_path)
    again = train(load_config("copy/config.json", ["limits.steps=7"]))
    assert (again.folder, again.step) == ("copy", 7)
    assert losses(copy).keys() == set(range(1, 8))
    assert before == {path: path.stat().st_mtime_ns for path in original.rglob("*")}
    os.symlink(copy, tmp_path / "linked", target_is_directory=True)
    assert load_config(tmp_path / "linked" / "config.json").out == str(tmp_path / "linked")
    os.symlink(copy / "config.json", tmp_path / "config.json")
    os.symlink(copy / "config.json", tmp_path / "mine.json")
    for link in ("config.json", "mine.json"):
        assert load_config(tmp_path / link).out == str(copy)
    shutil.move(original, tmp_path / "moved")
    again = train(load_config(tmp_path / "moved" / "config.json", ["limits.steps=7"]))
    assert (again.folder, again.step) == (str(tmp_path / "moved"), 7)
    assert not original.exists()


def test_the_config_of_a_run_is_a_recipe_for_another_folder_when_it_is_named(short, tmp_path):
    train(short("limits.steps=2"))
    other = load_config(tmp_path / "run" / "config.json", [f"out={tmp_path / 'other'}"])
    assert (other.out, train(other).step, names(tmp_path / "run")) == (
        str(tmp_path / "other"),
        2,
        [step(2)],
    )
    # not beside a run: a recipe that names its folder
    shutil.copy(tmp_path / "run" / "config.json", tmp_path / "config.json")
    assert load_config(tmp_path / "config.json").out == str(tmp_path / "run")


def test_a_name_beyond_16_bits_comes_back(short, tmp_path):
    train(short("limits.steps=1", "optim.eps=1e-8", out="run😀"))
    config = load_config(tmp_path / "run😀" / "config.json")
    assert (config.out, config.optim.eps) == (str(tmp_path / "run😀"), 1e-8)


# -- branches --------------------------------------------------------------------------------------


@pytest.fixture
def run(short, tmp_path):
    train(short())
    return tmp_path / "run"


def test_a_branch_sets_newer_checkpoints_aside_and_saves_its_own(run, short, tmp_path, capsys):
    old = {number: checkpoint.load(run / "checkpoints" / step(number)) for number in (4, 6)}
    model = (run / "model" / "model.safetensors").read_bytes()
    result = train(short(f"resume={run / 'checkpoints' / step(2)}", "optim.lr=1e-4", "save.keep=2"))
    said = capsys.readouterr().err
    aside = run / "set-aside-1"
    assert str(aside) in said and f"{step(4)} to {step(6)}" in said
    for number in (4, 6):
        kept = checkpoint.load(aside / step(number))
        assert all(
            torch.equal(v, kept.groups["weights"][k])
            for k, v in old[number].groups["weights"].items()
        )
        new = checkpoint.load(run / "checkpoints" / step(number))
        assert any(
            not torch.equal(v, new.groups["weights"][k])
            for k, v in old[number].groups["weights"].items()
        )
    assert (
        (aside / "model" / "model.safetensors").read_bytes()
        == model
        != (run / "model" / "model.safetensors").read_bytes()
    )
    assert result.checkpoint == str(run / "checkpoints" / step(6))
    assert checkpoint.load(Path(result.checkpoint)).state["config"]["optim"]["lr"] == 1e-4
    # each of one branch alone
    assert losses(run).keys() == set(range(1, 7)) == losses(aside).keys()
    # from the newest, not from step 2 again
    again = train(load_config(run / "config.json", ["limits.steps=7"]))
    assert again.step == 7 and not (run / "set-aside-2").exists()


def test_a_branch_that_ends_where_the_old_run_did_names_its_own_weights(run, short):
    result = train(short(f"resume={run / 'checkpoints' / step(4)}", "optim.lr=1e-4"))
    assert checkpoint.load(Path(result.checkpoint)).state["config"]["optim"]["lr"] == 1e-4


def test_a_refused_branch_moves_nothing(run, short):
    with pytest.raises(CheckpointError, match="seed"):
        train(short(f"resume={run / 'checkpoints' / step(2)}", "seed=9"))
    assert names(run) == [step(2), step(4), step(6)] and not (run / "set-aside-1").exists()


def test_a_branch_into_another_folder_takes_what_it_needs(run, short, tmp_path):
    """The new folder stands alone at once, before its first save by the clock."""
    result = train(
        short(f"resume={run / 'checkpoints' / step(4)}", "save.every_steps=null", out="other")
    )
    assert result.step == 6 and names(tmp_path / "other") == [step(4), step(6)]
    with pytest.raises(ConfigError, match="checkpoints of its own"):
        train(short(f"resume={run / 'checkpoints' / step(2)}", out="other"))


def test_a_resumed_run_does_not_need_the_model_that_it_started_from(run, short, tmp_path):
    train(short(f"model.init_from={run / 'model'}", out="warm"))
    shutil.rmtree(run)
    assert train(load_config(tmp_path / "warm" / "config.json", ["limits.steps=7"])).step == 7


# -- retention -------------------------------------------------------------------------------------

GROUPS = {"weights": {"a": torch.ones(3)}}


def put(folder, number, keep, value=1.0, **options):
    return checkpoint.save(
        folder,
        number,
        {"weights": {"a": torch.full((3,), value)}},
        {"step": number},
        keep,
        **options,
    )


def damage(path):
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_damaged_checkpoints_do_not_count(tmp_path):
    folder = tmp_path / "checkpoints"
    paths = [put(folder, n, 9) for n in (1, 2, 3, 4)]
    damage(paths[2])
    damage(paths[3])
    put(folder, 5, 2)
    assert checkpoint.load(paths[1]).step == 2 and not paths[0].exists()
    damage(folder / step(5))
    assert checkpoint.load_newest(folder).step == 2


def test_what_was_just_written_stays_whatever_else_is_there(tmp_path):
    folder = tmp_path / "checkpoints"
    put(folder, 8, 9)
    damage(put(folder, 9, 9))
    put(folder, 5, 1)
    assert checkpoint.load(folder / step(5)).step == 5


def test_the_spare_one_stays(tmp_path):
    folder = tmp_path / "checkpoints"
    spare = put(folder, 1, 1)
    for number in (2, 3):
        put(folder, number, 1, spare=spare)
    assert [path.name for path in checkpoint.steps(folder)] == [step(1), step(3)]


def test_another_state_of_a_step_that_is_there_is_written_and_the_old_one_set_aside(tmp_path):
    folder = tmp_path / "checkpoints"
    put(folder, 3, 2, value=1.0)
    path = put(folder, 3, 2, value=2.0)
    assert checkpoint.load(path).groups["weights"]["a"][0] == 2
    assert checkpoint.load(tmp_path / "set-aside-1" / step(3)).groups["weights"]["a"][0] == 1


# -- the last good checkpoint ----------------------------------------------------------------------


def test_the_advice_after_a_loss_that_is_not_finite_leads_out(short, tmp_path):
    """The step that ruins the weights is finite itself, and so is what is saved after it: that one
    is not good."""
    every = ("save.every_steps=1", "save.keep=1", "optim.warmup_steps=0")
    train(short(*every, "limits.steps=3"))
    for _ in range(2):  # the second time from the ruined checkpoint
        with pytest.raises(TrainingError) as caught:
            train(short(*every, "optim.lr=1e18", "optim.clip=0"))
        good = re.search("resume='(.*?)'", str(caught.value))[1]
        assert good == str(tmp_path / "run" / "checkpoints" / step(3)), caught.value
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name > step(3)
    assert train(short(*every, f"resume={good}", "optim.lr=1e-3")).reason == "done"
    assert names(tmp_path / "run") == [step(6)]


def test_without_a_good_checkpoint_the_advice_leads_out_too(short):
    ruin = ("optim.lr=1e18", "optim.clip=0", "optim.warmup_steps=0")
    with pytest.raises(TrainingError, match="another folder"):
        train(short(*ruin, "save.every_steps=1"))
    assert train(short("save.every_steps=1", out="another")).reason == "done"
    with pytest.raises(TrainingError, match="no checkpoint was written yet; start again"):
        train(short(*ruin, "save.every_steps=null", out="third"))
    assert train(short("save.every_steps=null", out="third")).reason == "done"


# -- every file of a checkpoint --------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_found(run, short):
    path = run / "checkpoints" / step(6)
    listed = json.loads((path / "manifest.json").read_text())["files"].keys()
    assert {file.name for file in path.iterdir()} == {*listed, "manifest.json"}
    assert {
        "weights.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
    } <= listed
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        every = 1 if file.name == "manifest.json" else max(1, len(content) // 20)
        for place in range(0, len(content), every):
            for bit in range(8) if file.name == "manifest.json" else (place % 8,):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                file.write_bytes(changed)
                with pytest.raises(CheckpointError, match=file.name):
                    checkpoint.load(path)
        file.write_bytes(content)
    checkpoint.load(path)


def test_a_flipped_bit_in_the_tokenizer_is_found(run, short):
    assert checkpoint.load(run / "checkpoints" / step(6)).state["tokenizer"]
    for file in sorted((run / "tokenizer").iterdir()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(file.name)):
            train(short("limits.steps=7"))
        file.write_bytes(whole)
    assert train(short("limits.steps=7")).step == 7
