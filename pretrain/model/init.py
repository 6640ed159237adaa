"""Initialisation: each parameter from a random stream of its own, named by the parameter (and by the global expert).

So a model does not depend on rank, world size, ep_size, MoE kind or the order of construction. Matrices and embeddings are normal with
``initializer_range``; projections that write into the residual stream (attention output, expert and feed-forward down) get
``initializer_range / sqrt(2 * num_hidden_layers)`` (Radford et al. 2019); norms are one.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.moe.native import DeepSpeedMoE

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "experts.w2")
_EXPERT_MATRIX = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _fill_normal(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    """Fills with N(0, std^2), drawn in fp32 on the CPU, so that every device gets the same numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


@torch.no_grad()
def initialize(model: DecoderLM, seed: int) -> None:
    """Fills every parameter of ``model`` in place."""
    config = model.config
    residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)

    def fill(parameter: torch.Tensor, name: str) -> None:
        std = residual_std if name.endswith(RESIDUAL_PROJECTIONS) else config.initializer_range
        _fill_normal(parameter, std, seed, name)

    by_module = {id(parameter): name for name, module in model.named_modules() for parameter in _expert_parameters(module, name, fill)}
    for name, parameter in model.named_parameters():
        if id(parameter) in by_module:
            continue
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            # One name for the router's matrix in both kinds of layer, so that they start equal.
            fill(parameter, name.replace("deepspeed_moe.gate.wg.weight", "router.gate.weight"))


def _expert_parameters(module: nn.Module, name: str, fill) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Fills the routed experts of one MoE layer by their global number, and returns their parameters."""
    done: list[torch.Tensor] = []
    if isinstance(module, DroplessMoE):
        first = module.ep_rank * module.num_local_experts
        for key, matrix in _EXPERT_MATRIX.items():
            stacked = getattr(module.experts, key)
            for local in range(module.num_local_experts):
                fill(stacked[local], f"{name}.expert.{first + local}.{matrix}.weight")
            done.append(stacked)
    elif isinstance(module, DeepSpeedMoE):
        first = module.ep_rank * module.num_local_experts
        for local, expert in enumerate(module.deepspeed_moe.experts.deepspeed_experts):
            for matrix, parameter in expert.named_parameters():
                fill(parameter, f"{name}.expert.{first + local}.{matrix}")
                done.append(parameter)
    return done
