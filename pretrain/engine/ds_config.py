"""DeepSpeed's configuration: the file's own policy plus what the recipe owns. A number has one owner."""

from __future__ import annotations

import json
from typing import Any

from pretrain.config.recipe import Recipe
from pretrain.core.credentials import refuse_credentials
from pretrain.core.errors import ConfigError
from pretrain.core.shipped import ds_config_names, ds_config_path

AUTO = "auto"
# What DeepSpeed calls them.
GRADIENT_DTYPES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
}
GRADIENT_DTYPES |= {name: name for name in ("fp32", "bf16", "fp16")}


def read_ds_config(path: str) -> dict[str, Any]:
    """The JSON object in ``path``, or in the shipped file of that name.

    Raises:
        ConfigError: where the file is missing, is not a JSON object, or holds a credential.
    """
    try:
        content = json.loads(ds_config_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the ds_config {path}: {error.strerror}; shipped ones are {', '.join(ds_config_names())}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, as ds_configs/zero1.json does")
    refuse_credentials(content, path)
    return content


def zero_stage_of(ds_config: dict[str, Any], origin: str) -> int:
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{origin}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    return int(stage)


def _owned_by_recipe(
    recipe: Recipe, precision: str, accumulation_steps: int, world_size: int
) -> dict[tuple[str, ...], tuple[Any, str]]:
    """Key in the ds_config -> (value, the recipe's field that owns it)."""
    train = recipe.train
    # Without it stages 1 and 2 would apply a gradient that is not finite in bf16, and only there can it be switched off.
    checked = (
        {("bf16", "check_grad_overflow"): (True, "guards.non_finite")}
        if precision == "bf16"
        else {}
    )
    return checked | {
        ("train_batch_size",): (train.global_batch_size, "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu",): (train.micro_batch_size, "train.micro_batch_size"),
        ("gradient_accumulation_steps",): (
            accumulation_steps,
            f"train.global_batch_size / micro_batch_size / {world_size} ranks",
        ),
        ("gradient_clipping",): (train.grad_clip, "train.grad_clip"),
        ("bf16", "enabled"): (precision in ("bf16", "fp8"), "train.precision"),
        ("fp16", "enabled"): (precision == "fp16", "train.precision"),
        ("tensorboard", "enabled"): (recipe.logging.tensorboard, "logging.tensorboard"),
        ("tensorboard", "output_path"): (recipe.output_path, "run_path"),
        ("tensorboard", "job_name"): ("tensorboard", "run_path"),
    }


def _check_gradients(ds_config: dict[str, Any], origin: str, precision: str) -> None:
    """Refuses what would leave a step without the gradient norm that clipping and guards look at.

    At stage 1 DeepSpeed takes another optimizer for bf16 weights whose gradients are summed in fp32, one that averages the norms of ranks with
    different experts, and at stage 0 it has none for them.
    """
    zero = ds_config.get("zero_optimization", {})
    if zero.get("compute_grad_norm", True) is not True:
        raise ConfigError(
            f"{origin}: zero_optimization.compute_grad_norm must stay true, because clipping and guards need the norm: leave it out"
        )
    given = ds_config.get("data_types", {}).get("grad_accum_dtype")
    stage, model = zero_stage_of(ds_config, origin), "bf16" if precision == "fp8" else precision
    dtype = None if given is None else GRADIENT_DTYPES.get(str(given).removeprefix("torch."), "")
    if dtype == "":
        raise ConfigError(
            f"{origin}: data_types.grad_accum_dtype is {given!r}; use fp32, bf16 or fp16"
        )
    on_host = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    if dtype not in (None, model) and (
        stage == 0 or (stage == 1 and model == "bf16" and not on_host)
    ):
        raise ConfigError(
            f"{origin}: data_types.grad_accum_dtype is {given!r}, which DeepSpeed cannot do for {model} weights at ZeRO stage {stage}: "
            "use ds_configs/zero2.json or zero3.json with it"
        )


def resolve_ds_config(
    ds_config: dict[str, Any],
    origin: str,
    recipe: Recipe,
    precision: str,
    accumulation_steps: int,
    world_size: int,
) -> dict[str, Any]:
    """Fills what the recipe owns into a copy of ``ds_config``.

    Raises:
        ConfigError: where the file gives a value of its own to a key that the recipe owns; the sentence names both places.
    """
    resolved = json.loads(json.dumps(ds_config))
    for section in ("optimizer", "scheduler"):
        if resolved.pop(section, AUTO) != AUTO:
            owner = "optimizer" if section == "optimizer" else "schedule"
            raise ConfigError(
                f"{origin}: '{section}' is owned by the recipe's '{owner}': remove it from the file or write \"auto\""
            )
    for keys, (value, owner) in _owned_by_recipe(
        recipe, precision, accumulation_steps, world_size
    ).items():
        section = resolved
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        given = section.get(keys[-1], AUTO)
        if given != AUTO and given != value:
            raise ConfigError(
                f"{origin}: '{'.'.join(keys)}' is {given!r}, but the recipe's {owner} says {value!r}: write \"auto\" in the file"
            )
        section[keys[-1]] = value
    _check_gradients(resolved, origin, precision)
    resolved["zero_allow_untested_optimizer"] = (
        True  # DeepSpeed's list of optimizers it has tried leaves out torch's SGD
    )
    resolved["zero_force_ds_cpu_optimizer"] = False
    resolved.setdefault("steps_per_print", 10**9)
    # Averages are formed after the sum: dividing first would round differently for each world size.
    resolved.setdefault("prescale_gradients", False)
    if zero_stage_of(resolved, origin) == 0:
        # Stage 0 averages the ranks' local norms where experts are spread over ranks, and clips by that: we clip there ourselves.
        resolved["gradient_clipping"] = 0.0
    return resolved
