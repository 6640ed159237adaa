"""Routers: which experts a token goes to, one kind a file. The imports are the registry.

Nothing here imports torch: recipes are made of it.
"""

from pretrain.model.moe.routers.interface import ExpertGroups, Router
from pretrain.model.moe.routers.noisy_topk import NoisyTopK
from pretrain.model.moe.routers.sigmoid_topk import SigmoidTopK
from pretrain.model.moe.routers.softmax_topk import SoftmaxTopK

__all__ = ["ExpertGroups", "NoisyTopK", "Router", "SigmoidTopK", "SoftmaxTopK"]
