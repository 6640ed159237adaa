"""Fills in what a recipe and a ds_config leave open, for a training and for a dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.shards.datasets import Datasets
from pretrain.config.epochs import with_epoch_samples
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.config.timeline import Timeline
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.model.attention.kernels.base import check_kernel_here
from pretrain.model.moe.config import MoE
from pretrain.model.moe.exchange.base import check_parts_here


@dataclass(frozen=True)
class ResolvedConfig:
    """The configuration of a run on a number of ranks.

    Attributes:
        recipe: with the precision, the vocabulary's size and the length of an epoch that are used.
        timeline: its phases.
        ds_config: with what the recipe owns.
    """

    recipe: Recipe
    timeline: Timeline
    ds_config: JsonObject
    world_size: int
    zero_stage: int


def resolve_config(
    recipe: Recipe,
    ds_config: JsonObject,
    *,
    origin: str,
    zero_stage: int,
    world_size: int,
    choose_precision: Callable[[str], str],
    check_kernel: Callable[[str], None] = check_kernel_here,
    check_experts: Callable[[MoE | None, int, str], None] = check_parts_here,
    datasets: Datasets | None,
) -> ResolvedConfig:
    """Resolve recipe and ds_config; nothing is started.

    Args:
        origin: of the ds_config, for sentences.
        zero_stage: of the ds_config.
        choose_precision: returns the number format for ``train.precision``, which may be "auto".
        check_kernel: raises a ConfigError if the attention kernel of this name cannot run there.
        check_experts: the same for parts of an MoE section among ``ep_size`` ranks in a number
            format.
        datasets: None before there are data.

    Raises:
        ConfigError: if recipe, ds_config, ranks and device do not fit together.
            Also if its length is given in epochs and there are no data yet.
        DataError: if the vocabulary's size is not known, or too small.
    """
    # Batch sizes need the ranks, the ds_config needs both and the number format.
    accumulation = check_topology(recipe, world_size, zero_stage)
    precision = choose_precision(recipe.train.precision)
    check_kernel(recipe.model.attention.kernel)
    check_experts(recipe.model.moe, recipe.parallel.ep_size, precision)
    recipe = resolve_recipe(recipe, precision, datasets)
    if datasets is not None:
        recipe = with_epoch_samples(recipe, datasets)
    resolved = resolve_ds_config(ds_config, origin, recipe, precision, accumulation, world_size)
    return ResolvedConfig(recipe, Timeline(recipe), resolved, world_size, zero_stage)


def resolve_recipe(recipe: Recipe, precision: str, datasets: Datasets | None) -> Recipe:
    """Fill in the number format and, unless the recipe sets it, the vocabulary's size.

    The size is the data's or, before there are data, that of their plan.

    Raises:
        DataError: if the recipe's vocabulary is smaller than the tokenizer's.
    """
    planned = datasets.tokenizer.vocab_size if datasets else recipe.data.tokenizer.vocab_size
    vocab_size = recipe.model.vocab_size or planned
    if vocab_size is None:
        raise DataError(
            "the vocabulary's size is not known before there is data in "
            f"{recipe.data_path}: build it, or set model.vocab_size"
        )
    if datasets and vocab_size < datasets.tokenizer.vocab_size:
        raise DataError(
            f"model.vocab_size is {vocab_size}, but the tokenizer of {datasets.place} has "
            f"{datasets.tokenizer.vocab_size} entries: leave model.vocab_size out"
        )
    # model_copy does not validate: both values were checked where they come from.
    model = recipe.model.model_copy(update={"vocab_size": vocab_size})
    train = recipe.train.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"model": model, "train": train})
