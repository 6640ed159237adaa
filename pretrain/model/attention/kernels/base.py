"""Ways to compute softmax(q k^T / sqrt(H)) v, by name; their sections state what they support."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pretrain.core.errors import ConfigError
from pretrain.model.attention.kernels.config import kernel_section
from pretrain.model.attention.scores import Scores

# Queries [B, N, S, H], keys [B, M, U, H] and values [B, M, U, V] of U >= S tokens -> [B, N, S, V]
# in the queries' dtype.
AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores], torch.Tensor]


def attention_kernel(name: str, device: torch.device) -> AttentionKernel:
    """The kernel with this name.

    Its file, and with it a package that only this kernel needs, is imported here.

    Raises:
        ConfigError: if this machine lacks the package that the kernel needs.
    """
    # A model on the meta device is only counted, and lacks nothing.
    kind = kernel_section("sdpa" if device.type == "meta" else name)
    try:
        kernel: AttentionKernel = kind.implementing_class()
    except ImportError as error:
        raise ConfigError(
            f"model.attention.kernel={name} needs the package {kind.package or error.name}, which "
            f"cannot be imported here ({error}): install it, or use --set "
            "model.attention.kernel=sdpa"
        ) from None
    return kernel
