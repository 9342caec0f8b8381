"""Stored outputs of the reference implementation: every file of `data/` beside this test, or of the
folder BDLM_GOLDEN_DIR.

Nothing here is skipped for want of files: `data/` is part of the repository and holds every kind
(`README.md` says how it was made). Sizes come from the folder's meta.json; a file's kind is its
name's first word. Tolerances: 2e-5 absolute on logits, 1e-4 relative on losses. The reference's
floors and epsilons live here alone: the library's schedules are exact."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bdlm.core import forward
from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.objectives import log_probs, objective, token_nll
from bdlm.core.schedules import SCHEDULES
from bdlm.core.statistics import candidate_intervals
from bdlm.core.types import Canvas, NoisedBatch
from bdlm.generation.sampling.logits_filters import nucleus
from bdlm.models.dit import DiT, DiTConfig
from tests.core.reverse_kernel import analytic_probs, total_noise

pytestmark = pytest.mark.golden

FOLDER = Path(os.environ.get("BDLM_GOLDEN_DIR", Path(__file__).parent / "data"))
META = json.loads((FOLDER / "meta.json").read_text())
KINDS = {"bd3lm", "mdlm", "ar", "sedd", "schedules", "nucleus"}
LOGITS, LOSSES = {"atol": 2e-5, "rtol": 0}, {"atol": 1e-6, "rtol": 1e-4}


def files(kind: str) -> pytest.MarkDecorator:
    """Parametrise a test over the files whose name starts with `kind`."""
    return pytest.mark.parametrize("name", [stem for stem in stems() if stem.split("_")[0] == kind])


def stems() -> list[str]:
    return sorted(f.stem for f in FOLDER.glob("*.safetensors"))


@dataclass
class Golden:
    model: DiT
    held: dict[str, Tensor]
    size: dict[str, int]

    def batch(self, masked: Tensor, noisy: Tensor | None = None) -> NoisedBatch:
        """The file's windows with these cells masked and the file's weights."""
        clean, spec = self.held["x0"], self.model.spec
        layout = make_layout(Contiguous(spec.block_size), clean.shape[1], context=spec.context)
        weight = (
            -self.held["loss_scale"] * masked
            if "loss_scale" in self.held
            else masked.float() / self.held["t"]
        )
        noisy = self.held["xt"] if noisy is None else noisy
        return NoisedBatch(
            clean, noisy, masked, self.held["t"], weight, torch.ones_like(masked), layout
        )

    def everywhere(self) -> Tensor:
        return torch.ones_like(self.held["x0"], dtype=torch.bool)


def load(name: str) -> Golden:
    """The model of a file, strictly loaded, with everything that the file holds."""
    held, size = load_file(FOLDER / f"{name}.safetensors"), META[name]
    rows = held["backbone.vocab_embed.embedding"].shape[0]
    model = DiT(
        DiTConfig(
            vocab_size=rows,
            mask_id=size["V"],
            hidden_dim=size["hidden"],
            n_blocks=size["nb"],
            n_heads=size["nh"],
            cond_dim=size["cond"],
            model_length=size["L"],
            block_size=size.get("block_size", size["L"]),
            algo=name.split("_")[0],
        )
    )
    model.load_state_dict({k: v for k, v in held.items() if k.startswith("backbone.")}, strict=True)
    return Golden(model.eval(), held, size)


@torch.no_grad()
def whole_logits(golden: Golden, noised: NoisedBatch, at: Tensor) -> Tensor:
    logits = forward.train_logits(golden.model, noised, at).logits
    assert logits is not None
    return logits.view(at.shape[0], -1, logits.shape[-1])


def subs_where_masked(golden: Golden, logits: Tensor, masked: Tensor, noisy: Tensor) -> None:
    """log_probs at masked cells; carried cells hold a delta at their token in the reference's
    table."""
    mask_id, reference = golden.size["V"], golden.held["subs_log_probs"]
    ours = log_probs(logits, mask_id)
    real = torch.arange(ours.shape[-1]) != mask_id
    torch.testing.assert_close(ours[masked][:, real], reference[masked][:, real], **LOGITS)
    assert bool(torch.isneginf(ours[..., mask_id]).all())
    assert bool((reference[~masked].argmax(-1) == noisy[~masked]).all())


@files("bd3lm")
def test_golden_two_streams(name: str) -> None:
    golden = load(name)
    noised = golden.batch(golden.everywhere())
    logits = whole_logits(golden, noised, golden.everywhere())
    torch.testing.assert_close(logits, golden.held["two_stream_logits"], **LOGITS)
    masked = golden.held["u"] <= golden.held["t"]
    assert bool(
        (torch.where(masked, golden.size["V"], golden.held["x0"]) == golden.held["xt"]).all()
    )
    subs_where_masked(golden, logits, masked, golden.held["xt"])


@files("bd3lm")
@torch.no_grad()
def test_golden_losses(name: str) -> None:
    golden = load(name)
    masked = golden.held["u"] <= golden.held["t"]
    nll = torch.zeros(masked.shape).masked_scatter(
        masked, token_nll(golden.model, golden.batch(masked))
    )
    torch.testing.assert_close(nll, golden.held["token_cross_entropy"].abs(), **LOSSES)
    torch.testing.assert_close(
        objective(golden.model, golden.batch(masked)), golden.held["token_loss"], **LOSSES
    )
    masked[:, 0] = False
    noisy = torch.where(masked, golden.held["xt"], golden.held["x0"])
    torch.testing.assert_close(
        objective(golden.model, golden.batch(masked, noisy)),
        golden.held["ignore_bos_token_loss"],
        **LOSSES,
    )


@files("bd3lm")
@pytest.mark.parametrize("together", (False, True), ids=("extend", "advance"))
@torch.no_grad()
def test_golden_cached(name: str, together: bool) -> None:
    golden = load(name)
    model, clean, noisy = golden.model, golden.held["x0"], golden.held["xt"]
    (rows, length), n = clean.shape, golden.model.spec.block_size
    cache, before = model.new_cache(rows, length), None
    for start in range(0, length, n):
        cells = slice(start, start + n)
        layout = forward.layout_at(
            Contiguous(n), torch.arange(start, min(start + n, length)).expand(rows, -1)
        )
        canvas = Canvas(noisy[:, cells], torch.ones_like(noisy[:, cells], dtype=torch.bool), layout)
        if together and before is not None:
            out = forward.advance(model, clean[:, before[0]], before[1], canvas, cache)
        else:
            out = forward.predict(model, canvas, cache)
        assert out.logits is not None
        torch.testing.assert_close(
            out.logits.view(rows, -1, model.spec.vocab_size),
            golden.held["cached_block_logits"][:, cells],
            **LOGITS,
        )
        if not together:
            forward.extend(model, clean[:, cells], layout, cache)
        before = cells, layout


@files("mdlm")
@torch.no_grad()
def test_golden_mdlm(name: str) -> None:
    golden = load(name)
    logits = whole_logits(golden, golden.batch(golden.everywhere()), golden.everywhere())
    torch.testing.assert_close(logits, golden.held["logits"], **LOGITS)
    masked = golden.held["xt"] == golden.size["V"]
    subs_where_masked(golden, logits, masked, golden.held["xt"])
    torch.testing.assert_close(
        objective(golden.model, golden.batch(masked)), golden.held["token_loss"], **LOSSES
    )


@files("ar")
@torch.no_grad()
def test_golden_ar(name: str) -> None:
    golden = load(name)
    golden.held["t"] = torch.ones(golden.held["x0"].shape)
    scored = golden.everywhere()
    scored[:, 0] = False
    noised = golden.batch(scored, golden.held["x0"])
    torch.testing.assert_close(
        whole_logits(golden, noised, scored), golden.held["logits"], **LOGITS
    )
    torch.testing.assert_close(
        token_nll(golden.model, noised).view(scored.shape[0], -1),
        golden.held["token_nll"],
        **LOSSES,
    )


@files("sedd")
@torch.no_grad()
def test_golden_sedd(name: str) -> None:
    golden = load(name)
    held, spec = golden.held, golden.model.spec
    masked = held["xt"] == spec.mask_id
    scores = whole_logits(golden, golden.batch(golden.everywhere()), golden.everywhere())
    torch.testing.assert_close(scores, held["log_score"], **LOGITS)
    torch.testing.assert_close(total_noise(held["t"][:, :1]), held["sigma"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        objective(golden.model, golden.batch(masked)), held["token_loss"], **LOSSES
    )
    dsigma = total_noise(held["t"]) - total_noise(held["t"] - held["analytic_dt"])
    torch.testing.assert_close(
        analytic_probs(scores, held["xt"], dsigma, spec.mask_id), held["analytic_probs"], **LOGITS
    )


@files("schedules")
def test_golden_schedules(name: str) -> None:
    held = load_file(FOLDER / f"{name}.safetensors")
    ours = {"loglinear": "linear", "log": "logarithmic"}
    t, eps = held["t"].double(), 1e-3
    for theirs in sorted({key.split(".")[0] for key in held if "." in key}):
        schedule = SCHEDULES[ours.get(theirs, theirs)]
        p, slope = schedule.mask_prob(t), schedule.slope(t)
        # the reference scales cosine by 1 - eps and adds eps to the weight's denominator
        if theirs == "cosine":
            p, slope = 1 - (1 - eps) * (1 - p), (1 - eps) * slope
            weight = slope / (p + eps)
        elif theirs in ("square", "square_root"):  # and floors these two
            p = p.clamp(min=eps)
            weight = slope / p
        else:
            weight = slope / p
        torch.testing.assert_close(p.float(), held[f"{theirs}.move_chance"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            -weight.float(), held[f"{theirs}.loss_scale"], atol=1e-6, rtol=1e-4
        )


@files("nucleus")
def test_golden_nucleus(name: str) -> None:
    held = load_file(FOLDER / f"{name}.safetensors")
    for key in (k for k in held if k.startswith("nucleus_")):
        flat = held["p"].flatten(0, -2)
        kept = nucleus(flat.log(), float(key.split("_")[1]), reference=True).softmax(-1)
        torch.testing.assert_close(
            kept.view_as(held[key]).double(), held[key], atol=1e-9, rtol=1e-6
        )


def test_golden_clip_search() -> None:
    search = META["clip_search"]
    ours = candidate_intervals(block_size=4, widths=search["widths"], step=search["delta"])
    torch.testing.assert_close(
        torch.tensor(ours),
        torch.tensor(search["intervals"], dtype=torch.float32),
        atol=1e-7,
        rtol=0,
    )


def test_golden_every_file_has_a_test_and_every_kind_a_file() -> None:
    """Else a new file would go unread, or a lost one unnoticed."""
    assert {stem.split("_")[0] for stem in stems()} == KINDS
    assert {stem for stem in META if stem.split("_")[0] in KINDS} <= set(stems())
