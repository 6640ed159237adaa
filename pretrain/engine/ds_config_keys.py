"""The keys of a ds_config: what DeepSpeed reads, and which of it this pipeline refuses, and why.

DeepSpeed has a pydantic model for most sections. They are taken from the installed version, so
their keys, types and ranges follow it. The other keys it reads from the dictionary by name: their
types are here, and ``tests/unit/engine/test_ds_config_keys.py`` compares their names with the
source of the installed version.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.config import HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Dtype = Literal["fp32", "fp16", "bf16"]
AnyDtype = Literal[
    "torch.float16", "fp16", "float16", "half", "torch.float32", "fp32", "float32", "float",
    "torch.bfloat16", "bf16", "bfloat16",
]  # fmt: skip


class ReadByName(BaseModel):
    """Keys that DeepSpeed reads from a dictionary; defaults are DeepSpeed's."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class FlopsProfiler(ReadByName):
    """``flops_profiler``: the FLOPs of the modules in one step."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: Count = 1
    module_depth: int = Field(-1, ge=-1)
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class Aio(ReadByName):
    """``aio``: reads and writes of an offload to NVMe."""

    block_size: Count = 1048576
    queue_depth: Count = 8
    intra_op_parallelism: Count = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DataTypes(ReadByName):
    """``data_types``: number formats of gradients and buffers."""

    grad_accum_dtype: AnyDtype | None = None
    param_dtype: AnyDtype | None = None
    buffer_dtype: AnyDtype | None = None
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"


class Checkpoint(ReadByName):
    """``checkpoint``: how DeepSpeed saves."""

    tag_validation: Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL"] = "WARN"
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: dict[str, Any] = {}
    checkpoint_serialization: bool = True
    writer: dict[str, Any] | None = None


class Timers(ReadByName):
    """``timers``: DeepSpeed's own measurement of throughput."""

    throughput: DeepSpeedThroughputTimerConfig = DeepSpeedThroughputTimerConfig()


class DsConfig(ReadByName):
    """The whole file. A section of type ``dict`` is refused whatever is in it."""

    # The recipe's; "auto" or the same value. The recipe says whether a value is right.
    train_batch_size: Count = 1
    train_micro_batch_size_per_gpu: Count = 1
    gradient_accumulation_steps: Count = 1
    gradient_clipping: float = Field(0.0, ge=0)
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    # Sections that DeepSpeed describes.
    zero_optimization: DeepSpeedZeroConfig = DeepSpeedZeroConfig()
    bf16: DeepSpeedBF16Config = DeepSpeedBF16Config()
    fp16: DeepSpeedFP16Config = DeepSpeedFP16Config()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandbConfig = WandbConfig()
    csv_monitor: CSVConfig = CSVConfig()
    comet: CometConfig = CometConfig()
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    compile: CompileConfig = CompileConfig()
    hybrid_engine: HybridEngineConfig = HybridEngineConfig()
    weight_quantization: WeightQuantConfig = WeightQuantConfig()
    tensor_parallel: TPTrainingConfig | dict[str, Any] = {}
    timers: Timers = Timers()
    # Keys and sections that it reads by name.
    flops_profiler: FlopsProfiler = FlopsProfiler()
    aio: Aio = Aio()
    data_types: DataTypes = DataTypes()
    checkpoint: Checkpoint = Checkpoint()
    steps_per_print: Count | None = 10
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1.0, gt=0)
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    communication_data_type: Dtype | None = None
    seq_parallel_communication_data_type: Dtype = "fp32"
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    disable_allgather: bool = False
    dataloader_drop_last: bool = False
    managed_gradient_accumulation: bool = True
    use_data_before_expert_parallelism: bool = False
    vocabulary_size: Count | None = None
    log_level: str | None = None
    sequence_parallel_size: Count = 1
    activation_checkpointing: dict[str, Any] = {}
    autotuning: dict[str, Any] = {}
    bfloat16: dict[str, Any] = {}
    data_efficiency: dict[str, Any] = {}
    datastates_ckpt: dict[str, Any] | None = None
    expert_parallel: dict[str, Any] = {}
    pipeline: dict[str, Any] = {}
    torch_autocast: dict[str, Any] = {}


