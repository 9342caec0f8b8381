"""The transformers face: its folders and ours are the same folders, and its forward is the
published call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.errors import CheckpointError, UnsupportedError
from bdlm.core.forward import extend, layout_at, predict, train_logits
from bdlm.core.objectives import log_probs
from bdlm.core.types import Canvas, NoisedBatch
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.model_folder import load, save

transformers = pytest.importorskip("transformers")

from bdlm.models.pretrained import BD3LM, BD3LMConfig, register  # noqa: E402

ROWS, LENGTH, BLOCK, VOCAB = 3, 16, 4, 17
SIZES = {
    "vocab_size": VOCAB,
    "hidden_dim": 32,
    "n_blocks": 2,
    "n_heads": 4,
    "cond_dim": 16,
    "model_length": LENGTH,
    "block_size": BLOCK,
}
ALGORITHMS = ("ar", "bd3lm", "mdlm", "sedd")


def tiny(algo: str = "bd3lm") -> BD3LM:
    model = BD3LM(BD3LMConfig(**SIZES, algo=algo, dropout=0.0))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return model.eval()


def noised(block_size: int = BLOCK) -> NoisedBatch:
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(VOCAB - 1, (ROWS, LENGTH), generator=draw)
    masked = torch.rand(ROWS, LENGTH, generator=draw) < 0.5
    time = torch.tensor([0.2, 0.5, 0.9])[:, None].expand(-1, LENGTH)
    one = torch.ones(ROWS, LENGTH)
    return NoisedBatch(
        clean,
        torch.where(masked, VOCAB - 1, clean),
        masked,
        time,
        one,
        masked,
        make_layout(Contiguous(block_size), LENGTH),
    )


@torch.no_grad()
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_folders_of_either_side_are_read_by_the_other(algo: str, tmp_path: Path) -> None:
    register()
    model, batch = tiny(algo), noised(1 if algo == "ar" else BLOCK if algo == "bd3lm" else LENGTH)
    everything = torch.ones_like(batch.masked)
    everything[:, 0] = algo != "ar"
    expected = train_logits(model, batch, query_mask=everything).logits
    model.save_pretrained(tmp_path / "theirs")
    ours, report = load(tmp_path / "theirs")
    assert type(ours) is DiT
    assert ours.config == model.config.dit()
    assert report.tensors == len(model.state_dict())
    assert torch.equal(train_logits(ours, batch, query_mask=everything).logits, expected)
    save(ours, tmp_path / "ours")
    for cls in (BD3LM, transformers.AutoModelForMaskedLM, transformers.AutoModel):
        again = cls.from_pretrained(tmp_path / "ours")
        assert type(again) is BD3LM
        assert again.spec == model.spec
        assert not again.training
        # transformers maps the file, where weights start at any byte; some BLAS round by alignment
        for parameter in again.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(train_logits(again, batch, query_mask=everything).logits, expected)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").dit() == ours.config
    save(again, tmp_path / "third")
    assert load(tmp_path / "third")[0].config == ours.config


@torch.no_grad()
def test_the_published_call_is_the_training_pass() -> None:
    """Not bit for bit: the published call computes the last clean block too, so its products have
    another shape and round otherwise."""
    model, batch = tiny().double(), noised()
    expected = train_logits(model, batch, query_mask=torch.ones_like(batch.masked)).logits
    out = model(torch.cat((batch.noisy, batch.clean), 1), timesteps=torch.zeros(ROWS))
    torch.testing.assert_close(out.logits.flatten(0, 1), expected, rtol=0, atol=1e-13)
    model.config.return_dict = False
    assert torch.equal(
        model(torch.cat((batch.noisy, batch.clean), 1), timesteps=torch.zeros(ROWS)), out.logits
    )


@torch.no_grad()
def test_sample_mode_is_the_cached_pass() -> None:
    model, batch, map = tiny(), noised(), Contiguous(BLOCK)
    cache = model.new_cache(ROWS, LENGTH)
    for start in range(0, LENGTH, BLOCK):
        cells = torch.arange(start, start + BLOCK).expand(ROWS, -1)
        canvas = Canvas(
            batch.noisy.gather(1, cells),
            torch.ones(ROWS, BLOCK, dtype=torch.bool),
            layout_at(map, cells),
        )
        window = torch.cat((batch.clean[:, :start], canvas.ids), 1)
        cached = predict(model, canvas, cache).logits
        torch.testing.assert_close(
            model(window).logits[:, start:].flatten(0, 1), cached, atol=1e-5, rtol=0
        )
        extend(model, batch.clean.gather(1, cells), layout_at(map, cells), cache)
    short = torch.cat((batch.noisy[:, :8], batch.clean[:, :8]), 1)
    assert model(short, sample_mode=False).logits.shape == (ROWS, 8, VOCAB)
    with pytest.raises(UnsupportedError, match="15 columns"):
        model(short[:, 1:], sample_mode=False)


@torch.no_grad()
@pytest.mark.parametrize("algo", ["mdlm", "sedd", "ar"])
def test_one_stream_models_read_one_copy(algo: str) -> None:
    model, batch = tiny(algo), noised(1 if algo == "ar" else LENGTH)
    if algo == "sedd":
        with pytest.raises(UnsupportedError, match="timesteps"):
            model(batch.noisy)
    everything = torch.ones_like(batch.masked)
    everything[:, 0] = algo != "ar"
    expected = train_logits(model, batch, query_mask=everything).logits
    assert expected is not None
    logits = model(batch.clean if algo == "ar" else batch.noisy, timesteps=batch.time[:, 0]).logits
    torch.testing.assert_close(
        logits[:, :-1] if algo == "ar" else logits,
        expected.view(ROWS, -1, VOCAB),
        atol=1e-5,
        rtol=0,
    )


@torch.no_grad()
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_padding_changes_nothing(algo: str) -> None:
    model, batch = tiny(algo), noised()
    real = torch.arange(LENGTH).expand(ROWS, -1) < 8
    other = torch.where(real, batch.noisy, (batch.noisy + 1) % VOCAB)
    copies = (lambda x: torch.cat((x, x), 1)) if algo == "bd3lm" else (lambda x: x)
    first, second = (
        model(copies(x), batch.time[:, 0], attention_mask=real.long()).logits[:, :8]
        for x in (batch.noisy, other)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("algo", ["bd3lm", "ar"])
def test_the_loss_is_the_mean_of_the_labelled_cells(algo: str) -> None:
    model, batch = tiny(algo), noised()
    labels = torch.where(batch.masked, batch.clean, -100)
    ids = torch.cat((batch.noisy, batch.clean), 1) if algo == "bd3lm" else batch.clean
    out = model(ids, labels=labels)
    shifted = 0 if algo == "bd3lm" else 1
    rows = [(r, i) for r, i in batch.masked.nonzero().tolist() if i >= shifted]
    terms = [-log_probs(out.logits[r, i - shifted], VOCAB - 1)[batch.clean[r, i]] for r, i in rows]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    loss, logits = model(ids, labels=labels, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert torch.equal(loss, out.loss)


def test_fresh_models_start_as_the_paper_says() -> None:
    model = BD3LM(BD3LMConfig(**SIZES))
    state = model.state_dict()
    for name, value in state.items():
        zero = "adaLN_modulation" in name or "output_layer.linear" in name
        assert zero == (not bool(value.any())), name
    assert model.backbone.vocab_embed.embedding.abs().max() <= 32**-0.5 + 1e-6
    assert model.config.mask_id == VOCAB - 1
    assert BD3LMConfig().hidden_dim == 768


def test_a_partial_load_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    whole = load_file(file)
    name = "backbone.blocks.1.norm2.weight"
    for tensors in (
        {n: v for n, v in whole.items() if n != name},
        {**whole, f"{name}s": torch.ones(2)},
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=name):
            BD3LM.from_pretrained(tmp_path / "m")
    published = {
        "backbone.rotary_emb.inv_freq": torch.ones(4),
        "sampling_eps_min": torch.tensor(0.1),
        "sampling_eps_max": torch.tensor(0.9),
    }
    save_file({**whole, **published}, file, metadata={"format": "pt"})
    assert BD3LM.from_pretrained(tmp_path / "m")


def test_gradient_checkpointing_is_switched_by_transformers_own_call() -> None:
    model, batch = tiny().train(), noised()
    ids, labels = (
        torch.cat((batch.noisy, batch.clean), 1),
        torch.where(batch.masked, batch.clean, -100),
    )
    model(ids, labels=labels).loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.gradient_checkpointing
    model(ids, labels=labels).loss.backward()
    assert all(
        torch.equal(g, p.grad)
        for g, p in zip(grads, model.parameters(), strict=True)
        if p.grad is not None
    )


def test_a_published_config_is_read(tmp_path: Path) -> None:
    entries = {
        **SIZES,
        "model_type": "bd3lm",
        "cross_attn": True,
        "causal": False,
        "attn_backend": "flex",
        "return_dict": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(entries))
    config = BD3LMConfig.from_pretrained(tmp_path)
    assert config.dit() == DiTConfig(**SIZES, mask_id=VOCAB - 1, dropout=0.1)
    assert config.return_dict is False
    assert config.attn_backend == "flex"
