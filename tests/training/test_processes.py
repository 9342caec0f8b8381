"""Two processes (gloo, through accelerate) are one: the same noise, the same losses, one checkpoint
that either can resume."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from training_runs import arguments, losses

from bdlm.core.types import ModelSpec
from bdlm.training import checkpoint
from bdlm.training.adaptive import AdaptiveCounts
from bdlm.training.config import load_config
from bdlm.training.loop import train
from bdlm.training.noising import Noiser
from bdlm.training.run_log import read_metrics
from bdlm.training.sections import NoiseSection


def launch(words, processes=2, launcher=()):
    """Run the training module in several processes, as `accelerate launch --cpu` does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(processes):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(processes),
            **dict(launcher),
        }
        command = [sys.executable, "-m", "bdlm.training.loop", *words]
        children.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    done = [child.communicate(timeout=300) for child in children]
    for child, (_, err) in zip(children, done):
        assert child.returncode == 0, err
    return done


@pytest.mark.parametrize("distribution", ["count", "time"])
@pytest.mark.parametrize("size", [1, 4, 32])
def test_noise_does_not_depend_on_how_the_batch_is_split(distribution, size):
    noiser = Noiser(
        ModelSpec(vocab_size=50, mask_id=49, block_size=4, max_length=32),
        seed=3,
        distribution=distribution,
    )
    ids = torch.randint(49, (8, 32), generator=torch.Generator().manual_seed(0))
    doc = torch.zeros_like(ids)
    doc[7, 20:] = -1
    row = torch.arange(40, 48)
    whole = noiser(ids, doc, row, size=size, step=5, rows_total=8, first_row=0)
    for pieces in (2, 4):
        count = 8 // pieces
        for first in range(0, 8, count):
            part = slice(first, first + count)
            mine = noiser(
                ids[part], doc[part], row[part], size=size, step=5, rows_total=8, first_row=first
            )
            for name in ("noisy", "masked", "weight", "time", "scored"):
                assert torch.equal(getattr(mine, name), getattr(whole, name)[part]), name


@pytest.mark.parametrize(
    "distribution", ["count", pytest.param("importance", marks=pytest.mark.slow)]
)
def test_two_processes_give_the_losses_of_one(text, tmp_path, distribution):
    # dropout is each process's own
    plain = ["model.dropout=0", f"noise.distribution={distribution}"]
    if distribution == "importance":
        plain += ["noise.search=false", "noise.refresh_steps=2", "block_sizes=[]"]
    launch(arguments(text, tmp_path / "two", *plain))
    train(load_config(None, arguments(text, tmp_path / "one", *plain)))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(1, 13))
    for step, value in one.items():
        assert abs(value - two[step]) < 1e-5, step
    for kind, field in (("valid", "nats_per_token"), ("valid", "stderr")):
        first, second = (
            [r[field] for r in read_metrics(tmp_path / name) if r["kind"] == kind]
            for name in ("one", "two")
        )
        assert first == pytest.approx(second, abs=1e-5), kind
    if distribution == "importance":
        distributions = [AdaptiveCounts(NoiseSection(), None) for _ in range(2)]
        for adaptive, name in zip(distributions, ("one", "two"), strict=True):
            adaptive.restore(
                checkpoint.load_newest(tmp_path / name / "checkpoints").state["counts"]
            )
        first, second = (adaptive.distribution(4).probs for adaptive in distributions)
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
        assert float((first[4, 1:] - 0.25).abs().max()) > 1e-4, "a distribution that was fitted"
    # and one process can take up what two have written
    again = train(load_config(None, arguments(text, tmp_path / "two", *plain, "limits.steps=14")))
    assert again.step == 14


@pytest.mark.slow
def test_a_batch_that_the_processes_do_not_divide(text, tmp_path):
    with pytest.raises(AssertionError, match=r"optim\.batch_size"):
        launch(arguments(text, tmp_path / "run", "optim.batch_size=6"))
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints") is None
