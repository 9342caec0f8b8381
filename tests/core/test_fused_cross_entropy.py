"""The fused cross-entropies equal the plain one, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core import fused_cross_entropy
from bdlm.core.blockmap import Contiguous, make_layout, maskable
from bdlm.core.corruption import corrupt
from bdlm.core.fused_cross_entropy import linear_cross_entropy, weighted_linear_cross_entropy
from bdlm.core.objectives import objective, total_nats
from bdlm.core.schedules import Linear
from bdlm.models.dit import DiT, DiTConfig


def problem(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {
        "hidden": torch.randn(rows, 6, generator=g, dtype=dtype),
        "weight": torch.randn(vocab, 6, generator=g, dtype=dtype),
        "bias": torch.randn(vocab, generator=g, dtype=dtype),
    }
    for tensor in made.values():
        tensor.requires_grad_()
    return {
        **made,
        "target": torch.randint(0, vocab - 1, (rows,), generator=g),
        "factor": torch.rand(rows, generator=g, dtype=dtype) * 3,
    }


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, forbid: int | None
) -> Tensor:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if forbid is not None:
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool)
        blocked[forbid] = True
        logits = logits.masked_fill(blocked, float("-inf"))
    return F.cross_entropy(logits, target, reduction="none")


def gradients(loss: Tensor, p: dict[str, Tensor], with_bias: bool) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, [p["hidden"], p["weight"], *([p["bias"]] if with_bias else [])])
    )


CASES = list(itertools.product((1, 7, 40), (None, 11), (True, False), (None, 1, 3, 1000)))


@pytest.mark.parametrize("rows,forbid,with_bias,chunk", CASES)
@pytest.mark.parametrize("keep", (0, 1 << 22), ids=("recomputed", "kept"))
def test_losses_and_gradients_equal_plain(rows, forbid, with_bias, chunk, keep, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "KEEP", keep)
    p = problem(rows, 12, torch.float32)
    bias = p["bias"] if with_bias else None
    expected = plain(p["hidden"], p["weight"], bias, p["target"], forbid)
    nll = linear_cross_entropy(p["hidden"], p["weight"], bias, p["target"], forbid, chunk)
    torch.testing.assert_close(nll, expected, atol=1e-6, rtol=1e-6)
    want = gradients((expected * p["factor"]).sum(), p, with_bias)
    torch.testing.assert_close(
        gradients((nll * p["factor"]).sum(), p, with_bias), want, atol=4e-6, rtol=1e-5
    )


@pytest.mark.parametrize("rows,forbid,with_bias,chunk", CASES)
def test_weighted_sum_and_gradients_equal_plain(rows, forbid, with_bias, chunk):
    p = problem(rows, 12, torch.float32, seed=1)
    bias = p["bias"] if with_bias else None
    expected = plain(p["hidden"], p["weight"], bias, p["target"], forbid)
    total, nll = weighted_linear_cross_entropy(
        p["hidden"], p["weight"], bias, p["target"], p["factor"], forbid, chunk
    )
    assert not nll.requires_grad
    torch.testing.assert_close(nll, expected.detach(), atol=1e-6, rtol=1e-6)
    loss = (expected * p["factor"]).sum()
    torch.testing.assert_close(total, loss, atol=1e-5, rtol=1e-6)
    want = gradients(loss * 0.7, p, with_bias)
    torch.testing.assert_close(gradients(total * 0.7, p, with_bias), want, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("forbid", (None, 4))
@pytest.mark.parametrize("keep", (0, 1 << 22), ids=("recomputed", "kept"))
def test_gradcheck(forbid, keep, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "KEEP", keep)
    p = problem(5, 5, torch.float64)
    inputs = (p["hidden"], p["weight"], p["bias"])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, b, p["target"], forbid, 2), inputs
    )


def test_weighted_sum_is_exact_in_float64_and_differentiated_once():
    p = problem(5, 7, torch.float64)
    total, _ = weighted_linear_cross_entropy(
        p["hidden"], p["weight"], p["bias"], p["target"], p["factor"], 6, 2
    )
    loss = (plain(p["hidden"], p["weight"], p["bias"], p["target"], 6) * p["factor"]).sum()
    got = torch.autograd.grad(total, [p["hidden"], p["weight"], p["bias"]], retain_graph=True)
    torch.testing.assert_close(list(got), gradients(loss, p, True), atol=1e-13, rtol=1e-12)
    with pytest.raises(RuntimeError, match="differentiated once"):
        total.backward()


def test_no_rows():
    p = problem(0, 9, torch.float32)
    nll = linear_cross_entropy(p["hidden"], p["weight"], p["bias"], p["target"])
    total, each = weighted_linear_cross_entropy(
        p["hidden"], p["weight"], p["bias"], p["target"], p["factor"]
    )
    assert nll.shape == each.shape == (0,)
    assert total.item() == 0.0
    for loss in (nll.sum(), total):
        assert all(not g.any() for g in gradients(loss, p, True))


def test_frozen_head_gets_no_gradient():
    p = problem(8, 9, torch.float32)
    total, _ = weighted_linear_cross_entropy(
        p["hidden"], p["weight"].detach(), None, p["target"], p["factor"]
    )
    (got,) = torch.autograd.grad(total, p["hidden"])
    (want,) = torch.autograd.grad(
        (plain(p["hidden"], p["weight"], None, p["target"], None) * p["factor"]).sum(), p["hidden"]
    )
    torch.testing.assert_close(got, want, atol=4e-6, rtol=1e-5)
    with torch.no_grad():
        still, _ = weighted_linear_cross_entropy(
            p["hidden"], p["weight"], None, p["target"], p["factor"]
        )
    torch.testing.assert_close(still, total.detach())


def test_a_forbidden_target_is_impossible():
    p = problem(3, 9, torch.float32)
    target = torch.tensor([1, 5, 2])
    assert linear_cross_entropy(p["hidden"], p["weight"], None, target, forbid=5)[
        1
    ].item() == float("inf")


def test_autocast_products_round_but_losses_stay_float32():
    p = problem(64, 50, torch.float32)
    exact = plain(p["hidden"], p["weight"], p["bias"], p["target"], 49)
    want = gradients((exact * p["factor"]).sum(), p, True)
    with torch.autocast("cpu", torch.bfloat16):
        total, nll = weighted_linear_cross_entropy(
            p["hidden"], p["weight"], p["bias"], p["target"], p["factor"], 49
        )
        each = linear_cross_entropy(p["hidden"], p["weight"], p["bias"], p["target"], 49)
    assert nll.dtype == each.dtype == torch.float32
    # bfloat16 keeps 8 bits: a relative 2^-8 of logits up to about 10
    torch.testing.assert_close(nll, exact.detach(), atol=0.1, rtol=0.02)
    torch.testing.assert_close(each.detach(), exact.detach(), atol=0.1, rtol=0.02)
    for got in (gradients(total, p, True), gradients((each * p["factor"]).sum(), p, True)):
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("algo", ("bd3lm", "mdlm", "ar", "sedd"))
def test_total_nats_is_the_sum_of_the_objective(algo):
    torch.manual_seed(0)
    model = DiT(
        DiTConfig(
            vocab_size=13,
            mask_id=12,
            hidden_dim=16,
            n_blocks=2,
            n_heads=2,
            cond_dim=8,
            model_length=8,
            block_size=4,
            algo=algo,
        )
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    layout = make_layout(Contiguous(model.spec.block_size), 8, context=model.spec.context)
    cells, distribution = maskable(layout).expand(3, -1), "all" if algo == "ar" else "time"
    clean = torch.randint(12, (3, 8))
    noised = corrupt(
        clean,
        layout,
        cells,
        Linear(),
        seed=0,
        step=0,
        row=torch.arange(3),
        distribution=distribution,
        mask_id=12,
    )
    want = objective(model, noised).sum() / noised.scored.sum()
    got = total_nats(model, noised, noised.scored.sum())
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got, parameters, allow_unused=True),
        torch.autograd.grad(want, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
