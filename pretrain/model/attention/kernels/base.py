"""Ways to compute softmax(q k^T / sqrt(H)) v, chosen by name; what each supports stands in ``KERNEL_FEATURES`` of the recipe's rules."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

import torch

from pretrain.core.errors import ConfigError
from pretrain.model.attention.config import KernelName
from pretrain.model.attention.scores import Scores

# Queries [B, N, S, H], keys [B, M, U, H] and values [B, M, U, V] of U >= S tokens -> [B, N, S, V] in the queries' dtype.
AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores], torch.Tensor]

KERNELS: dict[KernelName, str] = {
    "reference": "pretrain.model.attention.kernels.reference:reference_attention",
    "sdpa": "pretrain.model.attention.kernels.sdpa:sdpa_attention",
    "flex": "pretrain.model.attention.kernels.flex:flex_attention",
    "flash": "pretrain.model.attention.kernels.flash:flash_attention",
}


def attention_kernel(name: KernelName, device: torch.device) -> AttentionKernel:
    """The kernel of that name; its file, and with it a package that only this kernel needs, is imported here.

    Raises:
        ConfigError: where this machine lacks what the kernel needs. A model on the meta device is only counted and lacks nothing.
    """
    try:
        kernel: AttentionKernel = resolve_name(KERNELS["sdpa" if device.type == "meta" else name])
    except ImportError as error:
        raise ConfigError(
            f"model.attention.kernel={name} needs the package {error.name}, which cannot be imported here ({error}): "
            "install it, or use --set model.attention.kernel=sdpa"
        ) from None
    return kernel
