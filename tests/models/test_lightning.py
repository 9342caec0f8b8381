"""Conversion of Lightning checkpoints: averaged weights land on the right names, and nothing of the
file is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bdlm.core.errors import CheckpointError
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.lightning import convert_lightning
from bdlm.models.model_folder import load

SIZES = {"algo": "bd3lm", "n_heads": 4, "model_length": 16, "block_size": 4}


class Node:
    """Shaped like a value of the reference's config library: the file knows it by this class's name
    only."""

    def __init__(self, value: Any) -> None:
        self._val = value


class Container:
    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo boom > boom.txt",)


def tiny() -> DiT:
    model = DiT(DiTConfig(17, 16, 32, 2, 4, 16, 16, 4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def checkpoint(model: DiT, compiled: bool = False) -> dict[str, Any]:
    """What the reference's trainer writes: buffers among the weights, the average as a list in
    parameter order."""
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("blocks.0.norm1.weight"):
            state["backbone.rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(4) / 4)
        state[name.replace("backbone.", "backbone._orig_mod.") if compiled else name] = value
    state |= {"sampling_eps_min": torch.tensor(0.45), "sampling_eps_max": torch.tensor(0.95)}
    average = {
        "decay": 0.9999,
        "num_updates": 7,
        "shadow_params": [p.detach() * 2 for p in model.parameters()],
    }
    return {"state_dict": state, "ema": average, "global_step": 3}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_average_is_taken_in_parameter_order(tmp_path: Path, compiled: bool) -> None:
    model = tiny()
    torch.save(checkpoint(model, compiled), tmp_path / "last.ckpt")
    report = convert_lightning(tmp_path / "last.ckpt", tmp_path / "out", SIZES)
    assert report.clip == pytest.approx((0.45, 0.95))
    again, _ = load(tmp_path / "out")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[n], 2 * v) for n, v in model.state_dict().items())
    convert_lightning(tmp_path / "last.ckpt", tmp_path / "raw", SIZES, ema=False)
    assert all(
        torch.equal(load(tmp_path / "raw")[0].state_dict()[n], v)
        for n, v in model.state_dict().items()
    )


def test_settings_are_read_from_inert_records(tmp_path: Path) -> None:
    content = checkpoint(tiny())
    sizes = {"n_heads": Node(4), "length": Node(16), "dropout": Node(0.1)}
    tree = {
        "block_size": Node(4),
        "algo": Container({"name": Node("bd3lm")}),
        "model": Container(sizes),
    }
    content["hyper_parameters"] = {"config": Container(tree)}
    torch.save(content, tmp_path / "last.ckpt")
    convert_lightning(tmp_path / "last.ckpt", tmp_path / "out")
    config = load(tmp_path / "out")[0].config
    assert (
        config.block_size,
        config.model_length,
        config.n_heads,
        config.dropout,
        config.algo,
    ) == (4, 16, 4, 0.1, "bd3lm")


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = checkpoint(tiny())
    cases = [
        ({**good, "ema": None}, SIZES, "ema=False"),
        (
            {**good, "ema": {"shadow_params": good["ema"]["shadow_params"][:-1]}},
            SIZES,
            "29 averaged tensors for 30 weights",
        ),
        (
            {**good, "ema": {"shadow_params": good["ema"]["shadow_params"][::-1]}},
            SIZES,
            "has shape",
        ),
        (good, {}, "does not say its algorithm"),
        (good, {"algo": "bd3lm"}, "lacks block_size, model_length"),
        ({**good, "hyper_parameters": Bomb()}, SIZES, "cannot be read as weights only"),
        ({"model": 1}, SIZES, "no state_dict"),
    ]
    for content, config, words in cases:
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(CheckpointError, match=words):
            convert_lightning(tmp_path / "bad.ckpt", tmp_path / "out", config)
    (tmp_path / "bad.ckpt").write_bytes((tmp_path / "bad.ckpt").read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_lightning(tmp_path / "bad.ckpt", tmp_path / "out", SIZES)
    assert not (tmp_path / "boom.txt").exists()
    assert not (tmp_path / "out").exists()
