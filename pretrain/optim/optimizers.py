"""Optimizers from libraries: torch's AdamW and SGD, bitsandbytes' 8-bit AdamW.

The engine sets the learning rate before every step.
"""

from __future__ import annotations

import logging

import torch

from pretrain.core.errors import ConfigError
from pretrain.optim.config import AdamW8bitConfig, AdamWConfig, SGDConfig
from pretrain.optim.param_groups import ParamGroup


def adamw(groups: list[ParamGroup], config: AdamWConfig) -> torch.optim.Optimizer:
    """torch's AdamW, with its fused kernel on every device."""
    # weight_decay is in every group: torch's default of 0.01 never applies.
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def sgd(groups: list[ParamGroup], config: SGDConfig) -> torch.optim.Optimizer:
    """torch's SGD; weight decay comes from the groups."""
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)


def adamw_8bit(groups: list[ParamGroup], config: AdamW8bitConfig) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW.

    State: ``state1 state2`` uint8 of the parameter's shape, ``absmax1 absmax2`` fp32 per block of
    256, ``qmap1 qmap2`` the 256 levels.

    Raises:
        ConfigError: if bitsandbytes is not installed.
    """
    # On import it warns about missing inference kernels, which nothing here uses.
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
