"""Each kind of norm is its paper's formula."""

from __future__ import annotations

import torch

from pretrain.model.norm import LayerNorm, RMSNorm
from tests.support.tiny_model import random_tensor


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=0.1)
    norm.weight.data = torch.arange(6.0)
    x = random_tensor(3, 6).detach()
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * torch.arange(6.0)
    torch.testing.assert_close(norm(x), expected)
    assert (norm(x + 1) - expected).abs().max() > 1e-2  # the mean is not taken off


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
