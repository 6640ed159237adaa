"""The routed experts of one layer of a state dict, in one form for every kind of layer: what surgery on weights and inspection work on.

An expert is the state of a dense feed-forward: ``gate_proj.weight`` [X, D] where the kind is gated, ``up_proj.weight`` [X, D],
``down_proj.weight`` [D, F], and their biases. A router's tensors have one row, or one number, for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.core.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import DeepSpeedMoE, DroplessMoE, RoutedMoE

Expert = dict[str, Tensor]
# The name of an MoE layer's feed-forward below its block.
FEED_FORWARD = "feed_forward"
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


def routed_moe(model: ModelConfig) -> RoutedMoE:
    """The section of a model whose experts are feed-forwards chosen by a router.

    Raises:
        ConfigError: for a dense model, and for one whose experts are rows of tables (PEER).
    """
    if not isinstance(model.moe, RoutedMoE) or not model.routed_layers:
        what = (
            "the model has no layer with experts"
            if not model.routed_layers
            else "its experts are rows of tables, not feed-forwards"
        )
        raise ConfigError(f"{what}: give one with model.moe.kind dropless or deepspeed")
    return model.moe


def moe_prefixes(model: ModelConfig) -> list[str]:
    """The feed-forwards that are mixtures of experts, such as ``layers.3.feed_forward``, in the order of :attr:`ModelConfig.routed_layers`."""
    return [_prefix(model, layer) for layer in model.routed_layers]


def dense_prefixes(model: ModelConfig) -> list[str]:
    """The feed-forwards that are none; the block of multi-token prediction is of the last layer's kind."""
    layers = range(model.num_hidden_layers + (model.multi_token_prediction is not None))
    return [_prefix(model, layer) for layer in layers if layer not in model.routed_layers]


def _prefix(model: ModelConfig, layer: int) -> str:
    return (
        f"layers.{layer}.{FEED_FORWARD}"
        if layer < model.num_hidden_layers
        else f"multi_token.block.{FEED_FORWARD}"
    )


def feed_forward_names(model: ModelConfig) -> list[str]:
    """The parameters of one dense feed-forward, or of one expert, without prefix."""
    matrices = [GATE, UP, DOWN] if model.feed_forward.implementing_class().gated else [UP, DOWN]
    return [
        f"{matrix}.{part}"
        for matrix in matrices
        for part in (("weight", "bias") if model.feed_forward.bias else ("weight",))
    ]


def router_names(prefix: str, moe: RoutedMoE) -> list[str]:
    """The tensors of a layer's router whose first dimension counts experts."""
    router = f"{prefix}.{_router(moe)}"
    names = [f"{router}.weight" if router.endswith(".wg") else f"{router}.gate.weight"]
    if router.endswith(".wg"):
        return names
    names += [f"{router}.gate.bias"] if moe.router.bias else []
    names += [f"{router}.noise.weight"] if moe.router.learned_noise else []
    return names + ([f"{router}.balance_bias"] if moe.bias_balancing is not None else [])


def _router(moe: RoutedMoE) -> str:
    if isinstance(moe, DeepSpeedMoE):
        return "deepspeed_moe.gate.router" if moe.gate == "router" else "deepspeed_moe.gate.wg"
    return "router"


def expert_names(prefix: str, model: ModelConfig) -> list[str]:
    """The tensors of a layer that hold its routed experts, whole or stacked."""
    moe = routed_moe(model)
    if isinstance(moe, DroplessMoE):
        return [f"{prefix}.experts.w{n}" for n in (1, 2, 3)] + (
            [f"{prefix}.b{n}" for n in (1, 2, 3)] if model.feed_forward.bias else []
        )
    return [
        f"{_native(prefix, expert)}.{name}"
        for expert in range(moe.num_experts)
        for name in feed_forward_names(model)
    ]


def _native(prefix: str, expert: int) -> str:
    return f"{prefix}.deepspeed_moe.experts.deepspeed_experts.{expert}"


def read_expert(
    tensors: Mapping[str, Tensor], prefix: str, model: ModelConfig, expert: int
) -> Expert:
    """One expert of a layer, by its global number; its tensors may be views of ``tensors``."""
    if isinstance(model.moe, DeepSpeedMoE):
        return {
            name: tensors[f"{_native(prefix, expert)}.{name}"] for name in feed_forward_names(model)
        }
    gated = model.feed_forward.implementing_class().gated
    found: Expert = {}
    for part, stem in (("weight", f"{prefix}.experts.w"), ("bias", f"{prefix}.b")):
        if part == "bias" and not model.feed_forward.bias:
            continue
        first, second, third = (tensors[f"{stem}{number}"][expert] for number in (1, 2, 3))
        # Kinds with one matrix before the activation have its two halves in w1 and w3.
        found |= (
            {f"{GATE}.{part}": first, f"{UP}.{part}": third}
            if gated
            else {f"{UP}.{part}": torch.cat((first, third))}
        )
        found[f"{DOWN}.{part}"] = second
    return found


def read_experts(tensors: Mapping[str, Tensor], prefix: str, model: ModelConfig) -> list[Expert]:
    """All experts of a layer; each tensor is read once."""
    held = {name: tensors[name] for name in expert_names(prefix, model)}
    return [
        read_expert(held, prefix, model, expert) for expert in range(routed_moe(model).num_experts)
    ]


def write_experts(experts: Sequence[Expert], prefix: str, model: ModelConfig) -> dict[str, Tensor]:
    """The way back: the layer's tensors under their names, as copies.

    Raises:
        ConfigError: where a kind of layer cannot hold experts of this width.
    """
    names = feed_forward_names(model)
    if isinstance(model.moe, DeepSpeedMoE):
        return {
            f"{_native(prefix, number)}.{name}": expert[name].clone()
            for number, expert in enumerate(experts)
            for name in names
        }
    routed_moe(model)
    gated = model.feed_forward.implementing_class().gated
    found: dict[str, Tensor] = {}
    for part, stem in (("weight", f"{prefix}.experts.w"), ("bias", f"{prefix}.b")):
        if part == "bias" and not model.feed_forward.bias:
            continue
        up = torch.stack([expert[f"{UP}.{part}"] for expert in experts])
        if not gated and up.shape[1] % 2:
            raise ConfigError(
                f"dropless experts without a gate keep their matrix in two halves, and {up.shape[1]} is odd: choose an even width"
            )
        first, third = (
            (torch.stack([expert[f"{GATE}.{part}"] for expert in experts]), up)
            if gated
            else up.chunk(2, dim=1)
        )
        found |= {f"{stem}1": first.contiguous(), f"{stem}3": third.contiguous()}
        found[f"{stem}2"] = torch.stack([expert[f"{DOWN}.{part}"] for expert in experts])
    return found


def cosines(rows: Sequence[Tensor]) -> Tensor:
    """Cosines between tensors of one shape, [E, E] fp32; 0 for one that is zero."""
    flat = torch.stack([row.flatten() for row in rows])
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return flat @ flat.T


def weight_similarity(experts: Sequence[Expert]) -> Tensor:
    """Cosines between all weights of the experts, [E, E]."""
    return cosines(
        [torch.cat([tensor.flatten() for tensor in expert.values()]) for expert in experts]
    )
