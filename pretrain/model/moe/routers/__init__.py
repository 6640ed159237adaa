"""Routers: which experts a token goes to, one kind per file. The imports register the kinds.

Nothing here imports torch, because recipes consist of these sections.
"""

from pretrain.model.moe.routers.interface import ExpertGroups, Router
from pretrain.model.moe.routers.noisy_topk import NoisyTopK
from pretrain.model.moe.routers.sigmoid_topk import SigmoidTopK
from pretrain.model.moe.routers.softmax_topk import SoftmaxTopK

__all__ = ["ExpertGroups", "NoisyTopK", "Router", "SigmoidTopK", "SoftmaxTopK"]
