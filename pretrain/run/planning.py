"""The command's ``--dry-run``: resolves a run for any number of ranks, and prints it."""

from __future__ import annotations

import argparse
import os
from typing import Any

from data_pipeline.loading.mixture import check_names
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.manifest import manifest_path
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.cli import write_json
from pretrain.engine.ds_config import resolve_ds_config, zero_stage_of
from pretrain.engine.topology import starts_as_first_rank, world_size_from_environment
from pretrain.run.build import resolve_recipe
from pretrain.run.dry_run import (
    hardware_of,
    make_plan,
    planned_precision,
    planned_start,
    planned_weights,
    print_plan,
)


def plan_run(options: argparse.Namespace, recipe: Recipe, ds_config: dict[str, Any]) -> None:
    """Print what a run would be, and write it as JSON if ``options`` ask for that.

    Raises:
        ConfigError, DataError, CheckpointError: as the run would, as far as nothing has to be
            started for it.
    """
    world_size = options.world_size or max(
        world_size_from_environment(os.environ), recipe.parallel.ep_size
    )
    zero_stage = zero_stage_of(ds_config, options.ds_config)
    datasets = _datasets_if_built(recipe)
    accumulation = check_topology(recipe, world_size, zero_stage)
    hardware = hardware_of(options)
    precision = planned_precision(recipe.train.precision, hardware)
    first_step = planned_start(recipe)
    recipe = resolve_recipe(recipe, precision, datasets)
    resolved = resolve_ds_config(
        ds_config, options.ds_config, recipe, precision, accumulation, world_size
    )
    notes = planned_weights(recipe, datasets.tokenizer.sha256 if datasets else None)
    if starts_as_first_rank(os.environ):
        plan = make_plan(
            recipe, resolved, precision, world_size, zero_stage, first_step, notes, hardware
        )
        if options.json_path != "-":
            print_plan(plan, recipe)
        write_json(plan, options.json_path)


def _datasets_if_built(recipe: Recipe) -> Datasets | None:
    """The recipe's data, with the names of its mixtures checked.

    None if some of it is not there yet.
    """
    folders = data_folders(recipe.data, recipe.data_path)
    if not all(manifest_path(folder).is_file() for folder in folders.values()):
        return None
    datasets = load_datasets(folders)
    if not recipe.data.streaming:
        for phase in loader_plan(recipe).phases:
            check_names(phase.mixture, list(datasets.training_shards()), phase.mixture_key)
    return datasets
