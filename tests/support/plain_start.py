"""The plain way to start: the whole model of a rank in fp32 on the host, filled in place, which
DeepSpeed then casts and partitions. The oracle of starts that never hold a whole model.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pretrain.config.recipe import Recipe
from pretrain.core.seeds import derived_seed
from pretrain.engine.build import ExpertShard, with_kernel
from pretrain.engine.float8 import convert_linears
from pretrain.model.config import ModelConfig, below_feed_forward
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.deepspeed_native import DeepSpeedMoE
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.moe.peer import PEER, TABLE_SUFFIXES, VALUES_A_STREAM
from pretrain.model.mup import scale_of, width_scales


def plain_model(
    recipe: Recipe, precision: str, shard: ExpertShard, device: torch.device, *_: Any
) -> DecoderLM:
    """Takes what :func:`pretrain.engine.build.build_model` takes, for random weights."""
    config = with_kernel(recipe, device.type)
    model = DecoderLM(config, shard.parts, shard.part, recipe.train.activation_checkpointing)
    plain_fill(model, recipe.seed)
    if precision == "fp8":
        convert_linears(model, device)
    return model


@torch.no_grad()
def plain_fill(model: DecoderLM, seed: int) -> None:
    """Fills every parameter in place, experts first: local indices say nothing."""
    config, done = model.config, set()
    for name, layer in model.named_modules():
        if isinstance(layer, DroplessMoE):
            done |= _fill_dropless(layer, name, config, seed)
        elif isinstance(layer, DeepSpeedMoE):
            first = layer.ep_rank * layer.num_local_experts
            for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                for matrix, parameter in expert.named_parameters():
                    stream = f"{name}.expert.{first + local}.{matrix}"
                    parameter.copy_(_values(parameter.shape, stream, config, seed))
                    done.add(id(parameter))
        elif isinstance(layer, PEER):
            done |= _fill_peer(layer, name, config, seed)
    for name, parameter in model.named_parameters():
        if id(parameter) not in done:
            is_norm = name.endswith("norm.weight")
            values = 1.0 if is_norm else _values(parameter.shape, name, config, seed)
            parameter.copy_(torch.as_tensor(values))
    scales = width_scales(config)
    for name, parameter in model.named_parameters():
        scale = scale_of(name, config, scales)
        parameter.mul_(scale.size)
        if scale.learning_rate != 1.0:
            parameter.learning_rate_scale = scale.learning_rate


def _fill_dropless(layer: DroplessMoE, name: str, config: ModelConfig, seed: int) -> set[int]:
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    for local in range(layer.num_local_experts):
        stem = f"{name}.expert.{layer.experts.first + local}"
        w2[local] = _values(w2[local].shape, f"{stem}.down_proj.weight", config, seed)
        if layer.experts.form.config.gated:
            w1[local] = _values(w1[local].shape, f"{stem}.gate_proj.weight", config, seed)
            w3[local] = _values(w3[local].shape, f"{stem}.up_proj.weight", config, seed)
        else:
            rows, columns = w1[local].shape
            shape = torch.Size((2 * rows, columns))
            w1[local], w3[local] = _values(shape, f"{stem}.up_proj.weight", config, seed).chunk(2)
    return {id(w1), id(w2), id(w3)}


def _fill_peer(layer: PEER, name: str, config: ModelConfig, seed: int) -> set[int]:
    first, done = layer.ep_rank * layer.num_local_experts, set()
    for table_name, table in layer.experts.named_parameters():
        block = max(1, VALUES_A_STREAM // table[0].numel())
        stem = f"{name}.{table_name.removesuffix('.weight')}"
        every = [
            _values(
                torch.Size((min(block, layer.num_experts - start), *table.shape[1:])),
                f"{stem}.{start}{TABLE_SUFFIXES[table_name]}",
                config,
                seed,
            )
            for start in range(0, layer.num_experts, block)
        ]
        table.copy_(torch.cat(every)[first : first + layer.num_local_experts])
        done.add(id(table))
    return done


def _values(shape: torch.Size, name: str, config: ModelConfig, seed: int) -> torch.Tensor:
    inner = below_feed_forward(name)
    in_moe = config.moe is not None and inner is not None
    if name.endswith((".bias", ".sinks")) or (in_moe and config.moe.starts_at_zero(inner)):
        return torch.zeros(shape)
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std = std / math.sqrt(2 * config.num_hidden_layers)
    if in_moe:
        std = config.moe.initial_std(inner, shape[-1]) or std
        name = name.removesuffix(inner) + config.moe.common_name(inner)
    generator = torch.Generator().manual_seed(derived_seed(f"{seed}/{name}"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
