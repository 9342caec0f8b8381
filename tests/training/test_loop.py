"""Whole runs: what they leave behind, that a resumed one is the uninterrupted one bit for bit, and
what is refused."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import arguments, losses

from bdlm.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from bdlm.models import model_folder
from bdlm.training import checkpoint
from bdlm.training.loop import main, train
from bdlm.training.run_log import read_metrics


def tensors(path):
    return checkpoint.load(Path(path)).groups


def assert_same(left, right):
    assert left.keys() == right.keys()
    for group in left:
        assert left[group].keys() == right[group].keys()
        for name, value in left[group].items():
            assert torch.equal(value, right[group][name]), (group, name)


@pytest.fixture
def finished(small, tmp_path):
    return train(small()), tmp_path / "run"


def test_a_run_leaves_a_model_that_loads_and_a_report(finished):
    result, folder = finished
    assert (result.reason, result.step) == ("done", 12)
    model, _ = model_folder.load(result.model)
    saved = tensors(result.checkpoint)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved["ema"][name]), name
    assert model.spec.block_size == 4
    facts = json.loads((folder / "model" / "training.json").read_text())
    assert facts["steps"] == 12
    assert facts["valid"][0]["block_size"] == 4
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    records = read_metrics(folder)
    kinds = [r["kind"] for r in records]
    assert kinds.count("train") == 12
    assert {"valid", "search", "event"} <= set(kinds)
    assert [r["block_size"] for r in records if r["kind"] == "train"] == [1] * 5 + [2] * 4 + [4] * 3
    search = next(r for r in records if r["kind"] == "search")
    assert len(search["loss_variance"]) == 36
    low, high = search["best"]
    assert [low, high, min(v for *_, v in search["loss_variance"])] in search["loss_variance"]


def test_training_learns(small):
    plain = (
        "noise.search=false",
        "valid.every_steps=null",
        "save.every_steps=null",
        "block_sizes=[]",
    )
    start = train(small("limits.steps=1", "optim.lr=1e-9", *plain, out="start")).valid[0]
    end = train(small("limits.steps=120", *plain)).valid[0]
    assert end["nats_per_token"] < start["nats_per_token"] - 10 * end["stderr"]


@pytest.mark.parametrize("step", [3, 6, 9, 12])
def test_resumed_is_uninterrupted(finished, small, tmp_path, step):
    """From any checkpoint: phases of block size, the search's intervals, dropout, averages,
    accumulation, two epochs."""
    result, folder = finished
    other = tmp_path / "again"
    for path in checkpoint.steps(folder / "checkpoints"):
        if int(path.name[-9:]) <= step:
            shutil.copytree(path, other / "checkpoints" / path.name)
    shutil.copytree(folder / "tokenizer", other / "tokenizer")
    again = train(small(out="again"))
    assert again.step == 12
    later = {s: v for s, v in losses(folder).items() if s > step}
    if later:
        assert losses(other) == later
    assert_same(tensors(result.checkpoint), tensors(again.checkpoint))
    key = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")}
    for kind in ("valid", "search"):
        first, second = (
            [key(r) for r in read_metrics(f) if r["kind"] == kind and r["step"] > step]
            for f in (folder, other)
        )
        assert first == second


OTHER_STATES = {
    "muon": (["optim.name=muon"], "optim.name=adamw", r"optim\.name"),
    # a refresh before the checkpoint, one after it; all block sizes from the start, so that each
    # has a distribution of its own
    "counts": (
        [
            "noise.distribution=importance",
            "noise.search=false",
            "noise.refresh_steps=5",
            "block_sizes=[[0.0, [1, 2, 4]]]",
        ],
        "noise.refresh_steps=4",
        r"noise\.refresh_steps",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_STATES)
def test_other_states_resume_too(small, tmp_path, name):
    options, other, refused = OTHER_STATES[name]
    whole = train(small(*options, out="whole"))
    for path in checkpoint.steps(tmp_path / "whole" / "checkpoints")[:2]:
        shutil.copytree(path, tmp_path / "again" / "checkpoints" / path.name)
    shutil.copytree(tmp_path / "whole" / "tokenizer", tmp_path / "again" / "tokenizer")
    again = train(small(*options, out="again"))
    assert losses(tmp_path / "again") == {
        s: v for s, v in losses(tmp_path / "whole").items() if s > 6
    }
    assert_same(tensors(whole.checkpoint), tensors(again.checkpoint))
    assert (
        checkpoint.load(Path(whole.checkpoint)).state["counts"]
        == checkpoint.load(Path(again.checkpoint)).state["counts"]
    )
    with pytest.raises(CheckpointError, match=refused):
        train(small(*options, other, "limits.steps=14", out="again"))


@pytest.mark.slow
def test_fitted_counts_change_the_noise(small, tmp_path):
    """The comparison above can fail: after the first refresh the losses are not those of uniform
    counts."""
    plain = [
        "noise.search=false",
        "valid.every_steps=null",
        "save.every_steps=null",
        "block_sizes=[]",
    ]
    for out, distribution in (
        ("count", ["noise.distribution=count"]),
        ("adaptive", ["noise.distribution=importance", "noise.refresh_steps=5"]),
    ):
        train(small(*plain, *distribution, out=out))
    count, adaptive = (losses(tmp_path / out) for out in ("count", "adaptive"))
    assert all(count[s] == pytest.approx(adaptive[s], abs=1e-6) for s in range(1, 6))
    assert count[6] != adaptive[6]


def test_another_seed_gives_other_losses(finished, small, tmp_path):
    """The comparison above can fail."""
    train(small("seed=2", out="other"))
    other = losses(tmp_path / "other")
    # the first model is the same: all words equally likely
    assert all(other[s] != v for s, v in losses(finished[1]).items() if s > 2)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished, small, tmp_path, capsys):
    _, folder = finished
    file = folder / "checkpoints" / "step-000000012" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    again = train(small())
    assert str(file) in capsys.readouterr().err
    assert again.step == 12
    assert losses(folder).keys() == set(range(1, 13))  # `losses` compares the repeated steps
    checkpoint.verify(file.parent)


def test_resume_from_a_damaged_path_is_refused(finished, small):
    _, folder = finished
    file = folder / "checkpoints" / "step-000000006" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        train(small(f"resume={file.parent}"))


def test_a_new_run_does_not_write_over_an_old_one(finished, small):
    with pytest.raises(ConfigError, match="resume"):
        train(small("resume=never"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_dim=64", "model.hidden_dim"),
        ("seed=5", "seed"),
        ("noise.distribution=time", "noise.distribution"),
        ("data.tokenizer=bytes-no-end", "data.tokenizer"),
    ],
)
def test_a_resumed_run_is_the_same_run(finished, small, override, words):
    with pytest.raises(CheckpointError, match=words):
        train(small(override, "limits.steps=14"))


def test_a_resumed_run_reads_the_same_text(finished, small, tmp_path):
    (tmp_path / "b.txt").write_text("other words than before " * 400)
    with pytest.raises(CheckpointError, match="windows"):
        train(small(f"data.train=[{tmp_path / 'b.txt'}]", "limits.steps=14"))


def test_a_run_that_could_not_begin_leaves_nothing(small, tmp_path):
    """Neither a folder nor, where one was there, a tokenizer that the next try would take for its
    own."""
    with pytest.raises(DataError):
        train(small(f"data.train=[{tmp_path / 'none.txt'}]", "data.tokenizer=bytes-no-end"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError):
        train(
            small(
                f"data.valid=[{tmp_path / 'none.txt'}]",
                "data.tokenizer=bytes-no-end",
                "data.document_eos=false",
            )
        )
    assert not (tmp_path / "run" / "config.json").exists()
    train(small("limits.steps=1"))
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["vocab_size"] == 258


def test_a_longer_limit_goes_on(finished, small, tmp_path):
    assert train(small("limits.steps=15")).step == 15


def test_loss_that_is_not_finite_stops_before_the_weights_are_touched(small, tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(
            small(
                "optim.lr=1e18",
                "optim.clip=0",
                "optim.warmup_steps=0",
                "valid.every_steps=null",
                "save.every_steps=1",
            )
        )
    message = str(caught.value)
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert f"at step {saved.step + 1}" in message
    assert str(saved.path) in message
    assert "windows" in message
    assert "\n" not in message
    assert all(bool(v.isfinite().all()) for v in saved.groups["weights"].values())


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(
    finished, small, tmp_path, monkeypatch
):
    _, folder = finished
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train(small(out="full"))
    monkeypatch.undo()
    saved = checkpoint.load_newest(tmp_path / "full" / "checkpoints")
    assert 0 < saved.step < 12
    train(small(out="full"))
    assert losses(tmp_path / "full") == losses(folder)


def test_one_run_a_folder(small, tmp_path):
    with checkpoint.folder_lock(tmp_path / "run"), pytest.raises(CheckpointError, match="in use"):
        train(small())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("bad.txt", b"caf\xe9 " * 200),
        ("one.txt", b"a"),
        ("short.txt", b"ab cd ef"),
    ],
)
def test_text_that_cannot_be_used(small, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        train(small(f"data.train=[{tmp_path / name}]"))


def test_bad_input_exits_with_2_and_one_line(text, tmp_path, capsys):
    assert main(arguments(text, tmp_path / "run", "optim.lrr=1")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "did you mean 'lr'" in said
    assert not (tmp_path / "run").exists()


def test_warm_start_from_another_block_size(finished, small):
    """Weights do not depend on the block size: the warm start's first loss is the other model's."""
    result, _ = finished
    warm = [
        "block_sizes=[]",
        "model.block_size=8",
        "limits.steps=1",
        "optim.lr=1e-12",
        "noise.search=false",
        "valid.block_sizes=[2,4]",
    ]
    ours = train(small(f"model.init_from={result.model}", *warm, out="warm"))
    plain = train(small(*warm, out="cold"))
    assert ours.valid[0]["nats_per_token"] < plain.valid[0]["nats_per_token"]
    first, _ = model_folder.load(result.model)
    then, _ = model_folder.load(ours.model)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, then.state_dict()[name], atol=1e-9, rtol=0)
    assert then.spec.block_size == 8


def test_warm_start_of_another_size_or_vocabulary_is_refused(finished, small):
    result, _ = finished
    with pytest.raises(ConfigError, match=r"model\.n_blocks"):
        train(small(f"model.init_from={result.model}", "model.n_blocks=3", out="warm"))
    with pytest.raises(DataError, match="vocab"):
        train(
            small(
                f"model.init_from={result.model}",
                "data.tokenizer=bpe",
                "data.vocab_size=270",
                out="warm2",
            )
        )


@pytest.mark.parametrize("algo", ["mdlm", "sedd", "ar"])
def test_the_other_objectives_train(small, algo):
    block = [] if algo == "ar" else ["model.block_size=32"]
    result = train(
        small(
            f"model.algo={algo}",
            "block_sizes=[]",
            "noise.search=false",
            "limits.steps=30",
            "optim.lr=1e-2",
            *block,
        )
    )
    assert result.valid[0]["nats_per_token"] < math.log(258)


def test_samples_are_logged(small, tmp_path):
    seen = []

    def sampler(model, tokenizer, size):
        seen.append((model.training, size))
        return tokenizer.decode([97, 98])

    train(small("limits.steps=5", "noise.search=false"), sampler)
    texts = [r["text"] for r in read_metrics(tmp_path / "run") if r["kind"] == "sample"]
    assert set(texts) == {"ab"}
    assert seen[0] == (False, 2)


def test_token_and_minute_limits(small):
    # 8 windows of 32 a step
    assert (
        train(small("limits.steps=null", "limits.tokens=600", "noise.search=false", out="a")).step
        == 3
    )
    timed = train(
        small(
            "limits.steps=null",
            "limits.minutes=0.02",
            "valid.every_steps=null",
            "save.every_steps=null",
            out="b",
        )
    )
    assert timed.step >= 1
    assert timed.seconds >= 1.2
