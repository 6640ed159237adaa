"""What has to be true of a checkpoint and of data before either is used."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.corpora import Corpora, data_folders, load_corpora
from pretrain.checkpoint.layout import damage, read_recipe, read_state, resolve_checkpoint
from pretrain.config.errors import CheckpointError, DataError


def whole_checkpoint(path: str | Path) -> Path:
    """The ``step_N`` folder that ``path`` names, with every file as it was saved.

    Raises:
        CheckpointError: where there is none, or a file of it is missing or has changed.
    """
    folder = resolve_checkpoint(path)
    if fault := damage(folder):
        raise CheckpointError(f"the checkpoint {folder} is damaged: {fault}; choose another step_N folder")
    return folder


def load_matching_corpora(data: str | Path | None, checkpoint: Path) -> Corpora:
    """The data folder ``data``, by default those of the run, which holds tokens of the checkpoint's own tokenizer.

    Raises:
        DataError: where the shards are missing or damaged, or were made with another tokenizer.
    """
    corpora = load_corpora_of(data) if data is not None else _own_corpora(checkpoint)
    if corpora.tokenizer.sha256 != read_state(checkpoint)["tokenizer_sha256"]:
        raise DataError(
            f"the shards in {corpora.place} were made with another tokenizer than that of {checkpoint}: give the run's own data with --data"
        )
    return corpora


def _own_corpora(checkpoint: Path) -> Corpora:
    try:
        return _verified(load_corpora(data_folders(read_recipe(checkpoint))))
    except DataError as error:
        raise DataError(f"{error}; or give other shards of the checkpoint's tokenizer with --data") from None


def load_corpora_of(data: str | Path) -> Corpora:
    """One data folder, its files checked.

    Raises:
        DataError: where it holds no data, or files are missing or damaged.
    """
    return _verified(load_corpora({"": str(data)}))


def _verified(corpora: Corpora) -> Corpora:
    corpora.verify()
    return corpora
