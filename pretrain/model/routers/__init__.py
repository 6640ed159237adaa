"""Routers: which experts a token goes to, one kind a file. The imports are the registry. Nothing here imports torch: recipes are made of it."""

from pretrain.model.routers.interface import ExpertGroups, Router
from pretrain.model.routers.noisy_topk import NoisyTopK
from pretrain.model.routers.sigmoid_topk import SigmoidTopK
from pretrain.model.routers.softmax_topk import SoftmaxTopK

__all__ = ["ExpertGroups", "NoisyTopK", "Router", "SigmoidTopK", "SoftmaxTopK"]
