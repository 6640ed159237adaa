"""Each key of a ds_config is accepted, or refused with words, as DeepSpeed reads it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.engine.ds_config import read_ds_config, resolve_ds_config
from pretrain.engine.ds_config_check import check_ds_config, is_refused, key_paths
from pretrain.engine.ds_config_keys import (
    ELSEWHERE,
    INSTEAD,
    OWNED_BY_RECIPE,
    REFUSED,
    REMOVED,
    STAGES,
    DsConfig,
)
from pretrain.engine.ds_config_rules import check_with_deepspeed
from tests.support.ds_config_mutations import mutations
from tests.support.paths import DS_CONFIGS

# Asked for once the ranks are connected, as a test before this one may have left them.
ASKED_WHEN_CONNECTED = {"sequence_parallel_size"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("debug")


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def resolve(ds_config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    return resolve_ds_config(ds_config, "my.json", recipe, "fp32", 2, 2)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_pass(path: Path, recipe: Recipe) -> None:
    resolve(read_ds_config(str(path)), recipe)


ACCEPTED: list[dict[str, Any]] = [
    zero(2, overlap_comm=True),
    zero(2, reduce_bucket_size=5e8),
    zero(1, allgather_bucket_size=200),
    zero(1, contiguous_gradients=False),
    zero(2, use_multi_rank_bucket_allreduce=False),
    zero(2, round_robin_gradients=True),
    zero(2, parameter_alignment=True),
    zero(2, ignore_unused_parameters=False),
    zero(2, offload_optimizer={"device": "cpu", "pin_memory": False}),
    zero(3, offload_param={"device": "cpu"}),
    zero(3, offload_optimizer=None),
    zero(3, stage3_prefetch_bucket_size=100),
    zero(3, prefetch_bucket_size=100),
    zero(3, stage3_param_persistence_threshold=10),
    zero(3, stage3_model_persistence_threshold=10),
    zero(3, stage3_max_live_parameters=10),
    zero(3, stage3_max_reuse_distance=10),
    zero(3, stage3_module_granularity_threshold=100),
    zero(3, stage3_allgather_sequential=True),
    zero(3, stage3_use_all_reduce_for_fetch_params=True),
    zero(3, sub_group_size=100),
    zero(3, memory_efficient_linear=False),
    zero(3, enable_sanity_checks=True),
    zero(3, log_trace_cache_warnings=True),
    # What asks for nothing.
    zero(1, zero_hpz_partition_size=1, zero_quantized_weights=False),
    {"autotuning": {"enabled": False}, "hybrid_engine": {"enabled": False}},
    {"dataloader_drop_last": False},
    # Outside of zero_optimization.
    {"communication_data_type": "bf16"},
    {"prescale_gradients": True},
    {"gradient_predivide_factor": 2.0},
    {"wall_clock_breakdown": True},
    {"memory_breakdown": True},
    {"dump_state": True},
    {"disable_python_gc": True},
    {"steps_per_print": 5},
    {"comms_logger": {"enabled": True, "verbose": True, "prof_ops": ["all_reduce"]}},
    {"flops_profiler": {"enabled": True, "profile_step": 2}},
    {"timers": {"throughput": {"enabled": False}}},
    {"csv_monitor": {"enabled": True, "output_path": "csv"}},
    {"data_types": {"keep_in_fp32_modules": ["router"]}},
    {"checkpoint": {"tag_validation": "Fail"}},
    {"fp16": {"initial_scale_power": 10, "hysteresis": 1}},
    {"bf16": {"enabled": "auto"}},
]


@pytest.mark.parametrize("ds_config", ACCEPTED, ids=json.dumps)
def test_a_key_that_works_is_accepted(ds_config: dict[str, Any], recipe: Recipe) -> None:
    before = copy.deepcopy(ds_config)
    resolved = resolve(ds_config, recipe)
    assert ds_config == before
    for key in ds_config:
        assert key in resolved


REFUSALS: list[tuple[dict[str, Any], str]] = [
    # Typing errors, at any depth; and the right key in the wrong section.
    ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
    (zero(1) | {"zero_optimization": {"stgae": 1}}, "did you mean 'zero_optimization.stage'?"),
    (
        zero(1, offload_optimizer={"devise": "cpu"}),
        "did you mean 'zero_optimization.offload_optimizer.device'?",
    ),
    ({"stage": 2}, "did you mean 'zero_optimization.stage'?"),
    ({"flops_profiler": {"enable": True}}, "did you mean 'flops_profiler.enabled'?"),
    ({"aio": {"blocksize": 1}}, "did you mean 'aio.block_size'?"),
    ({"xyzzy": 1}, "unknown key 'xyzzy': DeepSpeed reads no such key"),
    # Wrong types and ranges.
    (zero("two"), "'zero_optimization.stage' is \"two\"; it must be 0, 1, 2 or 3"),  # type: ignore[arg-type]
    (zero(True), "is true; it must be 0, 1, 2 or 3"),
    (zero(-1), "is -1; it must be"),
    (zero(1.5), "is 1.5; it must be"),  # type: ignore[arg-type]
    (zero(None), "is null; it must be"),  # type: ignore[arg-type]
    (zero("auto"), 'is "auto"; it must be'),  # type: ignore[arg-type]
    ({"zero_optimization": []}, "'zero_optimization' is the list []; it must be an object"),
    ({"zero_optimization": True}, "'zero_optimization' is true; it must be an object"),
    ({"zero_optimization": None}, "'zero_optimization' is null; it must be an object"),
    (zero(1, overlap_comm=1), "is 1; it must be true or false or null"),
    (zero(1, reduce_bucket_size=-1), "is -1; it must be a whole number above 0"),
    (zero(1, reduce_bucket_size=True), "is true; it must be a whole number above 0"),
    (zero(1, reduce_bucket_size=1e300), "which no counter of 64 bits holds"),
    (zero(1, reduce_bucket_size=float("inf")), "is Infinity; it must be a whole number"),
    (zero(1, allgather_bucket_size=3), "is 3; it must be even"),
    (zero(1, offload_optimizer="cpu"), 'is "cpu"; it must be an object {...} or null'),
    (zero(1, offload_optimizer={"device": "gpu"}), 'it must be "none", "cpu" or "nvme"'),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, "it must be a list"),
    ({"data_types": {"keep_in_fp32_modules": [1]}}, "a list of a string"),
    ({"train_batch_size": "big"}, 'it must be a whole number at least 1 or "auto"'),
    ({"gradient_clipping": None}, 'is null; it must be a number at least 0 or "auto"'),
    ({"bf16": "auto"}, "'bf16' is \"auto\"; it must be an object"),
    ({"communication_data_type": "fp8"}, 'it must be "fp32", "fp16" or "bf16" or null'),
    ({"checkpoint": {"tag_validation": "Maybe"}}, "'checkpoint.tag_validation' is \"Maybe\""),
    ({"fp16": {"loss_scale": -1}}, "DeepSpeed refuses it: loss_scale"),
    ({"steps_per_print": 0}, "it must be a whole number at least 1 or null"),
    # What the recipe owns, or this pipeline does not do.
    ({"optimizer": {"type": "Adam"}}, "owned by the recipe's 'optimizer'"),
    ({"scheduler": {"type": "WarmupLR"}}, "owned by the recipe's 'schedule'"),
    ({"pipeline": {"stages": 2}}, "no pipeline parallelism"),
    ({"tensor_parallel": {"autotp_size": 2}}, "parallel.tp_size"),
    ({"sequence_parallel_size": 2}, "parallel.sp_size"),
    ({"seq_parallel_communication_data_type": "bf16"}, "parallel.sp_size"),
    ({"expert_parallel": {"enabled": True}}, "parallel.ep_size"),
    ({"torch_autocast": {"enabled": True}}, "train.precision"),
    ({"bfloat16": {"enabled": True}}, 'an old name of "bf16"'),
    ({"compile": {"deepcompile": True}}, "train.compile"),
    ({"data_efficiency": {"enabled": True}}, "data.mixture and phases"),
    ({"activation_checkpointing": {"profile": True}}, "train.activation_checkpointing"),
    ({"autotuning": {"enabled": True}}, "tools/sweep.py"),
    ({"hybrid_engine": {"enabled": True}}, "between training steps"),
    ({"weight_quantization": {"enabled": True}}, "for inference"),
    ({"datastates_ckpt": {"host_cache_size": 1}}, "its own checkpoints"),
    ({"disable_allgather": True}, "never uses it"),
    ({"dataloader_drop_last": True}, "data loader is not used"),
    ({"vocabulary_size": 7}, "model.vocab_size"),
    ({"managed_gradient_accumulation": False}, "train.global_batch_size"),
    ({"gradient_allreduce_op": "sum"}, "a mean over ranks"),
    ({"use_data_before_expert_parallelism": True}, "to be neighbours"),
    ({"zero_allow_untested_optimizer": False}, "leave it out"),
    ({"zero_force_ds_cpu_optimizer": True}, "CPU Adam"),
    ({"data_types": {"param_dtype": "bf16"}}, "train.precision"),
    ({"checkpoint": {"writer": {"type": "FAST"}}}, "do nothing"),
    ({"checkpoint": {"use_node_local_storage": True}}, "one folder"),
    ({"moe": {"enabled": True}}, "model.moe"),
    ({"data_parallel_size": 2}, "follows from the number of ranks"),
    (zero(3, zero_quantized_nontrainable_weights=True), "it would quantize nothing"),
    ({"mp_size": 2}, "for inference"),
    # What DeepSpeed has removed.
    *(({key: {"enabled": True}}, f"'{key}' is refused: DeepSpeed says") for key in REMOVED),
    (zero(3, mics_shard_size=2), "MiCS ZeRO-3 sharding has been removed"),
    (zero(2, cpu_offload=True), "an old name in DeepSpeed: write 'offload_optimizer'"),
    # What a stage ignores, and what DeepSpeed cannot do with experts or this optimizer.
    (zero(0, overlap_comm=True), "has no effect at ZeRO stage 0, only at 1 or 2 or 3"),
    (zero(0, offload_optimizer={"device": "cpu"}), "has no effect at ZeRO stage 0"),
    (zero(2, offload_param={"device": "cpu"}), "has no effect at ZeRO stage 2, only at 3"),
    (zero(2, zero_hpz_partition_size=2), "has no effect at ZeRO stage 2, only at 3"),
    (zero(2, zero_quantized_weights=True), "has no effect at ZeRO stage 2, only at 3"),
    (zero(3, round_robin_gradients=True), "has no effect at ZeRO stage 3, only at 1 or 2"),
    (zero(3, zero_hpz_partition_size=2), "no secondary partition for a mixture of experts"),
    (zero(3, zero_quantized_gradients=True), "needs kernels that DeepSpeed does not have"),
    (zero(3, zero_quantized_weights=True), "needs kernels that DeepSpeed does not have"),
    (zero(3, leaf_module={"names": ["layers.0"]}), "the training aborts"),
    ({"bf16": {"immediate_grad_update": True}}, "BF16_Optimizer"),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, "'bf16.bf16_optimizer_states' too"),
    ({"fp16": {"fp16_master_weights_and_grads": True}}, "CPU Adam"),
    (zero(1, reduce_scatter=False), "must stay true for a mixture of experts"),
    (zero(2, contiguous_gradients=False), "must stay true for a mixture of experts"),
    (zero(2, zenflow={"topk_ratio": 0.1}), "DeepSpeed's own Adam"),
    (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "DeepSpeed's own CPU Adam"),
    (zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/n"}), 'use "cpu"'),
    (zero(2, legacy_stage1=True), "DeepSpeed has removed it"),
    (zero(2, elastic_checkpoint=True), "another number of ranks"),
]
# The removed keys of zero_optimization have a case of their own.
REFUSALS = [case for case in REFUSALS if not any("." in key for key in case[0])]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are there or not by the device."""
    device = SimpleNamespace(device_name=lambda: "cpu")
    monkeypatch.setattr("pretrain.engine.ds_config_rules.get_accelerator", lambda: device)


