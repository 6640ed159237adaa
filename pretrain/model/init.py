"""Initialisation: each parameter from a random stream of its own, named by the parameter (and by the global expert).

So a model does not depend on rank, world size, ep_size, MoE kind or the order of construction. Matrices and embeddings are normal with
``initializer_range``; projections that write into the residual stream (attention output, expert and feed-forward down) get
``initializer_range / sqrt(2 * num_hidden_layers)`` (Radford et al. 2019); norms are one; biases, attention sinks and the matrix of router
noise are zero. Product keys get 1 / sqrt(their size), so that the scores of normed queries are about 1 (Lample et al. 2019). Last, what
:mod:`pretrain.model.mup` says of a model that is wider than its base.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import nn

from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.deepspeed_native import DeepSpeedMoE
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.moe.peer import PEER
from pretrain.model.mup import scale_by_width

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
ZERO = (".bias", ".sinks", ".noise.weight", ".b1", ".b2", ".b3")
# One name for the router's matrix in every kind of layer, so that they start equal.
ROUTER_NAMES = ("deepspeed_moe.gate.wg.weight", "deepspeed_moe.gate.router.gate.weight")

PRODUCT_KEYS = re.compile(r"\.retrieval\.keys_\d+$")
NUMBERS_A_STREAM = 1 << 20
# PEER's tables by the matrices of a feed-forward that their rows are parts of.
TABLE_SUFFIXES = {
    "up.weight": ".up_proj.weight",
    "gate.weight": ".gate_proj.weight",
    "down.weight": ".down_proj.weight",
}

# Fills a tensor with the numbers that belong to a name.
Fill = Callable[[torch.Tensor, str], None]


def _fill_normal(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    """Fills with N(0, std^2), drawn in fp32 on the CPU, so that every device gets the same numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor.copy_(
        torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    )


@torch.no_grad()
def initialize(model: DecoderLM, seed: int) -> None:
    """Fills every parameter of ``model`` in place."""
    config = model.config
    residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)

    def fill(parameter: torch.Tensor, name: str) -> None:
        if name.endswith(ZERO):
            parameter.zero_()
            return
        std = residual_std if name.endswith(RESIDUAL_PROJECTIONS) else config.initializer_range
        if PRODUCT_KEYS.search(name):
            std = parameter.shape[-1] ** -0.5
        _fill_normal(parameter, std, seed, name)

    done = {
        id(parameter)
        for name, module in model.named_modules()
        for parameter in _fill_experts(module, name, fill)
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in done:
            continue
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        else:
            for router in ROUTER_NAMES:
                name = name.replace(router, "router.gate.weight")
            fill(parameter, name)
    scale_by_width(model)


def _fill_experts(module: nn.Module, name: str, fill: Fill) -> list[torch.Tensor]:
    """Fills the routed experts of one MoE layer by their global number, and returns their parameters."""
    if isinstance(module, DroplessMoE):
        return _fill_stacked_experts(module, name, fill)
    if isinstance(module, PEER):
        return _fill_tables(module, name, fill)
    done: list[torch.Tensor] = []
    if isinstance(module, DeepSpeedMoE):
        first = module.ep_rank * module.num_local_experts
        for local, expert in enumerate(module.deepspeed_moe.experts.deepspeed_experts):
            for matrix, parameter in expert.named_parameters():
                fill(parameter, f"{name}.expert.{first + local}.{matrix}")
                done.append(parameter)
    return done


def _fill_stacked_experts(module: DroplessMoE, name: str, fill: Fill) -> list[torch.Tensor]:
    experts = module.experts
    for local in range(module.num_local_experts):
        prefix = f"{name}.expert.{experts.first + local}"
        fill(experts.w2[local], f"{prefix}.down_proj.weight")
        if experts.form.kind.gated:
            fill(experts.w1[local], f"{prefix}.gate_proj.weight")
            fill(experts.w3[local], f"{prefix}.up_proj.weight")
        else:
            up = torch.cat((experts.w1[local], experts.w3[local]))
            fill(up, f"{prefix}.up_proj.weight")
            for half, rows in zip((experts.w1, experts.w3), up.chunk(2), strict=True):
                half[local] = rows
    return [experts.w1, experts.w2, experts.w3]


def _fill_tables(module: PEER, name: str, fill: Fill) -> list[torch.Tensor]:
    """A stream of its own for each million numbers or so of a table, drawn whole where a rank holds a part of them."""
    done: list[torch.Tensor] = []
    first, last = (
        module.ep_rank * module.num_local_experts,
        (module.ep_rank + 1) * module.num_local_experts,
    )
    for table_name, table in module.experts.named_parameters():
        block = max(1, NUMBERS_A_STREAM // table[0].numel())
        for start in range(first // block * block, last, block):
            numbers = torch.empty(
                min(block, module.num_experts - start), *table.shape[1:], device=table.device
            )
            fill(
                numbers,
                f"{name}.{table_name.removesuffix('.weight')}.{start}{TABLE_SUFFIXES[table_name]}",
            )
            low, high = max(start, first), min(start + block, last)
            table[low - first : high - first] = numbers[low - start : high - start]
        done.append(table)
    return done
