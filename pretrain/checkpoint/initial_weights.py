"""Training that starts from the weights of a checkpoint, with a fresh optimizer and schedule (``initial_weights`` in a recipe)."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from pretrain.checkpoint.comparison import Comparison, compare
from pretrain.checkpoint.file_weights import FileWeights
from pretrain.checkpoint.layout import complete_checkpoints, damage, read_recipe, read_state, resolve_checkpoint
from pretrain.checkpoint.stored_weights import StoredWeights
from pretrain.checkpoint.weights import global_name
from pretrain.config.durable import write_synced
from pretrain.config.errors import CheckpointError
from pretrain.config.model_schema import ModelConfig
from pretrain.config.schema import Recipe
from pretrain.engine.engine import Fill
from pretrain.engine.topology import Topology
from pretrain.model.decoder import DecoderLM

# Other kinds of these may have tensors of the same names and shapes, and compute something else with them.
FAMILIES = ("attention", "norm", "feed_forward", "moe")
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
REPORT = "initial_weights.json"
SHOWN_ROWS = 20


def starting_weights(recipe: Recipe, tokenizer_sha256: str, checkpoints: Path, topology: Topology) -> Fill | None:
    """What fills a fresh model for ``recipe.initial_weights``; None without it, and in a run that has a checkpoint of its own.

    A folder is a checkpoint, which says of what kind its model is and which tokenizer it knows; a file has names and shapes alone. What does not
    fit a partial start is told on standard error and in ``initial_weights.json`` of the run's folder. Every rank must call it.

    Raises:
        CheckpointError: where the weights are missing or damaged, or belong to another tokenizer or another kind of model, and where a tensor
            does not fit, unless the recipe allows that.
    """
    if recipe.initial_weights is None or complete_checkpoints(checkpoints):
        return None
    path, where = Path(recipe.initial_weights), f"initial_weights: {recipe.initial_weights}"
    of_file = path.suffix in FILES and not path.is_dir()
    stored: FileWeights | StoredWeights
    stored = FileWeights(path, recipe.model) if of_file else StoredWeights(_checked_folder(recipe, tokenizer_sha256, topology))
    found = compare(stored.shapes, recipe.model)
    if not found.loaded or not (found.is_whole or recipe.initial_weights_partial):
        raise CheckpointError(found.first_fault(where))
    if not found.is_whole and topology.is_main:
        _report(found, where, checkpoints.parent / REPORT)
    return lambda model, part, parts: fill(model, stored, part, parts, set(found.loaded))


def _checked_folder(recipe: Recipe, tokenizer_sha256: str, topology: Topology) -> Path:
    assert recipe.initial_weights is not None
    folder = resolve_checkpoint(recipe.initial_weights)
    if faults := [fault for fault in topology.gather(damage(folder, topology.rank, topology.world_size)) if fault]:
        raise CheckpointError(f"initial_weights: {folder} is damaged: {faults[0]}; choose another checkpoint")
    if read_state(folder).get("tokenizer_sha256") not in (None, tokenizer_sha256):
        raise CheckpointError(f"initial_weights: {folder} was trained with another tokenizer than that of the data: build the data with its own")
    check_same_kinds(recipe.model, read_recipe(folder).model, f"initial_weights: {folder}")
    return folder


def _report(found: Comparison, where: str, path: Path) -> None:
    """The whole list goes into the file, the beginning of it to the user."""
    write_synced(path, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    print(f"{where} fits in part: {found.counts}; the whole list is in {path}", file=sys.stderr)
    table = Table(Column("tensor", overflow="fold"), "is", "in the file", "and")
    for row in found.rows()[:SHOWN_ROWS]:
        table.add_row(*row)
    Console(stderr=True).print(table)


def check_same_kinds(wanted: ModelConfig, stored: ModelConfig, where: str) -> None:
    """Raises :class:`CheckpointError` where the same tensors would compute something else."""
    pairs = {name: (getattr(stored, name), getattr(wanted, name)) for name in FAMILIES}
    if not (stored.routed_layers and wanted.routed_layers):
        del pairs["moe"]
    for name, (before, after) in pairs.items():
        if before.kind != after.kind:
            raise CheckpointError(f"{where} has model.{name}.kind={before.kind}, and the recipe {after.kind}: make them equal")
    if stored.norm_position != wanted.norm_position:
        raise CheckpointError(f"{where} has model.norm_position={stored.norm_position}, and the recipe {wanted.norm_position}: make them equal")
    for trait in ("rotary", "alibi"):
        if getattr(stored.position, trait) != getattr(wanted.position, trait):
            raise CheckpointError(
                f"{where} has model.position.kind={stored.position.kind}, and the recipe {wanted.position.kind}, "  # type: ignore[attr-defined]
                "which says otherwise where a token stands: make them equal"
            )


@torch.no_grad()
def fill(model: DecoderLM, stored: Mapping[str, torch.Tensor], part: int, parts: int, names: Collection[str]) -> None:
    """Copies the weights called ``names`` into a model on the host that has part ``part`` of ``parts`` of the experts; a tensor at a time."""
    total = model.config.moe.total_experts if model.config.moe is not None else 0
    persistent = model.state_dict(keep_vars=True).keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        stored_name = global_name(name, part * (total // parts))
        if name in persistent and stored_name in names:
            whole = stored[stored_name]
            # A native expert is a tensor of its own; stacked ones lie in order of their rank.
            tensor.copy_(whole if whole.shape == tensor.shape else whole.chunk(parts)[part])
