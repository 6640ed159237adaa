"""The routed experts of one layer of a state dict, in one form for every kind of layer.

Merging, upcycling and inspection work on this form. An expert is the state of a dense feed-forward:
``gate_proj.weight`` [X, D] if the kind is gated, ``up_proj.weight`` [X, D], ``down_proj.weight``
[D, F], and their biases. A router's tensors have one row, or one element, for each expert. The
layer's section says which tensors of a layer these are (:meth:`RoutedMoE.expert_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.core.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import EXPERT_NUMBER, RoutedMoE

Expert = dict[str, Tensor]
# The name of an MoE layer's feed-forward below its block.
FEED_FORWARD = "feed_forward"
GATE = "gate_proj"
UP = "up_proj"
DOWN = "down_proj"


def routed_moe(model: ModelConfig) -> RoutedMoE:
    """Return the section of a model whose experts are feed-forwards chosen by a router.

    Raises:
        ConfigError: for a dense model, and for one whose experts are rows of tables (PEER).
    """
    if model.routing is None:
        what = (
            "its experts are rows of tables, not feed-forwards"
            if model.routed_layers
            else "the model has no layer with experts"
        )
        raise ConfigError(f"{what}: give one with model.moe.kind dropless or deepspeed")
    return model.routing


def moe_prefixes(model: ModelConfig) -> list[str]:
    """Return the feed-forwards that are mixtures of experts, such as ``layers.3.feed_forward``.

    In the order of :attr:`ModelConfig.routed_layers`.
    """
    return [_prefix(model, layer) for layer in model.routed_layers]


def _prefix(model: ModelConfig, layer: int) -> str:
    return (
        f"layers.{layer}.{FEED_FORWARD}"
        if layer < model.num_hidden_layers
        else f"multi_token.block.{FEED_FORWARD}"
    )


def router_names(prefix: str, moe: RoutedMoE) -> list[str]:
    """Return the router's tensors whose first dimension counts experts, its matrix first."""
    return [f"{prefix}.{name}" for name in moe.router_tensors()]


def expert_names(prefix: str, model: ModelConfig) -> list[str]:
    """Return the tensors of a layer that hold its routed experts, whole or stacked."""
    moe = routed_moe(model)
    templates = moe.expert_tensors(model.feed_forward.parameter_names).values()
    return [
        f"{prefix}.{name.replace(EXPERT_NUMBER, str(expert))}"
        for expert in range(moe.num_experts)
        for names in templates
        for name in names
        if EXPERT_NUMBER in name or expert == 0
    ]


def read_expert(
    tensors: Mapping[str, Tensor], prefix: str, model: ModelConfig, expert: int
) -> Expert:
    """Return one expert of a layer by its global number; its tensors may be views."""
    found: Expert = {}
    places = routed_moe(model).expert_tensors(model.feed_forward.parameter_names)
    for parameter, names in places.items():
        # Native experts are numbered in the name; stacked ones are an index of the first dimension.
        parts = [
            tensors[f"{prefix}.{name.replace(EXPERT_NUMBER, str(expert))}"]
            if EXPERT_NUMBER in name
            else tensors[f"{prefix}.{name}"][expert]
            for name in names
        ]
        found[parameter] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found


def read_experts(tensors: Mapping[str, Tensor], prefix: str, model: ModelConfig) -> list[Expert]:
    """Return all experts of a layer; each tensor is read once."""
    # ``tensors`` may read a file at every access.
    held = {name: tensors[name] for name in expert_names(prefix, model)}
    return [
        read_expert(held, prefix, model, expert) for expert in range(routed_moe(model).num_experts)
    ]


def write_experts(experts: Sequence[Expert], prefix: str, model: ModelConfig) -> dict[str, Tensor]:
    """Return the layer's tensors under their names, as copies: the inverse of reading.

    Raises:
        ConfigError: if the kind of layer cannot hold experts of this width.
    """
    found: dict[str, Tensor] = {}
    places = routed_moe(model).expert_tensors(model.feed_forward.parameter_names)
    for parameter, names in places.items():
        for number, expert in enumerate(experts):
            if len(names) > 1 and expert[parameter].shape[0] % len(names):
                raise ConfigError(
                    "dropless experts without a gate keep their matrix in two halves, and "
                    f"{expert[parameter].shape[0]} is odd: choose an even width"
                )
            parts = expert[parameter].chunk(len(names))
            for name, part in zip(names, parts, strict=True):
                if EXPERT_NUMBER in name:
                    found[f"{prefix}.{name.replace(EXPERT_NUMBER, str(number))}"] = part.clone()
        for index, name in enumerate(names):
            if EXPERT_NUMBER not in name:
                found[f"{prefix}.{name}"] = torch.stack(
                    [expert[parameter].chunk(len(names))[index] for expert in experts]
                )
    return found


def cosines(rows: Sequence[Tensor]) -> Tensor:
    """Return cosines between tensors of one shape, [E, E] fp32; 0 for one that is zero."""
    flat = torch.stack([row.flatten() for row in rows])
    # clamp_min: the cosine of a zero tensor is 0, not NaN.
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return flat @ flat.T


def weight_similarity(experts: Sequence[Expert]) -> Tensor:
    """Return cosines between all weights of the experts, [E, E]."""
    return cosines(
        [torch.cat([tensor.flatten() for tensor in expert.values()]) for expert in experts]
    )
