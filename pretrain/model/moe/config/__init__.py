"""The mixture-of-experts section of a recipe's model, one kind a file.

The imports are the registry.

Nothing here imports torch: recipes are made of these sections. A kind's file says everything that a
program asks of it before a tensor exists: its tensors' names and roles, its sizes, and what it can
be combined with. What it computes is the class that ``implementation`` names.
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
