"""Runs that are really killed: SIGKILL at random moments, SIGTERM and SIGINT. What is resumed is
the uninterrupted run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from training_runs import arguments, losses

from bdlm.training import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

# Imports once, then trains in forked children. A line of stdin says when to kill one: so many
# records and then so many seconds after its start; -1 lets it come to its end. Counted in records,
# since a busy machine makes any time too short or too long.
FORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
import accelerate, safetensors.torch
from bdlm.training.config import load_config
from bdlm.training.loop import train
torch.set_num_threads(1)
config = load_config(None, sys.argv[1:])
metrics = Path(config.out, "metrics.jsonl")
count = lambda: metrics.read_bytes().count(b"\\n") if metrics.exists() else 0
print("ready", flush=True)
for line in sys.stdin:
    records, seconds = (float(word) for word in line.split())
    before = count()
    child = os.fork()
    if not child:
        train(config)
        os._exit(0)
    if records >= 0:
        ended = False
        while not ended and count() < before + records:
            time.sleep(0.002)
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if not ended:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forker:
    def __init__(self, words):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FORKER, *words]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, records=-1, seconds=0.0):
        """Status of a child that is killed so many seconds after it has written so many records; -1
        lets it come to its end."""
        self.process.stdin.write(f"{records} {seconds}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def final(folder):
    return checkpoint.load_newest(folder / "checkpoints").groups


def same(left, right):
    return all(
        (value == right[group][name]).all() for group in left for name, value in left[group].items()
    )


@pytest.mark.slow
def test_killed_at_twenty_random_moments(text, tmp_path):
    """Checkpoints at every step, so that many of the kills fall inside a save; another run saves
    seldom, so that they fall between."""
    chance = random.Random(11)
    whole = Forker(arguments(text, tmp_path / "whole", "limits.steps=40"))
    began = time.monotonic()
    assert whole.run() == 0
    alone = time.monotonic() - began
    whole.close()
    for name, every in (("often", 1), ("seldom", 7)):
        folder, kills = tmp_path / name, 0
        forker = Forker(
            arguments(text, folder, "limits.steps=40", f"save.every_steps={every}", "save.keep=2")
        )
        while kills < 10:
            # at most three records and a step's time: ten kills leave the run of 40 steps
            # unfinished
            status = forker.run(chance.randrange(4), chance.random() * alone / 40)
            assert status in (0, signal.SIGKILL)
            if status == 0:
                break
            kills += 1
        assert kills >= 5, "the kills came too late to mean anything"
        assert forker.run() == 0
        forker.close()
        # `losses` also compares every repeated step
        assert losses(folder) == losses(tmp_path / "whole")
        assert same(final(folder), final(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_cleanly(text, tmp_path, name):
    words = arguments(
        text,
        tmp_path / "run",
        "limits.steps=100000",
        "save.every_steps=null",
        "valid.every_steps=null",
        "log.every_steps=1",
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bdlm.training.loop", *words]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while child.poll() is None and (
        not metrics.exists() or len(metrics.read_text().splitlines()) < 5
    ):
        time.sleep(0.05)
    child.send_signal(signal.Signals[name])
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    result = json.loads(out)
    assert (result["reason"], result["model"]) == (name, None)
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert saved.step == result["step"] >= 4
    assert "resume=auto" in err
    again = [*words, f"limits.steps={saved.step + 2}"]
    done = subprocess.run(
        [sys.executable, "-m", "bdlm.training.loop", *again],
        capture_output=True,
        text=True,
        env=env,
    )
    assert json.loads(done.stdout)["step"] == saved.step + 2, done.stderr
