"""The fused parts of a layer compute what the plain ones do, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.models import fused_mlp
from bdlm.models.fused_mlp import Norm, mlp


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


def plain(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def mlp_arguments(width: int = 8) -> tuple[Tensor, ...]:
    return (
        some(2, 3, 4, seed=1),
        some(width, 4, seed=2),
        some(width, seed=3),
        some(5, width, seed=4),
        some(5, seed=5),
    )


@pytest.mark.parametrize(
    "piece", [1, 7, fused_mlp.PIECE], ids=["one by one", "a last piece cut short", "whole"]
)
def test_mlp_has_the_plain_forms_values_and_gradients(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_mlp, "PIECE", piece)
    given = mlp_arguments()
    torch.testing.assert_close(mlp(*given), plain(*given), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(mlp, given)
    with torch.no_grad():
        torch.testing.assert_close(mlp(*given), plain(*given), rtol=0, atol=0)


def test_mlp_holds_far_out() -> None:
    """Far out GELU is 0 or the identity, with slope 0 or 1: the large numbers on the way must
    cancel."""
    x = torch.tensor([[-1e12], [-1e4], [-20.0], [20.0], [1e4]], requires_grad=True)
    one, zero = torch.ones(1, 1), torch.zeros(1)
    y = mlp(x, one, zero, one, zero)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x.detach().clamp(min=0))
    torch.testing.assert_close(slope, (x.detach() > 0).float())


def test_autocast_casts_as_it_does_for_the_plain_form() -> None:
    given = [x.float().detach().requires_grad_() for x in mlp_arguments()]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = mlp(*given), plain(*given)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in given)


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8), (2, 3, 8)])
def test_modulation_goes_into_the_norm_where_it_is_the_same_for_all_cells(
    shape: tuple[int, ...],
) -> None:
    norm, x = Norm(8).double(), some(2, 3, 8, seed=1)
    norm.weight.data = some(8, seed=2).data
    shift, scale = some(*shape, seed=3), some(*shape, seed=4)
    separate = F.layer_norm(x, (8,), norm.weight) * (1 + scale) + shift
    torch.testing.assert_close(norm(x, shift, scale), separate, rtol=0, atol=1e-13)
    weights = some(2, 3, 8, seed=5).detach()
    given = (x, norm.weight, shift, scale)
    for ours, theirs in zip(
        torch.autograd.grad((norm(x, shift, scale) * weights).sum(), given),
        torch.autograd.grad((separate * weights).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
