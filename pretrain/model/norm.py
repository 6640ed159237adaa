"""Normalisation of hidden states."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional

# Elements up to which the cost of rms_norm on a CPU is the number of kernels launched, not the
# arithmetic.
FEW_ELEMENTS = 4096


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    The mean of squares is accumulated in fp32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        # The fast path of a step of generation on a CPU; everything else goes through torch's
        # kernel. On CUDA that is one kernel forward, and fused ones backward: its
        # native_functions.yaml has _fused_rms_norm and _fused_rms_norm_backward for CUDA.
        one_token = x.dim() > 2 and x.shape[1] == 1 and x.numel() <= FEW_ELEMENTS
        if (
            one_token
            and x.is_cpu
            and x.dtype == torch.float32
            and torch.is_inference_mode_enabled()
        ):
            return self._of_few(x)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def _of_few(self, x: torch.Tensor) -> torch.Tensor:
        """The same for one token per sequence, in half as many operations.

        A step of generation on a CPU consists mostly of such calls. Only in inference mode, because
        the rounding differs in the last bit.
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
    """LayerNorm (Ba et al. 2016), over the last dimension.

    (x - mean) / sqrt(variance + eps) * weight + bias
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
