"""What a run's length needs of its data: the samples of an epoch, and their packing."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.loading.epoch import epoch_samples
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.manifest import manifest_path
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import LENGTH_RULES
from pretrain.config.timeline import block_tokens, has_known_length


def with_known_length(recipe: Recipe) -> Recipe:
    """Return the recipe with its length counted in its data; as it is if they are not there."""
    if recipe.train.epochs is None:
        return recipe
    folders = data_folders(recipe.data, recipe.data_path)
    if not all(manifest_path(folder).is_file() for folder in folders.values()):
        return recipe
    return with_epoch_samples(recipe, load_datasets(folders))


def with_epoch_samples(recipe: Recipe, datasets: Datasets) -> Recipe:
    """Return the recipe with ``train.epoch_samples`` of these data, if it is given in epochs.

    Raises:
        ConfigError: if warm-up or phases do not fit the length that follows.
        DataError: if there is nothing to train on.
    """
    if recipe.train.epochs is None:
        return recipe
    samples = epoch_samples(datasets, recipe.data, block_tokens(recipe))
    # A split shorter than one sample is refused by the loader, in its own words.
    train = recipe.train.model_copy(update={"epoch_samples": max(samples, 1)})
    recipe = recipe.model_copy(update={"train": train})
    for rule in LENGTH_RULES:
        rule(recipe)
    return recipe


def with_placeholder_length(recipe: Recipe) -> Recipe:
    """Return the recipe with some length: for figures that do not depend on it."""
    if has_known_length(recipe):
        return recipe
    # Above what the phases take, and above the warm-up.
    tokens = sum(phase.tokens or 0 for phase in recipe.phases)
    steps = recipe.schedule.warmup_steps + 2
    samples = tokens // block_tokens(recipe) + steps * recipe.train.global_batch_size
    largest = max(
        [recipe.train.global_batch_size, *(phase.global_batch_size or 1 for phase in recipe.phases)]
    )
    epochs = recipe.train.epochs or 1.0
    update = {"epoch_samples": int((samples + 2 * largest * steps) / epochs) + 1}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def pack_if_planned(recipe: Recipe, path: Path) -> dict[str, float] | None:
    """Pack the shards in a folder for the recipe's sequence length, if its packing is planned.

    Training would do it at its start. Returns the shares of padding and of cut documents.
    """
    if not recipe.data.packing.is_planned:
        return None
    # It needs torch, which takes seconds to import.
    from data_pipeline.loading.packing import prepare_packing

    datasets = load_datasets({"": str(path)})
    packed = prepare_packing(datasets, recipe.data, block_tokens(recipe), progress=True)
    if packed is None:
        return None
    return {"padding_share": packed.padding_share, "truncated_share": packed.truncated_share}
