"""Starts a training from given weights, with a fresh optimizer and schedule.

A recipe names them as ``initial_weights``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
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
from pretrain.checkpoint.publication import first_fault
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
from pretrain.model.init import RangeReader

REPORT = "initial_weights.json"
SHOWN_ROWS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """The weights that a new run starts from; they are compared, and not read yet.

    Attributes:
        where: for sentences: ``initial_weights`` and its value.
        folder: the checkpoint that it names; None for a file.
        stored: its weights.
        found: which of them fit.
        notes: a sentence about each field in which the two models differ, or about why nothing is
            known of that.
    """

    where: str
    folder: Path | None
    stored: FileWeights | StoredWeights
    found: Comparison
    notes: list[str]


def starting_point(
    recipe: Recipe, tokenizer_sha256: str | None, checkpoints: Path | None
) -> StartingPoint | None:
    """Open what ``recipe.initial_weights`` names, and compare it with the recipe's model.

    None without it, and in a run that has a checkpoint already. A folder is a checkpoint, whose
    recipe says what its model computes and which tokenizer it has; a file says so if its training
    loop saved its configuration.

    Args:
        tokenizer_sha256: of the data's tokenizer; None before there are data.
        checkpoints: the folder of the run's checkpoints; None for a run without a folder.

    Raises:
        CheckpointError: if the weights are missing, belong to another tokenizer, or mean something
            else in the recipe's model; and if a tensor does not fit, unless the recipe allows that.
    """
    if recipe.initial_weights is None:
        return None
    # A resumed run has weights already, and need not have the old ones at hand.
    if checkpoints is not None and complete_checkpoints(checkpoints):
        return None
    path = Path(recipe.initial_weights)
    where = f"initial_weights: {recipe.initial_weights}"
    folder: Path | None = None
    stored: FileWeights | StoredWeights
    model: ModelConfig | None
    if is_weights_file(path):
        stored = FileWeights(path, recipe.model)
        model = model_of_config(stored.config, recipe.model)
    else:
        folder = resolve_checkpoint(path)
        _check_checkpoint(folder, tokenizer_sha256)
        stored = StoredWeights(folder)
        model = read_recipe(folder).model
    found = compare(stored.shapes, recipe.model)
    # First the meaning: weights that fit by shape and compute something else are the worse mistake.
    if model is not None:
        _check_meaning(model, recipe.model, found, where)
    # A start from nothing that fits would be a start from random weights in silence.
    if not found.loaded or not (found.is_whole or recipe.initial_weights_partial):
        raise CheckpointError(found.first_fault(where))
    return StartingPoint(where, folder, stored, found, _notes(model, recipe.model, where))


def _check_checkpoint(folder: Path, tokenizer_sha256: str | None) -> None:
    # Sizes only: starting_weights hashes the files, shared among the ranks.
    if fault := damage(folder, with_hashes=False):
        raise CheckpointError(
            f"initial_weights: {folder} is damaged: {fault}; choose another checkpoint"
        )
    if tokenizer_sha256 is None:
        return
    # Weights that were converted without a tokenizer name none.
    if read_state(folder).get("tokenizer_sha256") not in (None, tokenizer_sha256):
        raise CheckpointError(
            f"initial_weights: {folder} was trained with another tokenizer than that of the data: "
            "build the data with the checkpoint's tokenizer"
        )


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
            f"{where} has tensors alone: names and shapes were compared, and nothing says if the "
            "recipe's model computes with them what theirs did (heads, rotary base, activation, "
            "norms, top_k)"
        ]
    in_training_only = {Effect.NONE: " (no finished model depends on it)"}
    return [
        f"{where} has {one.path}={one.values[0]}, "
        f"and the recipe {one.values[1]}{in_training_only.get(one.effect, '')}"
        for one in differences(stored, wanted)
    ]


def starting_weights(
    recipe: Recipe, tokenizer_sha256: str, checkpoints: Path | None, topology: Topology
) -> WeightLoader | None:
    """Return a function that reads a fresh model from ``recipe.initial_weights``.

    None if :func:`starting_point` is. Differences between the two models are reported on standard
    error and in the log. For a partial start, what does not fit is reported there and in
    ``initial_weights.json`` of the run's folder, if it has one. Every rank must call it.

    Raises:
        CheckpointError: as :func:`starting_point`, and if a file is damaged.
    """
    start = starting_point(recipe, tokenizer_sha256, checkpoints)
    if start is None:
        return None
    folder = start.folder
    if folder is not None and (fault := first_fault(folder, topology)):
        raise CheckpointError(
            f"initial_weights: {folder} is damaged: {fault}; choose another checkpoint"
        )
    if topology.is_main:
        for note in start.notes:
            print(note, file=sys.stderr)
            logger.info("%s", note)
        if not start.found.is_whole:
            _report(start.found, start.where, checkpoints and checkpoints.parent / REPORT)
    # Read later, tensor by tensor, when each rank knows its part of the model.
    return lambda model, part, parts: stored_readers(
        model, start.stored, part, parts, set(start.found.loaded)
    )


def _report(found: Comparison, where: str, path: Path | None) -> None:
    """Write the whole list to the file, if there is a path, and show its beginning to the user."""
    place = ""
    if path is not None:
        write_synced(path, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
        place = f"; the whole list is in {path}"
    print(f"{where} fits in part: {found.counts}{place}", file=sys.stderr)
    table = Table(Column("tensor", overflow="fold"), "is", "in the file", "and")
    for row in found.rows()[:SHOWN_ROWS]:
        table.add_row(*row)
    Console(stderr=True).print(table)


def stored_readers(
    model: DecoderLM,
    stored: FileWeights | StoredWeights,
    part: int,
    parts: int,
    names: Collection[str],
) -> dict[str, RangeReader]:
    """Readers of stored weights, by their names in a model.

    Args:
        model: with part ``part`` of ``parts`` of the experts. Its parameters may have no values.
        names: of the stored tensors that are read.
    """
    total = model.config.total_experts
    # Balancing biases are buffers, and belong to the weights; rotary angles do not.
    persistent = model.state_dict(keep_vars=True).keys()
    readers: dict[str, RangeReader] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        stored_name = global_name(name, part * (total // parts), model.config)
        if name not in persistent or stored_name not in names:
            continue
        # A native expert is one tensor. Stacked ones are in the order of their ranks, along the
        # first dimension.
        is_whole = tuple(stored.shapes[stored_name]) == tuple(tensor.shape)
        before = 0 if is_whole else part * tensor.numel()
        readers[name] = partial(_read_from, stored, stored_name, before)
    return readers


def _read_from(
    stored: FileWeights | StoredWeights, name: str, before: int, start: int, stop: int
) -> torch.Tensor:
    """The elements ``start`` to ``stop`` of what follows the first ``before`` elements."""
    return stored.read_range(name, before + start, before + stop)
