"""Checkpoints: what was written comes back, or the damaged file is named; a write that fails leaves
the last one whole."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from bdlm.core.errors import CheckpointError
from bdlm.training import checkpoint

GROUPS = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)},
    "optimizer": {"m/a": torch.ones(2, 3)},
    "ema": {},
}


def put(folder, step, keep=2, **state):
    return checkpoint.save(folder, step, GROUPS, {"step": step, **state}, keep)


def test_there_and_back(tmp_path):
    path = put(tmp_path, 7, interval=[0.1, 0.9])
    saved = checkpoint.load(path)
    assert (saved.step, saved.state) == (7, {"step": 7, "interval": [0.1, 0.9]})
    assert saved.groups.keys() == GROUPS.keys()
    for group, tensors in GROUPS.items():
        assert saved.groups[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(saved.groups[group][name], value)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        put(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-000000003", "step-000000004"]
    assert checkpoint.newest(tmp_path).name == "step-000000004"


def test_saving_the_same_step_again_keeps_it(tmp_path):
    first = put(tmp_path, 3)
    before = (first / "manifest.json").stat().st_ino
    put(tmp_path, 3)
    assert (first / "manifest.json").stat().st_ino == before


FILES = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_damage_is_refused_with_the_file_named_and_an_earlier_one_used(tmp_path, name, damage):
    put(tmp_path, 1)
    file = put(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes({"cut": content[:-3], "flip": content, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(file.parent)
    messages = []
    assert checkpoint.load_newest(tmp_path, messages).step == 1
    assert len(messages) == 1
    assert str(file) in messages[0]
    assert "\n" not in messages[0]


def test_every_flipped_bit_of_the_tensors_is_found(tmp_path):
    file = put(tmp_path, 1) / "weights.safetensors"
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match="sha256"):
            checkpoint.verify(file.parent)


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    (put(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.load_newest(tmp_path)


def test_a_failing_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    put(tmp_path, 1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-000000001"):
        put(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.load_newest(tmp_path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from bdlm.core.errors import CheckpointError
from bdlm.training import checkpoint
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
checkpoint.save(folder, 1, {"weights": {"a": torch.zeros(10)}}, {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoint.save(folder, 2, {"weights": {"a": torch.zeros(100_000)}}, {"step": 2})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
@pytest.mark.parametrize("limit", [0, 20, 4096, 300_000])
def test_a_write_cut_short_by_the_system_leaves_the_last_checkpoint_whole(tmp_path, limit):
    """RLIMIT_FSIZE makes the system refuse bytes in the middle of a tensor file, as a full disk
    does."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step-000000002' could not be written" in done.stdout
    assert checkpoint.load_newest(tmp_path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


KILLED = """
import sys, torch
from pathlib import Path
from bdlm.training import checkpoint
folder = Path(sys.argv[1])
print("ready", flush=True)
step = int(sys.argv[2])
while True:
    step += 1
    values = torch.full((200_000,), float(step))
    groups = {"weights": {"a": values}, "ema": {"a": -values}}
    checkpoint.save(folder, step, groups, {"step": step}, keep=2)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_checkpoint_remains(tmp_path):
    """kill -9 during saves, 20 times, at random moments: the newest whole checkpoint is consistent
    and never goes back."""
    import random
    import signal
    import time

    last, chance = 0, random.Random(5)
    for round in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(last)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.1 + chance.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        saved = checkpoint.load_newest(tmp_path)
        if saved is None:
            continue
        assert saved.step >= last, round
        assert bool((saved.groups["weights"]["a"] == saved.step).all())
        assert bool((saved.groups["ema"]["a"] == -saved.step).all())
        last = saved.step
    assert last > 20


HOLDER = """
import sys
from pathlib import Path
from bdlm.training.checkpoint import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_run_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "in\n"
    with (
        pytest.raises(CheckpointError, match=f"process {holder.pid}"),
        checkpoint.folder_lock(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with checkpoint.folder_lock(tmp_path):  # the system let go of a killed process's lock
        pass
