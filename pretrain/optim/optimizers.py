"""Optimizers that come from libraries: torch's AdamW and SGD, bitsandbytes' 8-bit AdamW.

The learning rate is set before every step.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from pretrain.core.errors import ConfigError
from pretrain.optim.config import AdamW8bitConfig, AdamWConfig, SGDConfig

Groups = list[dict[str, Any]]


def adamw(groups: Groups, config: AdamWConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def sgd(groups: Groups, config: SGDConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)


def adamw_8bit(groups: Groups, config: AdamW8bitConfig) -> torch.optim.Optimizer:
    """Its state: ``state1 state2`` uint8 of the parameter's shape, ``absmax1 absmax2`` fp32 a block
    of 256, ``qmap1 qmap2`` the 256 levels.

    Raises:
        ConfigError: where bitsandbytes is not installed.
    """
    # It says on import that kernels for inference, which nothing here uses, are not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"optimizer.kind=adamw_8bit needs the package bitsandbytes ({error}): install it, or "
            "use optimizer.kind=adamw"
        ) from None
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps
    )
    return optimizer
