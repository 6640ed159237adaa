"""DeepSpeed's configuration: the file's policy, and what the recipe owns; one owner per value."""

from __future__ import annotations

import json
from typing import Any

from pretrain.config.recipe import Recipe
from pretrain.core.credentials import refuse_credentials
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.core.shipped import ds_config_names, ds_config_path
from pretrain.engine.ds_config_check import AUTO, check_ds_config
from pretrain.engine.ds_config_file import parse_ds_config
from pretrain.engine.ds_config_rules import check_combination, check_with_deepspeed
from pretrain.engine.workarounds.bf16_overflow_check import OVERFLOW_CHECK
from pretrain.engine.workarounds.gradient_dtype import check_gradient_dtype
from pretrain.engine.workarounds.untested_optimizers import ALLOW_ANY_OPTIMIZER

# Section of the ds_config that would build what the recipe builds -> the recipe's section.
OWNED_SECTIONS = {"optimizer": "optimizer", "scheduler": "schedule"}


def read_ds_config(path: str) -> JsonObject:
    """The JSON object in the file ``path``, or in the shipped ds_config of that name.

    Raises:
        ConfigError: if the file is missing, is not a JSON object, holds a credential, or a key
            that is unknown, refused or of the wrong type.
    """
    try:
        text = ds_config_path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the ds_config {path}: {error.strerror}; shipped ones are"
            f" {', '.join(ds_config_names())}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    content = parse_ds_config(text, path)
    refuse_credentials(content, path)
    check_ds_config(content, path)
    # Only a program that calls pretrain/checkpoint/universal.py may ask for it.
    if content.get("checkpoint", {}).get("load_universal"):
        raise ConfigError(
            f"{path}: 'checkpoint.load_universal' is refused: a run resumes from its own "
            "checkpoints, on any number of ranks; leave it out"
        )
    return content


def zero_stage_of(ds_config: JsonObject, origin: str) -> int:
    """The ZeRO stage that a ds_config asks for.

    Raises:
        ConfigError: if there is no such stage.
    """
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{origin}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    return int(stage)


def resolve_ds_config(
    ds_config: JsonObject,
    origin: str,
    recipe: Recipe,
    precision: str,
    accumulation_steps: int,
    world_size: int,
) -> JsonObject:
    """Fill what the recipe owns into a copy of ``ds_config``.

    Args:
        origin: of the ds_config, for error sentences.

    Raises:
        ConfigError: if the file sets a key that the recipe owns to another value; the sentence
            names both places.
    """
    check_ds_config(ds_config, origin)
    check_combination(ds_config, origin, recipe)
    # A deep copy; the caller's object stays as the file has it.
    resolved = json.loads(json.dumps(ds_config))
    for name, owner in OWNED_SECTIONS.items():
        if resolved.pop(name, AUTO) != AUTO:
            raise ConfigError(
                f"{origin}: '{name}' is owned by the recipe's '{owner}': "
                'remove it from the file or write "auto"'
            )
    owned = _owned_by_recipe(recipe, precision, accumulation_steps, world_size)
    # The last key of a path is the value's; sections above it are created if the file lacks them.
    for keys, (value, owner) in owned.items():
        section = resolved
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        in_file = section.get(keys[-1], AUTO)
        if in_file != AUTO and in_file != value:
            raise ConfigError(
                f"{origin}: '{'.'.join(keys)}' is {in_file!r}, but the recipe's {owner} says "
                f'{value!r}: write "auto" in the file'
            )
        section[keys[-1]] = value
    # For DeepSpeed all ranks are data parallel: to it, ranks that share a sequence have one each.
    resolved["train_batch_size"] *= recipe.parallel.token_parts
    _check_gradients(resolved, origin, precision)
    resolved |= ALLOW_ANY_OPTIMIZER
    # DeepSpeed's own progress lines would interrupt ours.
    resolved.setdefault("steps_per_print", 10**9)
    # Gradients are divided after the sum: dividing first rounds differently for each world size.
    resolved.setdefault("prescale_gradients", False)
    if zero_stage_of(resolved, origin) == 0:
        # We clip there ourselves, see pretrain/engine/workarounds/stage0_gradient_norm.py.
        resolved["gradient_clipping"] = 0.0
    check_with_deepspeed(resolved, origin, world_size)
    return resolved


def reopen_ds_config(resolved: JsonObject, recipe: Recipe, zero_stage: int) -> JsonObject:
    """Return a resolved ds_config with what the recipe owns left open again, at a ZeRO stage.

    So it can be resolved for another number of ranks; the file's own policy stays.
    """
    opened: JsonObject = json.loads(json.dumps(resolved))
    for keys in _owned_by_recipe(recipe, "bf16", 1, 1):
        section = opened
        for key in keys[:-1]:
            section = section.get(key, {})
        section.pop(keys[-1], None)
    opened["zero_optimization"] = {**opened.get("zero_optimization", {}), "stage": zero_stage}
    return opened


def _owned_by_recipe(
    recipe: Recipe, precision: str, accumulation_steps: int, world_size: int
) -> dict[tuple[str, ...], tuple[Any, str]]:
    """Key in the ds_config, as a path -> (value, the recipe's field that owns it)."""
    train = recipe.train
    owned: dict[tuple[str, ...], tuple[Any, str]] = {}
    # In fp8 weights and gradients are bf16 too: only the products of linear layers are narrower.
    if precision in ("bf16", "fp8"):
        owned[OVERFLOW_CHECK] = (True, "guards.non_finite")
    return owned | {
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


def _check_gradients(ds_config: JsonObject, origin: str, precision: str) -> None:
    """Refuse settings without the gradient norm that clipping and guards need."""
    if ds_config.get("zero_optimization", {}).get("compute_grad_norm", True) is not True:
        raise ConfigError(
            f"{origin}: zero_optimization.compute_grad_norm must stay true, "
            "because clipping and guards need the norm: leave it out"
        )
    check_gradient_dtype(ds_config, origin, precision, zero_stage_of(ds_config, origin))
