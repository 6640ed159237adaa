"""What goes together with what: asked of the rules that refuse a recipe or a ds_config.

An axis is one dimension of a training with its values. To add one, add an entry to
:data:`ALL_AXES`: the page, its test and ``tests/integration/distributed/test_parallel_pairs.py``
take their values from here. An axis whose field a recipe does not have is left out.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from pretrain.config.load import apply_override, read_recipe_file, validate_recipe
from pretrain.config.recipe import ParallelConfig, Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.errors import ConfigError
from pretrain.engine.ds_config import resolve_ds_config, zero_stage_of

# Ranks of every combination: dp_size = ranks / (sp_size * tp_size) follows.
WORLD_SIZE = 4
LOSSES = "aux_loss_weight: 0.05, z_loss_weight: 0.01"
# A small model whose sizes all values of all axes divide.
SIZES = (
    "model.vocab_size=128",
    "model.initializer_range=0.15",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "train.sequence_length=32",
    "train.grad_clip=0.3",
    "logging.tensorboard=false",
)
SOURCE = "the ds_config"


class Setting(NamedTuple):
    """What one value of an axis changes.

    Attributes:
        recipe: overrides of a recipe.
        ds_config: sections of DeepSpeed's JSON.
        needs_gpu: whether no CPU computes it, so that it is not run here.
    """

    recipe: tuple[str, ...] = ()
    ds_config: dict[str, Any] = {}
    needs_gpu: bool = False


class Axis(NamedTuple):
    """One dimension and its values; the first one is what all others are combined with.

    Attributes:
        field: of ``parallel`` in a recipe, without which the axis does not exist; None for the
            others.
    """

    name: str
    values: dict[str, Setting]
    field: str | None = None


def _experts(kind: str, more: str) -> Setting:
    return Setting((f"model.moe={{kind: {kind}, {more}}}",))


def _sizes(field: str, *sizes: int) -> dict[str, Setting]:
    return {str(size): Setting((f"parallel.{field}={size}",) if size > 1 else ()) for size in sizes}


# Few CPUs compute in fp16, none in fp8.
ON_GPUS = ("fp16", "fp8")
ROUTED = f"num_experts: 4, top_k: 2, moe_intermediate_size: 32, {LOSSES}"
TABLES = "product_key_sizes: [4, 4], query_dim: 8, num_heads: 2, top_k: 2, moe_intermediate_size: 2"
DENSE = ("model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=64")
ALL_AXES = (
    Axis(
        "MoE layer",
        {
            "dropless": _experts("dropless", ROUTED),
            "deepspeed": _experts("deepspeed", f"{ROUTED}, drop_tokens: false"),
            "peer": _experts("peer", TABLES),
            "dense": Setting(DENSE),
        },
    ),
    Axis(
        "ZeRO stage",
        {
            str(stage): Setting(ds_config={"zero_optimization": {"stage": stage}})
            for stage in (1, 0, 2, 3)
        },
    ),
    Axis("ep_size", _sizes("ep_size", 1, 2, 4)),
    Axis("sp_size", _sizes("sp_size", 1, 2, 4), field="sp_size"),
    Axis("tp_size", _sizes("tp_size", 1, 2, 4), field="tp_size"),
    Axis("pipeline stages", {"1": Setting(), "2": Setting(ds_config={"pipeline": {"stages": 2}})}),
    Axis(
        "precision",
        {
            precision: Setting((f"train.precision={precision}",), needs_gpu=precision in ON_GPUS)
            for precision in ("fp32", "bf16", *ON_GPUS)
        },
    ),
    Axis(
        "recomputation",
        {
            kind: Setting((f"train.activation_checkpointing={kind}",))
            for kind in ("none", "selective", "full")
        },
    ),
)
AXES = {
    axis.name: axis
    for axis in ALL_AXES
    if axis.field is None or axis.field in ParallelConfig.model_fields
}
# An axis and one of its values.
Choice = tuple[str, str]


def setting(choice: Choice) -> Setting:
    """What a choice changes."""
    return AXES[choice[0]].values[choice[1]]


def overrides_of(choices: Iterable[Choice]) -> list[str]:
    """The overrides of the debug recipe, in the order of the axes."""
    chosen = dict(choices)
    own = {name: next(iter(axis.values)) for name, axis in AXES.items()}
    return [
        *SIZES,
        *(override for choice in (own | chosen).items() for override in setting(choice).recipe),
    ]


def ds_config_of(choices: Iterable[Choice]) -> dict[str, Any]:
    """The sections of the ds_config."""
    sections: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    for choice in choices:
        sections |= copy.deepcopy(setting(choice).ds_config)
    return sections


@cache
def _debug() -> dict[str, Any]:
    content, _ = read_recipe_file("debug")
    return content


def recipe_of(choices: Iterable[Choice]) -> Recipe:
    """The recipe of a combination.

    Raises:
        ConfigError: if its own rules refuse it.
    """
    content = copy.deepcopy(_debug())
    for override in overrides_of(choices):
        apply_override(content, override)
    return validate_recipe(content, "the recipe")


@cache
def refusal(*choices: Choice) -> str | None:
    """Why the rules refuse a combination, with the first value of every other axis; else None."""
    ds_config = ds_config_of(choices)
    try:
        recipe = recipe_of(choices)
        accumulation = check_topology(recipe, WORLD_SIZE, zero_stage_of(ds_config, SOURCE))
        precision = recipe.train.precision
        resolve_ds_config(ds_config, SOURCE, recipe, precision, accumulation, WORLD_SIZE)
    except ConfigError as error:
        return str(error).removeprefix(f"{SOURCE}: ").removeprefix("the recipe: ")
    return None


def possible_pairs() -> list[tuple[Choice, Choice]]:
    """Every pair of values of two axes, refused or not."""
    choices = [[(axis.name, value) for value in axis.values] for axis in AXES.values()]
    return [
        pair
        for first, second in itertools.combinations(choices, 2)
        for pair in itertools.product(first, second)
    ]
