"""The device that a trained model runs on."""

from __future__ import annotations

import torch

from pretrain.core.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device by its name in torch; ``auto`` is CUDA if there is a GPU, else the CPU.

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
