"""Muon: an orthogonal step for the layers' matrices, AdamW's own step for the rest, and a state
that goes out and in."""

import math

import pytest
import torch

from bdlm.models.dit import DiT, DiTConfig
from bdlm.training.muon import Muon, is_layer_matrix, make_muon, orthogonal
from bdlm.training.optim import make_optimizer
from bdlm.training.sections import OptimSection


def tiny() -> DiT:
    torch.manual_seed(0)
    model = DiT(
        DiTConfig(
            11, 10, hidden_dim=16, n_blocks=2, n_heads=2, cond_dim=8, model_length=8, block_size=2
        )
    )
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw) * 0.1
        p.grad = torch.randn(p.shape, generator=draw)
    return model


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (3, 16, 16)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonal(matrix)
    values = torch.linalg.svdvals(out)
    # five steps send singular values that are not tiny (against the norm) into the published band
    known = torch.linalg.svdvals(matrix)
    assert values[known > 0.05 * known.amax()].min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(out.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_scale_of_the_gradient_does_not_matter() -> None:
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonal(matrix), orthogonal(1e3 * matrix), rtol=1e-4, atol=1e-5)


def test_the_step_has_the_size_it_says() -> None:
    """0.2 sqrt(max(rows, columns)) times an orthogonal matrix: a root mean square of about 0.2, as
    AdamW's steps have."""
    p = torch.nn.Parameter(torch.zeros(64, 16))
    p.grad = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    Muon(
        [{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [p], "muon": True}],
        1.0,
        (0.9, 0.99),
        1e-8,
    ).step()
    assert p.detach().square().mean().sqrt() == pytest.approx(
        0.2 * math.sqrt(64) * math.sqrt(16 / (64 * 16)), rel=0.25
    )


def test_queries_keys_and_values_are_three_matrices() -> None:
    p = torch.nn.Parameter(torch.zeros(24, 8))
    p.grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(4))
    Muon(
        [{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [p], "muon": True}],
        1.0,
        (0.9, 0.99),
        1e-8,
    ).step()
    for part in p.detach().view(3, 8, 8):
        values = torch.linalg.svdvals(part) / (0.2 * math.sqrt(8))
        assert values.max() < 1.3
        assert values.mean() > 0.7


def test_all_but_the_layers_matrices_get_adamw() -> None:
    ours, theirs = tiny(), tiny()
    config = OptimSection(name="muon", lr=1e-2, weight_decay=0.1)
    muon, adamw = (
        make_optimizer(ours, config),
        make_optimizer(theirs, OptimSection(lr=1e-2, weight_decay=0.1)),
    )
    # as accelerate does when it wraps: the groups are new ones afterwards
    muon.load_state_dict(muon.state_dict())
    for optimiser in (muon, adamw):
        # a schedule writes into the groups
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = 3e-3
        optimiser.step()
    taken = [name for name, p in ours.named_parameters() if is_layer_matrix(name, p)]
    assert len(taken) == 2 * 4
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) != (name in taken), name


def test_state_goes_out_and_in() -> None:
    """The trainer moves state tensor by tensor by parameter: a copy steps on bit for bit."""
    one, two = tiny(), tiny()
    first, second = (make_muon(m, 1e-2, (0.9, 0.99), 1e-8, 0.1) for m in (one, two))
    first.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        q.data = p.data.clone()
        for key, value in first.state[p].items():
            second.state[q][key] = value.clone()
    for optimiser in (first, second):
        optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
