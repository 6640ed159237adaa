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
        if (
            x.is_cpu
            and x.dtype != torch.float64
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            normed: torch.Tensor = _RMSNormOnCPU.apply(x, self.weight, self.eps)
            return normed
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


class _RMSNormOnCPU(torch.autograd.Function):
    """torch's ``rms_norm`` in half the time of a forward and backward pass.

    torch has a kernel for it on GPUs. On a CPU it takes ten operators, and autograd twice as many
    for its gradient. With n = x / rms(x) and g = dy * weight: dx = (g - n * mean(g * n)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x, weight_D, eps):  # type: ignore[no-untyped-def]
        inverse_rms = _inverse_rms(x.float(), eps)
        ctx.save_for_backward(x, weight_D, inverse_rms)
        ctx.eps = eps
        return (x * inverse_rms).mul_(weight_D).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight_D, inverse_rms = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient's own graph is asked for, and has to lead to x.
            inverse_rms = _inverse_rms(x.float(), ctx.eps)
        normed = x * inverse_rms
        grad_TD = grad.float().reshape(-1, weight_D.numel())
        product_TD = grad_TD * normed.view_as(grad_TD)
        weight_gradient_D = product_TD.sum(dim=0).to(weight_D.dtype)
        mean_T = torch.mv(product_TD, weight_D.float()).div_(-weight_D.numel())
        gradient_TD = (grad_TD * weight_D).addcmul_(normed.view_as(grad_TD), mean_T[:, None])
        gradient = gradient_TD.view_as(x).mul_(inverse_rms).to(x.dtype)
        return gradient, weight_gradient_D, None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square().div_(x.shape[-1]).add_(eps).rsqrt_()


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
