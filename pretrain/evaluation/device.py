"""Where a trained model runs."""

from __future__ import annotations

import torch

from pretrain.core.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is a GPU, else the CPU; everything else is torch's own name.

    Raises:
        ConfigError: for a device that torch does not know or that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"--device {name}: torch cannot use it on this machine; take auto, cpu or cuda"
        ) from None
    return device
