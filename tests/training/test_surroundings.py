"""What happens around a run: its output is closed, its folder is deleted, Ctrl-C in a terminal, a
tracker or a model that is not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import arguments

from bdlm.core.errors import CheckpointError, ConfigError, TrainingError
from bdlm.training import checkpoint
from bdlm.training.loop import Run, train
from bdlm.training.run_log import read_metrics

PLAIN = (
    "noise.search=false",
    "valid.every_steps=null",
    "valid.rows=2",
    "block_sizes=[]",
    "optim.accumulation=1",
    "save.every_steps=null",
)
ENDLESS = (*PLAIN, "limits.steps=1000000", "log.every_steps=1")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
unix = pytest.mark.skipif(
    sys.platform == "win32", reason="needs a Unix terminal, its pipes, or deletable open files"
)


def command(text, out, *overrides):
    return [sys.executable, "-m", "bdlm", "train", *arguments(text, out, *overrides)]


def wait_for_records(child, folder, count):
    metrics = folder / "metrics.jsonl"
    while child.poll() is None and (
        not metrics.exists() or len(metrics.read_bytes().splitlines()) < count
    ):
        time.sleep(0.02)


# -- output ----------------------------------------------------------------------------------------


@unix
def test_training_goes_on_when_its_reader_leaves(text, tmp_path):
    """As under `bdlm train ... 2>&1 | head -1`, with every line after the first one lost."""
    words = command(text, tmp_path / "run", *PLAIN, "limits.steps=4", "log.progress=true")
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENV)
    assert b"training" in child.stdout.readline()
    child.stdout.close()
    assert child.wait(timeout=300) == 141, "the summary at the end has no reader"
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints").step == 4
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@unix
def test_training_needs_no_standard_error_at_all(text, tmp_path):
    words = command(text, tmp_path / "run", *PLAIN, "limits.steps=1", "log.progress=true")
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *words, "--json"],
        stdout=subprocess.PIPE,
        env=ENV,
        check=True,
    )
    assert json.loads(done.stdout)["step"] == 1


def test_a_pipe_that_breaks_elsewhere_is_not_taken_for_success(small, monkeypatch):
    def broken(*values):
        raise BrokenPipeError

    monkeypatch.setattr(Run, "log", broken)
    with pytest.raises(TrainingError, match="resume=auto"):
        train(small(*PLAIN))


@unix
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_leaves_the_cursor_visible(text, tmp_path, presses):
    """In a real terminal with the bar moving; the second Ctrl-C breaks off, the first saves."""
    import pty

    main, other = pty.openpty()
    words = command(text, tmp_path / "run", *ENDLESS, "log.progress=true")
    env = {**ENV, "TERM": "xterm-256color"}
    child = subprocess.Popen(
        words, stdin=other, stdout=other, stderr=other, env=env, start_new_session=True
    )
    os.close(other)
    os.set_blocking(main, False)
    seen, pressed, metrics = b"", 0, tmp_path / "run" / "metrics.jsonl"
    while child.poll() is None:
        try:
            seen += os.read(main, 1 << 16)
        except OSError:  # nothing there now, or all gone
            time.sleep(0.02)
        if (
            pressed < presses
            and metrics.exists()
            and len(metrics.read_bytes().splitlines()) > 3
            and b"loss" in seen
        ):
            child.send_signal(signal.SIGINT)
            pressed += 1
    try:
        while more := os.read(main, 1 << 16):
            seen += more
    except OSError:
        pass
    os.close(main)
    assert b"\x1b[2K" in seen, "no bar was drawn"
    assert seen.rfind(b"\x1b[?25l") <= seen.rfind(b"\x1b[?25h")


# -- the folder ------------------------------------------------------------------------------------


@unix
@pytest.mark.parametrize("trackers", ["[]", pytest.param("[tensorboard]", marks=pytest.mark.slow)])
def test_a_run_whose_folder_is_deleted_stops(text, tmp_path, trackers):
    folder = tmp_path / "run"
    words = command(text, folder, *ENDLESS, "save.every_steps=5", f"log.trackers={trackers}")
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    wait_for_records(child, folder, 4)
    gone = tmp_path / "gone"
    os.rename(folder, gone)  # at once, where deleting takes a while in which files are added
    shutil.rmtree(gone)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 2, said
    # tensorboard's thread adds its own
    errors = [line for line in said.splitlines() if line.startswith("bdlm: ")]
    assert len(errors) == 1 and str(folder) in errors[0] and "deleted" in errors[0]
    assert not folder.exists() and not gone.exists()


@unix
def test_a_folder_that_another_took_the_place_of_is_left_alone(small, tmp_path):
    run, folder = small(*PLAIN, "limits.steps=3"), tmp_path / "run"

    def replace(*values):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        return ""

    with pytest.raises(CheckpointError, match="replaced"):
        train(run, replace)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_config_and_tokenizer_deleted_in_mid_run_are_written_again(small, tmp_path):
    def delete(*values):
        (tmp_path / "run" / "config.json").unlink()
        shutil.rmtree(tmp_path / "run" / "tokenizer")
        return ""

    train(small(*PLAIN, "limits.steps=2", "valid.every_steps=1", "save.every_steps=1"), delete)
    assert (tmp_path / "run" / "config.json").is_file() and (
        tmp_path / "run" / "tokenizer"
    ).is_dir()
    assert train(small(*PLAIN, "limits.steps=3")).step == 3


# -- samples, trackers, starting models ------------------------------------------------------------


def test_a_run_without_an_end_token_logs_samples(text, tmp_path):
    from bdlm.api import train as train_and_sample
    from bdlm.training.config import load_config

    words = arguments(text, tmp_path / "run", *PLAIN, "limits.steps=2", "valid.every_steps=1")
    config = load_config(None, [*words, "data.tokenizer=bytes-no-end", "data.document_eos=false"])
    assert train_and_sample(config).step == 2
    assert len([r for r in read_metrics(tmp_path / "run") if r["kind"] == "sample"]) == 2


def test_a_sample_that_fails_does_not_end_training(small, capsys):
    def sampler(*values):
        raise ConfigError("no sample today")

    assert train(small(*PLAIN, "limits.steps=2"), sampler).reason == "done"
    assert "no sample today" in capsys.readouterr().err


def test_a_tracker_without_its_package_is_refused_before_training(small, tmp_path, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match="pip install comet-ml"):
        train(small("log.trackers=[comet_ml]"))
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        train(small("log.trackers=[tensorbord]"))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_is_one_line(small, tmp_path, monkeypatch):
    import accelerate

    def refused(self, *values, **options):
        raise RuntimeError("not\nlogged in")

    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", refused)
    with pytest.raises(
        ConfigError, match=r"log\.trackers tensorboard could not start \(not logged in\)"
    ):
        train(small("log.trackers=[tensorboard]"))
    assert not (tmp_path / "run").exists()


def test_a_transformers_model_to_start_from_is_refused_before_the_data_is_read(small, tmp_path):
    from models.tiny_hf import tiny

    tiny("llama", block_size=4, mask_id=22).save(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"model\.init_from .* 'llama'"):
        train(
            small(f"model.init_from={tmp_path / 'llama'}", f"data.train=[{tmp_path / 'none.txt'}]")
        )
    assert not Path(tmp_path, "run").exists()