# Paths that may say "auto": resolve_ds_config fills them in from the recipe.
OWNED_BY_RECIPE = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "bf16.enabled",
        "bf16.check_grad_overflow",
        "fp16.enabled",
        "tensorboard.enabled",
        "tensorboard.output_path",
        "tensorboard.job_name",
    }
)
# Path -> why it is refused, unless its value is DeepSpeed's default or a section that is not
# enabled. Each was run with 1 and 2 ranks.
REFUSED = {
    "activation_checkpointing": (
        "DeepSpeed's own checkpointing is never called here: use the recipe's "
        "train.activation_checkpointing"
    ),
    "autotuning": "it starts other runs than the recipe's: use tools/sweep.py",
    "bfloat16": 'an old name of "bf16": rename it',
    "data_efficiency": (
        "it works on DeepSpeed's own data loader, which is not used here: use the recipe's "
        "data.mixture and phases"
    ),
    "datastates_ckpt": "this pipeline writes and checks its own checkpoints: leave it out",
    "expert_parallel": "expert parallelism is the recipe's parallel.ep_size",
    "pipeline": "there is no pipeline parallelism here: use ZeRO stages and parallel.ep_size",
    "torch_autocast": "the number format is the recipe's train.precision",
    "compile": "compilation is the recipe's train.compile",
    "hybrid_engine": "it generates text between training steps, which nothing here asks it for",
    "weight_quantization": "it is for inference, and would do nothing in training",
    "tensor_parallel": "tensor parallelism is the recipe's parallel.tp_size",
    "sequence_parallel_size": "sequence parallelism is the recipe's parallel.sp_size",
    "seq_parallel_communication_data_type": "parallel.sp_size exchanges in the run's own format",
    "disable_allgather": "DeepSpeed reads it and never uses it: leave it out",
    "dataloader_drop_last": "DeepSpeed's own data loader is not used here: leave it out",
    "log_level": "DeepSpeed reads it and never uses it: leave it out",
    "vocabulary_size": "the vocabulary's size is the recipe's model.vocab_size",
    "managed_gradient_accumulation": (
        "accumulation is the recipe's: train.global_batch_size / micro_batch_size / ranks"
    ),
    "use_data_before_expert_parallelism": (
        "checkpoints and statistics need the ranks of one set of experts to be neighbours"
    ),
    "gradient_allreduce_op": (
        "the loss of a step is a mean over ranks: a sum would multiply the gradient by their number"
    ),
    "zero_allow_untested_optimizer": "the recipe's optimizers need it to be true: leave it out",
    "zero_force_ds_cpu_optimizer": (
        "the optimizer is the recipe's, and not DeepSpeed's CPU Adam: leave it out"
    ),
    "checkpoint.use_node_local_storage": "checkpoints need one folder that all nodes see",
    "checkpoint.parallel_write": "it is for DeepSpeed's pipeline engine, which is not used here",
    "checkpoint.checkpoint_serialization": "it would do nothing with this pipeline's checkpoints",
    "checkpoint.writer": "it would do nothing with this pipeline's checkpoints",
    "data_types.param_dtype": "the format of the weights is the recipe's train.precision",
    "zero_optimization.allgather_partitions": "DeepSpeed reads it and never uses it: leave it out",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it: leave it out",
    "zero_optimization.elastic_checkpoint": (
        "checkpoints of this pipeline resume on another number of ranks anyway: leave it out"
    ),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        "DeepSpeed's save_16bit_model is never called here: use tools/convert_checkpoint.py"
    ),
    "zero_optimization.gather_16bit_weights_on_model_save": (
        "DeepSpeed's save_16bit_model is never called here: use tools/convert_checkpoint.py"
    ),
    "zero_optimization.leaf_module": (
        "the ranks' all-gathers of such a module do not match, and the training aborts"
    ),
    "bf16.immediate_grad_update": (
        "only DeepSpeed's BF16_Optimizer reads it, which is not used here: leave it out"
    ),
    "fp16.fp16_master_weights_and_grads": (
        "it needs DeepSpeed's own CPU Adam; the optimizer is the recipe's"
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        "no weight is frozen when DeepSpeed partitions them, because phases freeze by gradients of "
        "zero, so it would quantize nothing: leave it out"
    ),
    "zero_optimization.zenflow": "it needs DeepSpeed's own Adam; the optimizer is the recipe's",
    "zero_optimization.save_muon_momentum_buffer_in_memory": (
        "it is for DeepSpeed's own Muon; the optimizer is the recipe's"
    ),
    "zero_optimization.offload_optimizer.ratio": (
        "it needs DeepSpeed's own CPU Adam; the optimizer is the recipe's"
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        "it needs DeepSpeed's own CPU Adam; the optimizer is the recipe's"
    ),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": (
        "it needs DeepSpeed's own CPU Adam; the optimizer is the recipe's"
    ),
}
_ANY = frozenset({1, 2, 3})
_TWO = frozenset({1, 2})
_THREE = frozenset({3})
# Key of zero_optimization -> the stages whose optimizer DeepSpeed gives it to. Any other stage
# ignores it in silence.
STAGES: dict[str, frozenset[int]] = {
    "contiguous_gradients": _ANY,
    "reduce_scatter": _ANY,
    "reduce_bucket_size": _ANY,
    "overlap_comm": _ANY,
    "offload_optimizer": _ANY,
    "compute_grad_norm": _TWO,
    "use_multi_rank_bucket_allreduce": _TWO,
    "allgather_bucket_size": _TWO,
    "ignore_unused_parameters": _TWO,
    "round_robin_gradients": _TWO,
    "parameter_alignment": _TWO,
    "load_from_fp32_weights": _TWO,
    "offload_param": _THREE,
    "sub_group_size": _THREE,
    "prefetch_bucket_size": _THREE,
    "param_persistence_threshold": _THREE,
    "model_persistence_threshold": _THREE,
    "max_live_parameters": _THREE,
    "max_reuse_distance": _THREE,
    "module_granularity_threshold": _THREE,
    "use_all_reduce_for_fetch_params": _THREE,
    "allgather_sequential": _THREE,
    "zero_hpz_partition_size": _THREE,
    "zero_quantized_weights": _THREE,
    "zero_quantized_gradients": _THREE,
    "memory_efficient_linear": _THREE,
    "pipeline_loading_checkpoint": _THREE,
    "override_module_apply": _THREE,
    "log_trace_cache_warnings": _THREE,
    "enable_sanity_checks": _THREE,
}
# Not read by DeepSpeed's training, but found in ds_configs of other projects or of inference.
ELSEWHERE = {
    "moe": "experts are the recipe's model.moe",
    "mp_size": "it is for inference: there is no tensor parallelism here",
    "data_parallel_size": "it follows from the number of ranks: leave it out",
    "tp_size": "there is no tensor parallelism here: use ZeRO 3 or parallel.ep_size",
    "ep_size": "expert parallelism is the recipe's parallel.ep_size",
    "seed": "the seed is the recipe's",
    "gradient_accumulation": "write the recipe's train.global_batch_size",
    "learning_rate": "it is the recipe's optimizer.learning_rate",
    "dtype": "the number format is the recipe's train.precision",
    "local_rank": "the launcher says it",
}
# Keys that DeepSpeed had and refuses by now -> its own reason.
REMOVED: dict[str, str] = {
    **deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
    **{
        f"zero_optimization.{key}": reason
        for key, reason in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS.items()
    },
}
# What to use instead of a removed key.
INSTEAD = {
    "amp": "use the recipe's train.precision",
    "curriculum_learning": "use the recipe's phases",
    "elasticity": "leave it out, a run may resume on another number of ranks anyway",
}
