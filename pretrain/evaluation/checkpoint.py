"""What has to be true of a checkpoint and of data before either is used."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from pretrain.checkpoint.layout import damage, read_recipe, read_state, resolve_checkpoint
from pretrain.core.errors import CheckpointError, DataError


def whole_checkpoint(path: str | Path) -> Path:
    """The ``step_N`` folder that ``path`` names, with every file as it was saved.

    Raises:
        CheckpointError: if there is none, or a file of it is missing or has changed.
    """
    folder = resolve_checkpoint(path)
    if fault := damage(folder):
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {fault}; choose another step_N folder"
        )
    return folder


def load_matching_corpora(data: str | Path | None, checkpoint: Path) -> Datasets:
    """The data to evaluate on, by default the run's own, checked for the checkpoint's tokenizer.

    Raises:
        DataError: if the shards are missing or damaged, or were made with another tokenizer.
    """
    datasets = load_corpora_of(data) if data is not None else _own_corpora(checkpoint)
    if datasets.tokenizer.sha256 != read_state(checkpoint)["tokenizer_sha256"]:
        raise DataError(
            f"the shards in {datasets.place} were made with another tokenizer than that of"
            f" {checkpoint}: give the run's own data with --data"
        )
    return datasets


def _own_corpora(checkpoint: Path) -> Datasets:
    try:
        recipe = read_recipe(checkpoint)
        return _verified(load_datasets(data_folders(recipe.data, recipe.data_path)))
    except DataError as error:
        raise DataError(
            f"{error}; or give other shards of the checkpoint's tokenizer with --data"
        ) from None


def load_corpora_of(data: str | Path) -> Datasets:
    """One data folder, its files checked.

    Raises:
        DataError: if it holds no data, or files are missing or damaged.
    """
    return _verified(load_datasets({"": str(data)}))


def _verified(datasets: Datasets) -> Datasets:
    datasets.verify()
    return datasets