def test_experts_do_not_go_with_quantized_gradients_on_a_gpu(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr("pretrain.engine.ds_config_rules.get_accelerator", lambda: device)
    with pytest.raises(ConfigError, match="does not go with a mixture of experts"):
        resolve(zero(3, zero_quantized_gradients=True), recipe)
    resolve(zero(3, zero_quantized_weights=True), recipe)


DENSE = ["model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=64"]
TABLES = ["model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8}"]


@pytest.mark.parametrize("overrides", [DENSE, TABLES], ids=["dense", "peer"])
def test_a_model_without_deepspeed_s_experts_may_have_a_secondary_partition(
    overrides: list[str],
) -> None:
    """``test_zero_settings.py`` trains with them."""
    recipe = load_recipe("debug", overrides)
    for ds_config in (
        zero(3, zero_hpz_partition_size=2),
        zero(1, reduce_scatter=False),
        zero(2, contiguous_gradients=False),
    ):
        resolve(ds_config, recipe)


@pytest.mark.parametrize("ds_config,part", REFUSALS, ids=lambda case: json.dumps(case)[:70])
def test_a_key_that_cannot_hold_is_refused_in_one_sentence(
    ds_config: dict[str, Any], part: str, recipe: Recipe
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ds_config, recipe)
    sentence = str(caught.value)
    assert sentence.startswith("my.json: ") and part in sentence
    assert "\n" not in sentence and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text,part",
    [
        ('{"a": 1,\n "b": }', "line 2, column 7"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'zero_optimization.stage' is there"),
        ('{"fp16": {}, "fp16": {}}', "'fp16' is there twice"),
        ('{"a": [{"b": 1, "b": 2}]}', "'a[0].b' is there twice"),
        ('{\n  // why\n  "steps_per_print": 5\n}', "JSON has no comments"),
        ('{"steps_per_print": 5,}', "take out the comma before it"),
        ("{stage: 1}", "line 1, column 2"),
        ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
        ('{"zero_optimization": {"reduce_bucket_size": 1e400}}', "is Infinity; it must be"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "is not valid JSON that can be read"),
        ("[" * 100_000, "is not valid JSON that can be read"),
        ('{"checkpoint": {"load_universal": true}}', "'checkpoint.load_universal' is refused"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_that_cannot_be_read_says_where(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_ds_config(str(path))
    assert part in str(caught.value) and str(path) in str(caught.value)


class Recorder(dict[str, Any]):
    """A ds_config that remembers which keys were asked for."""

    asked: set[str]

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:  # DeepSpeed asks "key in config.keys()"
        return self


def asked_by_deepspeed(section: str | None = None) -> set[str]:
    """The keys that the installed DeepSpeed looks for in the whole file, or in a section."""
    recorder = Recorder()
    recorder.asked = set()
    whole: dict[str, Any] = Recorder() if section is None else {}
    if section is None:
        whole = recorder
    else:
        whole[section] = recorder
    dict.__setitem__(whole, "train_batch_size", 1)
    DeepSpeedConfig(whole)
    return recorder.asked


def test_the_keys_are_those_that_the_installed_deepspeed_asks_for() -> None:
    asked = asked_by_deepspeed()
    known = set(DsConfig.model_fields)
    removed = {key for key in REMOVED if "." not in key}
    assert asked - known - removed == set(), "DeepSpeed reads new keys"
    assert known - asked - ASKED_WHEN_CONNECTED == set(), "DeepSpeed does not read these any more"


@pytest.mark.parametrize("section", ["flops_profiler", "aio", "data_types", "checkpoint"])
def test_the_keys_of_a_section_without_a_model_are_those_deepspeed_asks_for(section: str) -> None:
    model = DsConfig.model_fields[section].annotation
    assert isinstance(model, type)
    assert asked_by_deepspeed(section) == set(model.model_fields)  # type: ignore[attr-defined]


def test_every_key_of_zero_has_the_stages_that_read_it_or_a_reason() -> None:
    deprecated = {
        name
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
    }
    refused = {path.split(".")[1] for path in REFUSED if path.startswith("zero_optimization.")}
    known = set(STAGES) | {"stage"} | deprecated | refused
    assert set(DeepSpeedZeroConfig.model_fields) - known == set()
    assert set(STAGES) <= set(DeepSpeedZeroConfig.model_fields)


def test_tables_name_keys_that_exist() -> None:
    paths = set(key_paths())
    assert set(REFUSED) <= paths and paths >= OWNED_BY_RECIPE
    assert set(INSTEAD) <= set(REMOVED)
    assert not set(ELSEWHERE) & paths
    assert is_refused("compile.passes") and not is_refused("bf16.enabled")


def test_deepspeed_s_own_refusal_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^my.json: DeepSpeed refuses it: "):
        check_with_deepspeed({"train_batch_size": 2, "fp16": {"enabled": 3}}, "my.json", 2)


def test_random_mutations_are_accepted_or_refused_in_a_sentence(recipe: Recipe) -> None:
    accepted = 0
    for ds_config in mutations(500):
        try:
            resolve(ds_config, recipe)
            accepted += 1
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, ds_config
    # Neither all nor none: the generator reaches both.
    assert 5 < accepted < 400


def test_many_problems_are_counted() -> None:
    with pytest.raises(ConfigError, match="and 3 more"):
        check_ds_config({f"nonsense_{number}": 1 for number in range(8)}, "my.json")
