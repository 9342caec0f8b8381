"""Model folders: what is saved comes back bit for bit, and whatever does not fit is refused by
name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdlm.core.errors import BdlmError, CheckpointError
from bdlm.models import model_folder
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.model_folder import BACKBONES, load, resolve, save


def tiny(algo: str = "bd3lm", seed: int = 0, **changes: Any) -> DiT:
    """A model with random weights everywhere (zero gates would hide errors)."""
    sizes = {
        "vocab_size": 17,
        "mask_id": 16,
        "hidden_dim": 32,
        "n_blocks": 2,
        "n_heads": 4,
        "cond_dim": 16,
        "model_length": 16,
        "block_size": 4,
    }
    model = DiT(DiTConfig(**{**sizes, "algo": algo, **changes}))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny(), tmp_path / "model")


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Replace (or, with None, remove) tensors of a saved model; names may have dots, so they come
    as a mapping."""
    stored = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        stored.pop(name, None)
        if value is not None:
            stored[name] = value
    save_file(stored, folder / "model.safetensors")
    unlist(folder)


def unlist(folder: Path) -> None:
    """Drop the checksums, as one does who changes a file on purpose."""
    (folder / "manifest.json").unlink(missing_ok=True)


def reconfigure(folder: Path, drop: tuple[str, ...] = (), **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **entries}.items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(config))
    unlist(folder)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", sorted(BACKBONES))
def test_a_saved_model_comes_back_bit_for_bit(algo: str, tmp_path: Path) -> None:
    model = tiny(algo, first_token=3, stop_token=None)
    again, report = load(save(model, tmp_path / "m"))
    assert again.config == model.config
    assert again.spec == model.spec
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert all(p.requires_grad for p in again.parameters())
    assert not again.training
    assert report.tensors == len(ours)
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_a_lone_safetensors_file_carries_its_config(folder: Path, tmp_path: Path) -> None:
    lone = tmp_path / "elsewhere.safetensors"
    lone.write_bytes((folder / "model.safetensors").read_bytes())
    assert load(lone)[0].config == tiny().config


def test_dtype_is_the_stored_one_unless_asked(folder: Path, tmp_path: Path) -> None:
    assert load(folder)[1].dtype == torch.float32
    model, report = load(folder, dtype=torch.bfloat16)
    assert report.dtype == torch.bfloat16
    assert load(save(model, tmp_path / "half"))[1].dtype == torch.bfloat16


def test_the_learned_interval_is_reported_and_stored_as_published(tmp_path: Path) -> None:
    target = save(tiny(), tmp_path / "m", extra={"sampling_eps_min": 0.3, "sampling_eps_max": 0.8})
    assert load_file(target / "model.safetensors")["sampling_eps_min"].shape == ()
    report = load(target)[1]
    assert report.clip == pytest.approx((0.3, 0.8))
    assert "beta 0.3, omega 0.8" in str(report)


def test_other_weights_can_be_saved_in_place_of_the_models(tmp_path: Path) -> None:
    average = {n: v + 1 for n, v in tiny().state_dict().items()}
    again, _ = load(save(tiny(), tmp_path / "m", weights=average))
    assert torch.equal(
        again.state_dict()["backbone.blocks.0.norm1.weight"],
        average["backbone.blocks.0.norm1.weight"],
    )
    average.popitem()
    with pytest.raises(CheckpointError, match="names or shapes differ"):
        save(tiny(), tmp_path / "n", weights=average)


