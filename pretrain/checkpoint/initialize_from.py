"""Training that starts from the weights of a checkpoint, with a fresh optimizer and schedule
(``initial_weights`` in a recipe).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from pretrain.checkpoint.comparison import Comparison, compare, unread_differences
from pretrain.checkpoint.foreign_state_dict import FileWeights, is_weights_file, model_of_config
from pretrain.checkpoint.layout import (
    complete_checkpoints,
    damage,
    read_recipe,
    read_state,
    resolve_checkpoint,
)
from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.checkpoint.weights import global_name
from pretrain.config.differences import differences
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError
from pretrain.core.files import write_synced
from pretrain.core.section import Effect
from pretrain.engine.build import WeightLoader
from pretrain.engine.topology import Topology
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM

REPORT = "initial_weights.json"
SHOWN_ROWS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """The weights that a new run starts from, looked at and not read yet.

    Attributes:
        where: for sentences: ``initial_weights`` and its value.
        folder: the checkpoint that it names; None for a file.
        stored: its weights.
        found: which of them fit.
        notes: a sentence about each field in which the two models differ, or about why that is not
            known.
    """

    where: str
    folder: Path | None
    stored: FileWeights | StoredWeights
    found: Comparison
    notes: list[str]


def starting_point(
    recipe: Recipe, tokenizer_sha256: str | None, checkpoints: Path | None
) -> StartingPoint | None:
    """What ``recipe.initial_weights`` names.

    None without it, and in a run that has a checkpoint of its own.

    A folder is a checkpoint, which says what its model computes and which tokenizer it knows; a
    file says so if its training loop saved its configuration.

    Args:
        tokenizer_sha256: of the data's tokenizer; None before there are data.
        checkpoints: the run's own; None for a run without a folder.

    Raises:
        CheckpointError: if the weights are missing, belong to another tokenizer, or mean something
            else in the recipe's model, and if a tensor does not fit, unless the recipe allows that.
    """
    if recipe.initial_weights is None:
        return None
    if checkpoints is not None and complete_checkpoints(checkpoints):
        return None
    path, where = Path(recipe.initial_weights), f"initial_weights: {recipe.initial_weights}"
    folder: Path | None = None
    stored: FileWeights | StoredWeights
    model: ModelConfig | None
    if is_weights_file(path):
        stored = FileWeights(path, recipe.model)
        model = model_of_config(stored.config, recipe.model)
    else:
        folder = resolve_checkpoint(path)
        if fault := damage(folder, with_hashes=False):
            raise CheckpointError(
                f"initial_weights: {folder} is damaged: {fault}; choose another checkpoint"
            )
        if tokenizer_sha256 is not None and read_state(folder).get("tokenizer_sha256") not in (
            None,
            tokenizer_sha256,
        ):
            raise CheckpointError(
                f"initial_weights: {folder} was trained with another tokenizer than that of the"
                " data: build the data with its own"
            )
        stored, model = StoredWeights(folder), read_recipe(folder).model
    found = compare(stored.shapes, recipe.model)
    if model is not None:
        _check_meaning(model, recipe.model, found, where)
    if not found.loaded or not (found.is_whole or recipe.initial_weights_partial):
        raise CheckpointError(found.first_fault(where))
    return StartingPoint(where, folder, stored, found, _notes(model, recipe.model, where))


def _check_meaning(stored: ModelConfig, wanted: ModelConfig, found: Comparison, where: str) -> None:
    if unread := unread_differences(stored, wanted, found.loaded):
        fields = " and ".join(
            f"{one.path}={one.values[0]}, and the recipe {one.values[1]}" for one in unread
        )
        raise CheckpointError(
            f"{where} has {fields}: its weights would mean something else; make them equal"
        )


def _notes(stored: ModelConfig | None, wanted: ModelConfig, where: str) -> list[str]:
    if stored is None:
        return [
            f"{where} has tensors alone: names and shapes were compared, and nothing says if the"
            " recipe's model computes with them what theirs did (heads, rotary base, activation,"
            " norms, top_k)"
        ]
    training = {Effect.NONE: " (no finished model depends on it)"}
    return [
        f"{where} has {one.path}={one.values[0]}, and the recipe"
        f" {one.values[1]}{training.get(one.effect, '')}"
        for one in differences(stored, wanted)
    ]


def starting_weights(
    recipe: Recipe, tokenizer_sha256: str, checkpoints: Path | None, topology: Topology
) -> WeightLoader | None:
    """What fills a fresh model for ``recipe.initial_weights``.

    None as :func:`starting_point`. Every rank must call it.

    In what the two models differ is reported on standard error and in the log; what does not fit a
    partial start there and in ``initial_weights.json`` of the run's folder, if it has one.

    Raises:
        CheckpointError: as :func:`starting_point`, and if a file is damaged.
    """
    start = starting_point(recipe, tokenizer_sha256, checkpoints)
    if start is None:
        return None
    folder = start.folder
    if folder is not None and (
        faults := [
            fault
            for fault in topology.all_gather(damage(folder, topology.rank, topology.world_size))
            if fault
        ]
    ):
        raise CheckpointError(
            f"initial_weights: {folder} is damaged: {faults[0]}; choose another checkpoint"
        )
    if topology.is_main:
        for note in start.notes:
            print(note, file=sys.stderr)
            logger.info("%s", note)
        if not start.found.is_whole:
            _report(start.found, start.where, checkpoints and checkpoints.parent / REPORT)
    return lambda model, part, parts: fill(
        model, start.stored, part, parts, set(start.found.loaded)
    )


def _report(found: Comparison, where: str, path: Path | None) -> None:
    """The whole list goes into the file, if there is to be one, the beginning of it to the user."""
    place = ""
    if path is not None:
        write_synced(path, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
        place = f"; the whole list is in {path}"
    print(f"{where} fits in part: {found.counts}{place}", file=sys.stderr)
    table = Table(Column("tensor", overflow="fold"), "is", "in the file", "and")
    for row in found.rows()[:SHOWN_ROWS]:
        table.add_row(*row)
    Console(stderr=True).print(table)


@torch.no_grad()
def fill(
    model: DecoderLM,
    stored: Mapping[str, torch.Tensor],
    part: int,
    parts: int,
    names: Collection[str],
) -> None:
    """Copies the weights called ``names`` into a model on the host that has part ``part`` of
    ``parts`` of the experts; a tensor at a time.
    """
    total = model.config.total_experts
    persistent = model.state_dict(keep_vars=True).keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        stored_name = global_name(name, part * (total // parts), model.config)
        if name in persistent and stored_name in names:
            whole = stored[stored_name]
            # A native expert is a tensor of its own; stacked ones lie in order of their rank.
            tensor.copy_(whole if whole.shape == tensor.shape else whole.chunk(parts)[part])
