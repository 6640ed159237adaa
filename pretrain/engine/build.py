"""The parts of an engine, one function for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import distributed, nn

from pretrain.config.phases import PhaseConfig
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import expert_shards, kernel_demands
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.engine.cpu_tuning import keep_freed_memory
from pretrain.engine.ds_config_check import AUTO
from pretrain.engine.float8 import convert_linears
from pretrain.engine.fragments import whole_shape
from pretrain.engine.monitor import without_monitors
from pretrain.engine.placement import place_weights
from pretrain.engine.precision import DTYPES
from pretrain.engine.shard_groups import ShardGroups
from pretrain.engine.topology import Topology
from pretrain.engine.workarounds.compiled_muon import import_muon_without_compiler
from pretrain.engine.workarounds.compiled_optimizers import leave_compiler_out_of_optimizers
from pretrain.engine.workarounds.flat_partitions import give_shards
from pretrain.engine.workarounds.gradient_copies import spare_gradient_copies
from pretrain.engine.workarounds.partitioned_start import PartitionedStart
from pretrain.engine.workarounds.stage0_first_step import forget_first_step
from pretrain.model.attention.kernels.base import chosen_kernel, gpu_capability
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.deferred import without_values
from pretrain.model.init import RangeReader
from pretrain.model.token_parallel import SequenceParallel, TensorParallel, TokenParts
from pretrain.optim.frozen import frozen_parameters
from pretrain.optim.matrix_shards import MatrixOptimizer

# For a model that holds part i of n of the experts, (model, i, n): readers of its parameters and
# buffers by name, of those that do not start from random values.
WeightLoader = Callable[[DecoderLM, int, int], Mapping[str, RangeReader]]


@dataclass(frozen=True)
class ExpertShard:
    """The part of all experts that this rank holds: ``part`` (from 0) of ``parts``."""

    part: int
    parts: int


def expert_shard(recipe: Recipe, topology: Topology, zero_stage: int) -> ExpertShard:
    """This rank's part of the experts: neighbouring ranks hold different ones."""
    parts = expert_shards(recipe, topology.world_size, zero_stage)
    # DeepSpeed's expert-parallel groups are neighbouring ranks: rank modulo group size is the part.
    return ExpertShard(topology.rank % parts, parts)


def with_kernel(recipe: Recipe, device_type: str) -> ModelConfig:
    """The recipe's model with the attention kernel that it trains with on a device of this type."""
    attention = recipe.model.attention
    kernel = chosen_kernel(attention.kernel, kernel_demands(recipe), device_type, gpu_capability())
    return recipe.model.model_copy(
        update={"attention": attention.model_copy(update={"kernel": kernel})}
    )


def build_model(
    recipe: Recipe,
    precision: str,
    shard: ExpertShard,
    device: torch.device,
    load_weights: WeightLoader | None,
    ds_config: JsonObject | None = None,
    topology: Topology | None = None,
) -> DecoderLM:
    """The model with its initial weights, in the dtype and on the device that it trains with.

    DeepSpeed makes its fp32 master weights from these.

    Args:
        load_weights: instead of random weights.
        ds_config: of the engine that is to train it: at ZeRO stage 3 this rank keeps its part of
            each parameter alone, and every rank must call this. None for a model of its own.
        topology: whose ranks share sequences and tensors of it, so that this rank keeps its part of
            the tensors; None for a model of its own.
    """
    config = with_kernel(recipe, device.type)
    dtype = DTYPES[precision]
    with without_values():
        model = DecoderLM(config, shard.parts, shard.part, recipe.train.activation_checkpointing)
    # Converted layers keep their parameters and names.
    if precision == "fp8":
        convert_linears(model, device)
    if topology is not None:
        share_sequences(model, topology)
    partitions = None
    if ds_config is not None and stage_of(ds_config) == 3:
        partitions = PartitionedStart(model, without_monitors(ds_config), dtype)
    stored = {} if load_weights is None else load_weights(model, shard.part, shard.parts)
    place_weights(model, recipe.seed, stored, dtype, device, partitions)
    return model


def frozen_names(
    model: nn.Module, config: ModelConfig, phases: Sequence[PhaseConfig]
) -> dict[int, set[str]]:
    """Names of the parameters that each phase freezes, by the phase's number (from 1).

    Raises:
        ConfigError: if a phase freezes what the model does not have.
    """
    names = [name for name, _ in model.named_parameters()]
    return {
        number: frozen_parameters(names, phase.frozen, config, f"phases.{phase.name}.frozen")
        for number, phase in enumerate(phases, start=1)
        if phase.frozen
    }


def leave_compiler_out() -> None:
    """Keep a start from importing torch's compiler, which takes longer than the rest of it.

    To be called before the optimizer is made. ``train.compile`` imports what it needs, and works
    as before.
    """
    leave_compiler_out_of_optimizers()
    import_muon_without_compiler()


