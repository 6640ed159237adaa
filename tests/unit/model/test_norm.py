"""Each kind of norm is its paper's formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pretrain.model.norm import LayerNorm, RMSNorm
from tests.support.tiny_model import random_tensor


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=0.1)
    norm.weight.data = torch.arange(6.0)
    x = random_tensor(3, 6).detach()
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * torch.arange(6.0)
    torch.testing.assert_close(norm(x), expected)
    assert (norm(x + 1) - expected).abs().max() > 1e-2  # the mean is not taken off


@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 3, 5, 16), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_and_its_gradients_on_a_cpu_are_those_of_torch_in_fp64(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    norm = RMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data = (1 + random_tensor(shape[-1], seed=2).detach() / 4).to(dtype)
    x = random_tensor(*shape, seed=3).detach().to(dtype).requires_grad_()
    grad = random_tensor(*shape, seed=4).detach().to(dtype)
    norm(x).backward(grad)
    exact_x, exact_weight = (value.detach().double().requires_grad_() for value in (x, norm.weight))
    exact = functional.rms_norm(exact_x, exact_weight.shape, exact_weight, 1e-5)
    exact.backward(grad.double())
    rounding = torch.finfo(dtype).eps
    pairs = [(norm(x), exact), (x.grad, exact_x.grad), (norm.weight.grad, exact_weight.grad)]
    for found, expected in pairs:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=8 * rounding, rtol=2 * rounding)


def test_a_second_derivative_of_the_rms_norm_is_that_of_torch() -> None:
    norm = RMSNorm(8, eps=1e-5)
    norm.weight.data = 1 + random_tensor(8, seed=2).detach() / 4
    x = random_tensor(3, 8, seed=3).detach().requires_grad_()
    grad = random_tensor(3, 8, seed=4).detach().requires_grad_()
    seconds = []
    for y in (norm(x), functional.rms_norm(x, (8,), norm.weight, 1e-5)):
        gradients = torch.autograd.grad(y, (x, norm.weight), grad, create_graph=True)
        length = sum(gradient.square().sum() for gradient in gradients)
        seconds.append(torch.autograd.grad(length, (x, norm.weight, grad)))
    for found, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_layer_norm_is_its_formula() -> None:
    norm = LayerNorm(6, eps=0.1)
    norm.weight.data, norm.bias.data = torch.arange(6.0), torch.linspace(-1, 1, 6)
    x = random_tensor(3, 6).detach()
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * torch.arange(
        6.0
    ) + torch.linspace(-1, 1, 6)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x + 1), expected, atol=1e-5, rtol=1e-5)  # the mean is taken off