def test_nothing_is_overwritten_unasked_and_nothing_is_left_beside(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match="already holds a model"):
        save(tiny(seed=1), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    save(tiny(seed=1), folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert torch.equal(next(load(folder)[0].parameters()), next(tiny(seed=1).parameters()))


def test_nan_weights_are_not_saved(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.backbone.blocks[1].norm2.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm2\.weight has NaN"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# -- published files -------------------------------------------------------------------------------

PUBLISHED = {
    "model_type": "bd3lm",
    "architectures": ["BD3LM"],
    "block_size": 4,
    "vocab_size": 17,
    "model_length": 16,
    "cross_attn": True,
    "adaln": True,
    "attn_backend": "flex",
    "causal": False,
    "hidden_dim": 32,
    "cond_dim": 16,
    "n_blocks": 2,
    "n_heads": 4,
    "dropout": 0.1,
    "time_conditioning": False,
    "var_min": True,
    "sampling_eps_min": 1e-3,
    "sampling_eps_max": 0.999,
    "return_dict": False,
    "auto_map": {
        "AutoConfig": "configuration_bd3lm.BD3LMConfig",
        "AutoModelForMaskedLM": "someone/repo--modeling_bd3lm.BD3LM",
    },
    "torch_dtype": "float32",
    "transformers_version": "4.49.0",
}


def published(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    unlist(folder)
    return folder


def test_a_published_config_loads(folder: Path) -> None:
    inverse = 10000.0 ** (-torch.arange(4) / 4)
    rewrite(
        published(folder),
        **{
            "backbone.rotary_emb.inv_freq": inverse,
            "sampling_eps_min": torch.tensor(0.25),
            "sampling_eps_max": torch.tensor(0.75),
        },
    )
    model, report = load(folder)
    assert model.config.mask_id == 16
    assert model.config.block_size == 4
    assert model.config.dropout == 0.1
    assert report.clip == (0.25, 0.75), "the tensors win over the config"
    assert "backbone.rotary_emb.inv_freq" in report.set_aside
    assert "mask_id" in str(report)


def test_the_published_conditioning_width_is_read_from_the_weights(folder: Path) -> None:
    model, report = load(published(folder, cond_dim=129))
    assert model.config.cond_dim == 16
    assert "cond_dim taken from the weights" in str(report)
    reconfigure(folder, cond_dim=17)
    assert "adaLN_modulation.weight has shape" in refusal(folder), (
        "only the known slip is put right"
    )


def test_gpt2s_end_token_is_taken_for_the_published_vocabulary(tmp_path: Path) -> None:
    folder = save(tiny(vocab_size=50258, mask_id=50257, hidden_dim=8, n_heads=2), tmp_path / "m")
    model, report = load(published(folder, vocab_size=50258, hidden_dim=8, n_heads=2))
    assert (model.spec.first_token, model.spec.stop_token, model.spec.mask_id) == (
        50256,
        50256,
        50257,
    )
    assert "50256" in str(report)


def test_published_flags_choose_the_algorithm(folder: Path, tmp_path: Path) -> None:
    assert load(published(folder, cross_attn=False))[0].config.algo == "mdlm"
    assert load(published(folder, model_type="mdlm"))[0].config.algo == "mdlm"
    causal = save(tiny("ar"), tmp_path / "ar")
    assert (
        load(published(causal, causal=True, adaln=False, cross_attn=False))[0].config.algo == "ar"
    )
    assert "adaLN" in refusal(published(folder, adaln=False))
    assert "time_conditioning" in refusal(published(folder, time_conditioning=True))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.backbone.", "backbone._orig_mod.", "module.backbone.", ""]
)
def test_the_prefixes_of_wrapped_models_are_taken_off(folder: Path, prefix: str) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(
        {n.replace("backbone.", prefix, 1): v for n, v in stored.items()},
        folder / "model.safetensors",
    )
    unlist(folder)
    model, _ = load(folder)
    assert torch.equal(
        model.state_dict()["backbone.vocab_embed.embedding"],
        stored["backbone.vocab_embed.embedding"],
    )


def test_another_rotary_base_is_refused(folder: Path) -> None:
    rewrite(folder, **{"backbone.rotary_emb.inv_freq": 500000.0 ** (-torch.arange(4) / 4)})
    assert "inv_freq" in refusal(folder)


def test_shards_are_read_through_their_index(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    names = sorted(stored)
    place = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in sorted(set(place.values())):
        save_file({n: stored[n] for n in names if place[n] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    unlist(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    assert all(torch.equal(v, stored[n]) for n, v in load(folder)[0].state_dict().items())
    (folder / shard).unlink()
    assert shard in refusal(folder)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(tiny().state_dict()))
def test_every_missing_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, **{name: None})
    assert f"tensor {name} is missing" in refusal(folder)


def test_unexpected_misshapen_and_broken_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    name = "backbone.blocks.1.mlp.0.bias"
    for value, words in [
        (torch.zeros(3), r"shape \[3\], config.json asks for \[128\]"),
        (torch.full((128,), float("nan")), "NaN"),
        (torch.full((128,), float("-inf")), "infinite"),
        (torch.zeros(128, dtype=torch.long), "int64"),
    ]:
        broken = save(tiny(), tmp_path / "broken", overwrite=True)
        rewrite(broken, **{name: value})
        assert re.search(f"{re.escape(name)}.*{words}", refusal(broken))
    rewrite(folder, **{"backbone.blocks.2.norm1.weight": torch.ones(32)})
    assert "backbone.blocks.2.norm1.weight is unexpected" in refusal(folder)
    twice = save(tiny(), tmp_path / "twice")
    rewrite(twice, **{"_orig_mod.backbone.blocks.0.norm1.weight": torch.ones(32)})
    assert "twice" in refusal(twice)


def test_vocabularies_that_differ_are_refused(folder: Path) -> None:
    assert load(folder, vocabulary=17)
    assert "17 token ids, the tokenizer 20" in refusal(folder, vocabulary=20)
    reconfigure(folder, vocab_size=18)
    assert "vocab_size 18, the weights have 17 rows" in refusal(folder)


def test_truncated_and_bit_flipped_headers_are_refused_with_the_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    unlist(folder)
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert str(file) in refusal(folder)
    file.write_bytes(whole)
    (folder / "config.json").write_text('{"vocab_size": ')
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "model.pt"])
def test_pickles_are_refused_with_the_fix(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    unlist(folder)
    torch.save(tiny().state_dict(), folder / name)
    for source in (folder, folder / name):
        assert "pickle" in refusal(source)
        assert "convert_lightning" in refusal(source)


def test_code_in_a_config_is_refused_without_trust(folder: Path, tmp_path: Path) -> None:
    for entries in [
        {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
        {"auto_map": {"AutoModel": ["a--modeling_bd3lm.BD3LM", "evil.Run"]}},
        {"backbone": "os.path:join"},
        {"noise": {"schedule": "package.module:Name"}},
    ]:
        assert "trust_code=True" in refusal(save_with(tmp_path / str(len(str(entries))), entries))
    reconfigure(folder, backbone=f"{__name__}:build", marker="from config")
    model, report = load(folder, trust_code=True)
    assert model.marker == "from config"
    assert report.config["marker"] == "from config"
    reconfigure(folder, backbone="no.such.module:Name")
    assert "cannot be imported" in refusal(folder, trust_code=True)


def save_with(folder: Path, entries: dict[str, Any]) -> Path:
    reconfigure(save(tiny(), folder), **entries)
    return folder


def build(config: dict[str, Any]) -> DiT:
    """A backbone of one's own, as a user would write it."""
    model = tiny(seed=5)
    model.marker = config["marker"]
    return model


def test_configs_that_say_too_little_are_refused(folder: Path) -> None:
    for name in ("vocab_size", "hidden_dim", "block_size", "n_heads"):
        whole = (folder / "config.json").read_text()
        reconfigure(folder, drop=(name,))
        assert name in refusal(folder)
        (folder / "config.json").write_text(whole)
    reconfigure(folder, n_heads="4")
    assert "n_heads '4'" in refusal(folder)
    reconfigure(folder, n_heads=5)
    assert "hidden_dim" in refusal(folder)
    reconfigure(folder, n_heads=4, algo="bd3lmm")
    assert "did you mean 'bd3lm'" in refusal(folder)


def test_names_resolve_to_packaged_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "packaged", lambda: {"shakespeare": folder})
    assert resolve("shakespeare") == folder
    assert load("shakespeare")[0].config == tiny().config
    with pytest.raises(BdlmError, match="did you mean 'shakespeare'"):
        resolve("shakespear")
    with pytest.raises(BdlmError, match="known: shakespeare"):
        resolve("zzz")
