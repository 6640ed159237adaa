"""The mixture-of-experts section of a recipe's model, one kind per file.

The imports register the kinds. Nothing here imports torch, because recipes consist of these
sections. A kind's file holds everything that a program asks of it before a tensor exists: names and
roles of its tensors, sizes, and what it can be combined with. The layer itself is the class that
``implementation`` names.
"""

from pretrain.model.moe.config.base import (
    EXPERT_NUMBER,
    BiasBalancing,
    MoE,
    Role,
    RoutedMoE,
)
from pretrain.model.moe.config.deepspeed_native import DeepSpeedMoEConfig
from pretrain.model.moe.config.dropless import DroplessMoEConfig
from pretrain.model.moe.config.peer import PEERConfig

__all__ = [
    "EXPERT_NUMBER",
    "BiasBalancing",
    "DeepSpeedMoEConfig",
    "DroplessMoEConfig",
    "MoE",
    "PEERConfig",
    "Role",
    "RoutedMoE",
]
