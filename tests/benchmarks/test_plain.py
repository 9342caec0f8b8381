"""The baseline computes the published function, and the library computes the same one: otherwise
the comparison would mean nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.forward import train_logits
from bdlm.core.fused_cross_entropy import weighted_linear_cross_entropy
from bdlm.core.types import NoisedBatch
from bdlm.models.dit import DiT, DiTConfig
from benchmarks import plain

FOLDER = Path(os.environ.get("BDLM_GOLDEN_DIR", Path(__file__).parents[1] / "golden" / "data"))
FILES = sorted(FOLDER.glob("bd3lm_*.safetensors"))


@pytest.mark.golden
@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_plain_passes_golden(file):
    from safetensors.torch import load_file

    size, held = json.loads((FOLDER / "meta.json").read_text())[file.stem], load_file(file)
    length, block = size["L"], size["block_size"]
    model = plain.PlainDiT(
        size["V"] + 1, size["hidden"], size["nb"], size["nh"], size["cond"], length, block
    )
    model.load_state_dict({k: v for k, v in held.items() if k.startswith("backbone.")})
    noisy, clean = held["xt"], held["x0"]
    with torch.no_grad():
        logits = model(noisy, clean)
        torch.testing.assert_close(logits, held["two_stream_logits"], atol=2e-5, rtol=0)
        log_p = plain.subs(logits, noisy, size["V"])
        torch.testing.assert_close(
            log_p.gather(-1, clean[..., None])[..., 0].exp(),
            held["token_loss"].div(held["loss_scale"]).exp(),
            atol=1e-5,
            rtol=1e-4,
        )
        weight, scored = -held["loss_scale"], torch.ones_like(clean, dtype=torch.bool)
        loss = plain.training_loss(model, noisy, clean, weight, scored)
        torch.testing.assert_close(loss, held["token_loss"].mean(), rtol=1e-4, atol=0)
        model.new_cache(clean.shape[0], length)
        for start in range(0, length, block):
            cells = slice(start, start + block)
            torch.testing.assert_close(
                model.denoise(noisy[:, cells]),
                held["cached_block_logits"][:, cells],
                atol=2e-5,
                rtol=0,
            )
            model.denoise(clean[:, cells], store=True)


def both(block_size: int, seed: int = 0) -> tuple[plain.PlainDiT, DiT]:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 41,
        "hidden_dim": 32,
        "n_blocks": 2,
        "n_heads": 2,
        "cond_dim": 16,
        "model_length": 24,
        "block_size": block_size,
    }
    ours, theirs = DiT(DiTConfig(mask_id=40, **sizes)), plain.PlainDiT(**sizes)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


@pytest.mark.parametrize("block_size", (1, 4, 24))
def test_training_loss_and_gradients_agree(block_size):
    theirs, ours = both(block_size)
    clean = torch.randint(40, (3, 24))
    masked = torch.rand(3, 24) < 0.6
    weight = torch.where(masked, 1 + torch.rand(3, 24), 0.0)
    scored = torch.ones_like(masked)
    noisy = torch.where(masked, 40, clean)
    layout = make_layout(Contiguous(block_size), 24)
    batch = NoisedBatch(clean, noisy, masked, torch.ones(3, 24), weight, scored, layout)
    hidden = train_logits(ours, batch, outputs=frozenset({"hidden"})).hidden
    got, _ = weighted_linear_cross_entropy(
        hidden, ours.head.weight, ours.head.bias, clean[masked], weight[masked] / scored.sum(), 40
    )
    want = plain.training_loss(theirs, noisy, clean, weight, scored)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.backward()
    want.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_plain_sampler_writes_real_tokens_and_repeats_itself():
    theirs, _ = both(4)
    text = plain.sample(theirs, 7, 24, seed=3)
    assert text.shape == (24,)
    assert text[0] == 7
    assert bool((text < 40).all())
    assert torch.equal(text, plain.sample(theirs, 7, 24, seed=3))
    assert bool((plain.sample(theirs, 7, 24, nucleus_p=0.9, seed=3) < 40).all())


def test_plain_nucleus_drops_the_crossing_token():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]])
    torch.testing.assert_close(
        plain.nucleus(p, 0.9), torch.tensor([[0.625, 0.375, 0, 0], [1.0, 0, 0, 0]])
    )
