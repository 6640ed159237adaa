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
from pretrain.model.moe.config.deepspeed_native import DeepSpeedMoE
from pretrain.model.moe.config.dropless import DroplessMoE
from pretrain.model.moe.config.peer import PEER

__all__ = [
    "EXPERT_NUMBER",
    "PEER",
    "BiasBalancing",
    "DeepSpeedMoE",
    "DroplessMoE",
    "MoE",
    "Role",
    "RoutedMoE",
]
