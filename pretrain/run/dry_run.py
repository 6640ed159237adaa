"""The command's ``--dry-run``: resolves a run for any number of ranks, and prints its plan."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_pipeline.loading.mixture import check_names
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.manifest import manifest_path
from pretrain.checkpoint.initialize_from import starting_point
from pretrain.checkpoint.layout import (
    complete_checkpoints,
    read_run_recipe,
    read_state,
    resolve_checkpoint,
)
from pretrain.config.epochs import with_epoch_samples, with_placeholder_length
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import has_known_length
from pretrain.core.cli import write_json
from pretrain.core.files import JsonObject
from pretrain.engine.ds_config import zero_stage_of
from pretrain.engine.topology import starts_as_first_rank, world_size_from_environment
from pretrain.run.capacity import check_any_machine, check_world_size, demand_of
from pretrain.run.estimate import hardware_of
from pretrain.run.folder import CHECKPOINTS
from pretrain.run.plan import make_plan, without_length
from pretrain.run.plan_report import print_plan
from pretrain.run.resolve import resolve_config
from pretrain.run.same_run import check_branch


def plan_run(options: argparse.Namespace, recipe: Recipe, ds_config: JsonObject) -> None:
    """Print what a run would be, and write it as JSON if ``options`` ask for that.

    Raises:
        ConfigError, DataError, CheckpointError: as the run would, as far as nothing has to be
            started for it.
    """
    world_size = options.world_size
    if world_size is None:
        world_size = max(world_size_from_environment(os.environ), recipe.parallel.fewest_ranks)
    check_world_size(world_size)
    zero_stage = zero_stage_of(ds_config, options.ds_config)
    datasets = _datasets_if_built(recipe)
    hardware = hardware_of(options)
    is_known = datasets is not None or has_known_length(recipe)
    config = resolve_config(
        recipe if is_known else with_placeholder_length(recipe),
        ds_config,
        origin=options.ds_config,
        zero_stage=zero_stage,
        world_size=world_size,
        choose_precision=hardware.choose_precision,
        check_kernel=hardware.check_kernel,
        check_experts=hardware.check_experts,
        datasets=datasets,
    )
    # Of another machine only so much is known: it is no larger than the largest there is.
    check_any_machine(demand_of(config, hardware.gpu is not None), world_size)
    first_step = planned_start(_counted(recipe, config.recipe) if is_known else recipe)
    tokenizer_sha256 = datasets.tokenizer.sha256 if datasets else None
    notes = planned_weights(config.recipe, tokenizer_sha256)
    # A dry run may be started by a launcher too: only one rank prints.
    if starts_as_first_rank(os.environ):
        plan = make_plan(config, first_step, notes, hardware)
        if not is_known:
            plan = without_length(plan)
        if options.json_path != "-":
            print_plan(plan)
        write_json(plan.to_dict(), options.json_path)


def _datasets_if_built(recipe: Recipe) -> Datasets | None:
    """Load the recipe's data, and check the names of its mixtures.

    None if some of the data is not there yet.
    """
    folders = data_folders(recipe.data, recipe.data_path)
    if not all(manifest_path(folder).is_file() for folder in folders.values()):
        return None
    datasets = load_datasets(folders)
    if not recipe.data.streaming:
        # A wrong name in a late phase would end a training after hours.
        for phase in loader_plan(with_epoch_samples(recipe, datasets)).phases:
            check_names(phase.mixture, list(datasets.training_shards()), phase.mixture_key)
    return datasets


def _counted(recipe: Recipe, resolved: Recipe) -> Recipe:
    """Return the recipe with the resolved one's length of an epoch."""
    train = recipe.train.model_copy(update={"epoch_samples": resolved.train.epoch_samples})
    return recipe.model_copy(update={"train": train})


def planned_start(recipe: Recipe) -> int:
    """Return the step that a new run starts at: that of ``branch_from``, else 0.

    Args:
        recipe: not resolved; what it leaves open is taken from the parent run.

    Raises:
        CheckpointError: if ``branch_from`` names no checkpoint.
        ConfigError: see :func:`pretrain.run.same_run.check_branch`.
    """
    if recipe.branch_from is None or complete_checkpoints(Path(recipe.output_path) / CHECKPOINTS):
        return 0
    checkpoint = resolve_checkpoint(recipe.branch_from)
    parent = read_run_recipe(checkpoint)
    state = read_state(checkpoint)
    model = recipe.model
    train = recipe.train
    if not model.vocab_size:
        model = model.model_copy(update={"vocab_size": parent.model.vocab_size})
    if train.precision == "auto":
        train = train.model_copy(update={"precision": parent.train.precision})
    if not has_known_length(recipe):
        train = train.model_copy(update={"epoch_samples": parent.train.epoch_samples})
    branch = recipe.model_copy(update={"model": model, "train": train})
    # Ranks and tokenizer are not known yet, so nothing is compared of them.
    check_branch(branch, parent, None, state, checkpoint)
    return state["step"]


def planned_weights(recipe: Recipe, tokenizer_sha256: str | None) -> list[str]:
    """Return sentences about what of ``initial_weights`` differs from the recipe or does not fit.

    Args:
        tokenizer_sha256: of the data's tokenizer; None before there are data.

    Raises:
        CheckpointError: as the run would.
    """
    start = starting_point(recipe, tokenizer_sha256, Path(recipe.output_path) / CHECKPOINTS)
    if start is None:
        return []
    if start.found.is_whole:
        return start.notes
    return [*start.notes, f"{start.where} fits in part: {start.found.counts}"]
