"""Initialisation: each parameter has its own random stream, seeded by its name.

An expert's stream is named by its global index. So a model does not depend on rank, world size,
ep_size, MoE kind or the order of construction. Matrices and embeddings are normal with
``initializer_range``; projections that write into the residual stream (attention output, expert and
feed-forward down) get ``initializer_range / sqrt(2 * num_hidden_layers)`` (Radford et al. 2019);
norms are one; biases, attention sinks and the tensors named by the MoE kind are zero. A parameter
that :func:`keep_initial_value` marked keeps what its module gave it. Last, the rules of
:mod:`pretrain.model.mup` scale a model that is wider than its base.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pretrain.core.seeds import derived_seed
from pretrain.model.config import ModelConfig, below_feed_forward
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.base import MoELayer
from pretrain.model.mup import scale_by_width

# Suffixes of parameter names.
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
ZERO = (".bias", ".sinks")


def _fill_normal(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    """Fill with N(0, std^2), drawn in fp32 on the CPU: every device gets the same values."""
    generator = torch.Generator().manual_seed(derived_seed(f"{seed}/{name}"))
    tensor.copy_(
        torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    )


def keep_initial_value(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter of a part that is added: what it holds now is its initial value."""
    parameter.keeps_initial_value = True  # type: ignore[attr-defined]
    return parameter


@torch.no_grad()
def initialize(model: DecoderLM, seed: int) -> None:
    """Fill every parameter of ``model`` in place."""
    config = model.config
    residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)

    def fill(parameter: torch.Tensor, name: str) -> None:
        if _starts_at_zero(name, config):
            parameter.zero_()
            return
        std = residual_std if name.endswith(RESIDUAL_PROJECTIONS) else config.initializer_range
        inner = below_feed_forward(name)
        if config.moe is not None and inner is not None:
            std = config.moe.initial_std(inner, parameter.shape[-1]) or std
            # One name for what every kind of layer has, such as a router: they then start equal.
            name = name.removesuffix(inner) + config.moe.common_name(inner)
        _fill_normal(parameter, std, seed, name)

    # Experts first: a rank holds a part of them, under local indices that say nothing.
    done = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
        for parameter in module.fill_experts(name, fill)
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in done or getattr(parameter, "keeps_initial_value", False):
            continue
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        else:
            fill(parameter, name)
    scale_by_width(model)


def _starts_at_zero(name: str, config: ModelConfig) -> bool:
    inner = below_feed_forward(name)
    in_moe = config.moe is not None and inner is not None and config.moe.starts_at_zero(inner)
    return in_moe or name.endswith(ZERO)
