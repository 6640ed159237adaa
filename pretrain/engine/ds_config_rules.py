"""Rules about several keys of a ds_config at once, and DeepSpeed's own check of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import distributed

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.engine.ds_config_check import AUTO
from pretrain.engine.ds_config_keys import STAGES

# ZeRO++: the weights are quantized by kernels.
NEED_KERNELS = ("zero_quantized_weights", "zero_quantized_gradients")


def check_combination(
    ds_config: JsonObject, origin: str, recipe: Recipe, device_type: str | None = None
) -> None:
    """Refuse what DeepSpeed would ignore at this stage, or cannot do with this recipe.

    Args:
        ds_config: whose keys were checked one by one.
        origin: of the ds_config, for error sentences.
        device_type: ``cpu`` or ``cuda``; this machine's by default.

    Raises:
        ConfigError: with the reason.
    """
    zero = ds_config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    device_type = device_type or get_accelerator().device_name()
    for key, value in zero.items():
        if (problem := _ignored(key, value, stage)) is not None:
            raise ConfigError(f"{origin}: {problem}")
        if key in NEED_KERNELS and value is True and device_type == "cpu":
            raise ConfigError(
                f"{origin}: 'zero_optimization.{key}' needs kernels that DeepSpeed does not have "
                "for a CPU: leave it out"
            )
    for problem in (*_moe_problems(zero, stage, recipe), *_offload_problems(zero)):
        raise ConfigError(f"{origin}: 'zero_optimization.{problem}")
    bf16 = ds_config.get("bf16", {})
    if bf16.get("bf16_master_weights_and_grads") is True and (
        bf16.get("bf16_optimizer_states") is not True
    ):
        raise ConfigError(
            f"{origin}: 'bf16.bf16_master_weights_and_grads' alone needs DeepSpeed's own CPU Adam: "
            "set 'bf16.bf16_optimizer_states' too, or leave it out"
        )
    buckets = zero.get("allgather_bucket_size", AUTO)
    # DeepSpeed aligns partitions to two elements.
    if buckets != AUTO and buckets % 2:
        raise ConfigError(
            f"{origin}: 'zero_optimization.allgather_bucket_size' is {buckets}; it must be even"
        )


def _ignored(key: str, value: Any, stage: int) -> str | None:
    """Return why a key of zero_optimization has no effect at a stage; None if it has one."""
    fields = DeepSpeedZeroConfig.model_fields
    # The file may use the name or the alias.
    name = next((name for name, field in fields.items() if key in (name, field.alias)), key)
    stages = STAGES.get(name)
    if stages is None or stage in stages or value in (AUTO, None):
        return None
    default = fields[name].get_default(call_default_factory=True)
    # What overlap_comm is by default depends on the stage.
    if value == default or (name == "overlap_comm" and value is False):
        return None
    if isinstance(value, dict) and value.get("device", "none") == "none":
        return None
    readers = " or ".join(str(number) for number in sorted(stages))
    return (
        f"'zero_optimization.{key}' has no effect at ZeRO stage {stage}, only at {readers}: leave "
        "it out, or choose another stage"
    )


def _moe_problems(zero: JsonObject, stage: int, recipe: Recipe) -> Iterator[str]:
    """Yield what DeepSpeed refuses in a model with experts: its own assertions."""
    moe = recipe.model.moe
    if moe is None or not recipe.model.moe_layers:
        return
    if stage == 3 and zero.get("zero_quantized_gradients") is True:
        yield (
            "zero_quantized_gradients' does not go with a mixture of experts: leave it out, or use "
            "'communication_data_type' for smaller gradients"
        )
    # Tables are no experts of DeepSpeed's: it sees a dense model.
    if moe.has_tables:
        return
    if stage in (1, 2) and zero.get("reduce_scatter") is False:
        yield "reduce_scatter' must stay true for a mixture of experts: leave it out"
    if stage == 2 and zero.get("contiguous_gradients") is False:
        yield "contiguous_gradients' must stay true for a mixture of experts: leave it out"
    partition = zero.get("zero_hpz_partition_size", 1)
    if stage == 3 and partition != AUTO and partition > 1:
        yield (
            f"zero_hpz_partition_size' is {partition}: DeepSpeed has no secondary partition for a "
            "mixture of experts; leave it out, or use ZeRO stage 2 with parallel.ep_size"
        )


def _offload_problems(zero: JsonObject) -> Iterator[str]:
    """Yield what of an offload this pipeline cannot do."""
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        if isinstance(section, dict) and section.get("device") == "nvme":
            yield (
                f'{name}.device\' is "nvme": checkpoints and guards read weights and optimizer '
                'state from memory, so use "cpu"'
            )


def check_with_deepspeed(resolved: JsonObject, origin: str, world_size: int) -> None:
    """Let DeepSpeed read a resolved ds_config, as it will when the training starts.

    Raises:
        ConfigError: with DeepSpeed's reason, if it refuses it.
    """
    # DeepSpeed counts the ranks that are connected: itself alone before a training connects them.
    connected = distributed.get_world_size() if distributed.is_initialized() else 1
    batch_size = resolved["train_batch_size"] // world_size * connected
    try:
        DeepSpeedConfig(resolved | {"train_batch_size": batch_size})
    # Each section of DeepSpeed raises its own kind of error.
    except Exception as error:
        raise ConfigError(f"{origin}: DeepSpeed refuses it: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        details: list[Any] = list(error.errors())
        return "; ".join(
            f"{'.'.join(str(part) for part in detail['loc'])} {detail['msg']}".strip()
            for detail in details
        )
    return " ".join(str(error).split()) or type(error).__name__
