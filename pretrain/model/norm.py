"""Normalisation of hidden states."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional

# Up to so many numbers, what rms_norm costs on a CPU is the number of small operations that torch
# makes of it.
FEW_NUMBERS = 4096


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Sums in fp32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one_token = x.dim() > 2 and x.shape[1] == 1 and x.numel() <= FEW_NUMBERS
        if (
            one_token
            and x.is_cpu
            and x.dtype == torch.float32
            and torch.is_inference_mode_enabled()
        ):
            return self._of_few(x)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def _of_few(self, x: torch.Tensor) -> torch.Tensor:
        """The same of one token (or of one each of a few texts) in half as many operations: a step
        of generation is made of them.
        """
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (
            x
            * torch.addcmul(_number(self.eps), length, length, value=1.0 / x.shape[-1]).rsqrt_()
            * self.weight
        )


@cache
def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016): (x - mean) / sqrt(variance + eps) * weight + bias over the last
    dimension.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
