"""The lean parts of a layer compute what the plain ones do, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.models.lean import Norm, gelu_linear


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_gelu_linear_has_the_plain_forms_values_and_gradients() -> None:
    u, weight, bias = some(2, 3, 8, seed=1), some(5, 8, seed=2), some(5, seed=3)
    torch.testing.assert_close(gelu_linear(u, weight, bias), F.linear(F.gelu(u, approximate="tanh"), weight, bias), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(gelu_linear, (u, weight, bias))


def test_autocast_casts_as_it_does_for_the_plain_form() -> None:
    u, weight, bias = (x.float().detach().requires_grad_() for x in (some(4, 8, seed=1), some(5, 8, seed=2), some(5, seed=3)))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gelu_linear(u, weight, bias)
        plain = F.linear(F.gelu(u.bfloat16(), approximate="tanh"), weight, bias)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain)
    ours.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in (u, weight, bias))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8), (2, 3, 8)])
def test_modulation_goes_into_the_norm_where_it_is_the_same_for_all_cells(shape: tuple[int, ...]) -> None:
    norm, x = Norm(8).double(), some(2, 3, 8, seed=1)
    norm.weight.data = some(8, seed=2).data
    shift, scale = some(*shape, seed=3), some(*shape, seed=4)
    plain = F.layer_norm(x, (8,), norm.weight) * (1 + scale) + shift
    torch.testing.assert_close(norm(x, shift, scale), plain, rtol=0, atol=1e-13)
    weights = some(2, 3, 8, seed=5).detach()
    given = (x, norm.weight, shift, scale)
    for ours, theirs in zip(
        torch.autograd.grad((norm(x, shift, scale) * weights).sum(), given),
        torch.autograd.grad((plain * weights).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
