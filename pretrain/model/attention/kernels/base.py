"""Ways to compute softmax(q k^T / sqrt(H)) v, by name; their sections state what they support."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from pretrain.core.errors import ConfigError
from pretrain.core.registry import kind_name
from pretrain.model.attention.kernels.config import Kernel, kernel_section
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
    check_kernel(kind, _capability())
    try:
        kernel: AttentionKernel = kind.implementing_class()
    except ImportError as error:
        raise ConfigError(
            f"model.attention.kernel={name} needs the package {kind.package or error.name}, which "
            f"cannot be imported here ({error}): install it, or use --set "
            "model.attention.kernel=sdpa"
        ) from None
    return kernel


def check_kernel(kind: type[Kernel], capability: tuple[int, int] | None) -> None:
    """Check that a kernel that is for certain GPUs only finds one, and its package.

    Args:
        capability: compute capability of the GPU; None without one.

    Raises:
        ConfigError: if it cannot run.
    """
    if kind.capability is None:
        return
    reason = None
    if kind.package is not None and find_spec(kind.package) is None:
        reason = f"the package {kind.package}, which is not installed"
    if capability != kind.capability:
        found = (
            "there is no GPU" if capability is None else "this one has {}.{}".format(*capability)
        )
        reason = "a GPU of compute capability {}.{}, but {}".format(*kind.capability, found)
    if reason is not None:
        name = kind_name(kind)
        raise ConfigError(
            f"model.attention.kernel={name} needs {reason}: use --set model.attention.kernel=sdpa"
        )


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def check_kernel_here(name: str) -> None:
    """:func:`check_kernel` for the GPU of this machine."""
    check_kernel(kernel_section(name), _capability())