def start_deepspeed(
    model: DecoderLM,
    optimizer: torch.optim.Optimizer,
    ds_config: JsonObject,
    precision: str,
    device: torch.device,
) -> tuple[Any, Any]:
    """DeepSpeed's engine around a model, and its optimizer around ours.

    Every rank must call it.

    Raises:
        ConfigError: if a gradient does not fit into a bucket that has to hold it, or a weight
            cannot be quantized.
    """
    zero_stage = stage_of(ds_config)
    zero = ds_config.get("zero_optimization", {})
    check_buckets(model, zero, device)
    check_quantized_weights(
        model, zero, distributed.get_world_size() if distributed.is_initialized() else 1
    )
    engine, wrapped, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=without_monitors(ds_config)
    )
    # DeepSpeed has touched the optimizer's state by now, and has cut parameters into partitions.
    forget_first_step(wrapped, zero_stage, precision)
    spare_gradient_copies(wrapped, zero_stage)
    if isinstance(optimizer, MatrixOptimizer):
        give_shards(wrapped, optimizer, zero_stage, device)
    if device.type == "cpu":
        # From here on tensors of the same sizes come and go in every step.
        keep_freed_memory()
    return engine, wrapped


def check_buckets(model: nn.Module, zero: JsonObject, device: torch.device) -> None:
    """Check that no gradient is freed while the stream that sums it over ranks still reads it.

    DeepSpeed copies gradients into buckets. At stage 2 one that is larger than a bucket is summed
    where it is, and freed at once if its partition is another rank's: on a GPU with
    ``overlap_comm`` the next kernel may write there too early.

    Args:
        zero: the section zero_optimization of a resolved ds_config.

    Raises:
        ConfigError: if a parameter is larger than a bucket.
    """
    waits = device.type != "cuda" or not zero.get("overlap_comm") or zero.get("offload_optimizer")
    if waits or zero.get("stage") != 2:
        return
    size = zero.get("reduce_bucket_size", AUTO)
    size = DeepSpeedZeroConfig().reduce_bucket_size if size == AUTO else int(size)
    elements, name = max((value.numel(), name) for name, value in model.named_parameters())
    if elements > size:
        raise ConfigError(
            f"zero_optimization.reduce_bucket_size ({size}) is smaller than the parameter {name} "
            f"({elements} elements), whose gradient DeepSpeed would free too early with "
            "zero_optimization.overlap_comm at ZeRO stage 2: raise the one, or set the other to "
            "false"
        )


def share_sequences(model: DecoderLM, topology: Topology) -> None:
    """Let neighbouring ranks share sequences and tensors, if the topology says so.

    Every rank must call it, before the model has its weights.
    """
    sp_size, tp_size, parts = topology.sp_size, topology.tp_size, topology.token_parts
    firsts = range(0, topology.world_size, parts)
    everyone = topology.own_group([range(first, first + parts) for first in firsts])
    heads = topology.own_group(
        [range(first + i, first + parts, tp_size) for first in firsts for i in range(tp_size)]
    )
    # Neighbours, so that the tokens they gather follow each other.
    tensors = topology.own_group(
        [range(first, first + tp_size) for first in range(0, topology.world_size, tp_size)]
    )
    if everyone is None:
        return
    part = topology.token_part
    model.share(
        TokenParts(everyone.group_name, part, parts),
        None if heads is None else SequenceParallel(heads.group_name, part // tp_size, sp_size),
        None if tensors is None else TensorParallel(tensors.group_name, part % tp_size, tp_size),
    )
    if tp_size > 1:
        model.add_module("shard_groups", ShardGroups(tp_size))


def check_quantized_weights(model: nn.Module, zero: JsonObject, world_size: int) -> None:
    """Check that each rank's part of each weight has whole groups of 8 elements.

    DeepSpeed asserts it when it gathers a weight with ``zero_quantized_weights``. A part is the
    weight cut by the ranks that share it, rounded up.

    Args:
        zero: the section zero_optimization of a resolved ds_config.

    Raises:
        ConfigError: with the first weight that has not.
    """
    if zero.get("zero_quantized_weights") is not True:
        return
    for name, weight in model.named_parameters():
        # An expert is shared by the ranks that hold the same part: DeepSpeed names their group.
        ep_size = int(getattr(weight, "group_name", "ep_size_1").removeprefix("ep_size_"))
        ranks = world_size // ep_size
        elements = prod(whole_shape(weight))
        part = -(-elements // ranks)
        if part % 8:
            raise ConfigError(
                f"zero_optimization.zero_quantized_weights needs parts of 8 elements, but {name} "
                f"({elements} elements) has {part} on each of {ranks} ranks: leave it out, or "
                "start fewer ranks"
            )


def stage_of(ds_config: JsonObject) -> int:
    """The ZeRO stage of a resolved ds_config."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))
