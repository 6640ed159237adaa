"""Training that starts from the weights of a checkpoint, with a fresh optimizer and schedule (``initial_weights`` in a recipe)."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.checkpoint.layout import complete_checkpoints, damage, read_recipe, read_state, resolve_checkpoint
from pretrain.checkpoint.stored_weights import StoredWeights
from pretrain.checkpoint.weights import global_name
from pretrain.checkpoint.weights_folder import tensor_shapes
from pretrain.config.errors import CheckpointError
from pretrain.config.model_schema import ModelConfig
from pretrain.config.schema import Recipe
from pretrain.engine.engine import Fill
from pretrain.engine.topology import Topology
from pretrain.model.decoder import DecoderLM

# Other kinds of these may have tensors of the same names and shapes, and compute something else with them.
FAMILIES = ("attention", "norm", "feed_forward", "moe")


def starting_weights(recipe: Recipe, tokenizer_sha256: str, checkpoints: Path, topology: Topology) -> Fill | None:
    """What fills a fresh model for ``recipe.initial_weights``; None without it, and in a run that has a checkpoint of its own.

    Every rank must call it.

    Raises:
        CheckpointError: where the checkpoint is missing or damaged, or belongs to another tokenizer or another kind of model.
    """
    if recipe.initial_weights is None or complete_checkpoints(checkpoints):
        return None
    folder = resolve_checkpoint(recipe.initial_weights)
    if faults := [fault for fault in topology.gather(damage(folder, topology.rank, topology.world_size)) if fault]:
        raise CheckpointError(f"initial_weights: {folder} is damaged: {faults[0]}; choose another checkpoint")
    if read_state(folder).get("tokenizer_sha256") not in (None, tokenizer_sha256):
        raise CheckpointError(f"initial_weights: {folder} was trained with another tokenizer than that of the data: build the data with its own")
    check_same_kinds(recipe.model, read_recipe(folder).model, f"initial_weights: {folder}")
    stored = StoredWeights(folder)
    check_shapes(stored, recipe.model, f"initial_weights: {folder}")
    return lambda model, part, parts: fill(model, stored, part, parts)


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


def check_shapes(stored: StoredWeights, model: ModelConfig, where: str) -> None:
    """Raises :class:`CheckpointError` for the first tensor that is missing, superfluous or of another shape than ``model`` says."""
    dense, experts = tensor_shapes(model)
    shapes = dense | experts
    for name in sorted(shapes.keys() | stored.keys()):
        if name not in stored:
            raise CheckpointError(f"{where} has no tensor '{name}', which the recipe's model has: change the recipe's model, or choose another")
        if name not in shapes:
            raise CheckpointError(f"{where} has a tensor '{name}', which the recipe's model has not: change the recipe's model, or choose another")
        if stored.shapes[name] != shapes[name]:
            raise CheckpointError(
                f"{where}: the tensor '{name}' is {list(stored.shapes[name])}, and the recipe's model wants {list(shapes[name])}: "
                "change the recipe's model, or choose another"
            )


@torch.no_grad()
def fill(model: DecoderLM, stored: StoredWeights, part: int, parts: int) -> None:
    """Copies the weights into a model on the host that has part ``part`` of ``parts`` of the experts; a tensor at a time."""
    total = model.config.moe.total_experts if model.config.moe is not None else 0
    persistent = model.state_dict(keep_vars=True).keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in persistent:
            whole = stored[global_name(name, part * (total // parts))]
            # A native expert is a tensor of its own; stacked ones lie in order of their rank.
            tensor.copy_(whole if whole.shape == tensor.shape else whole.chunk(parts)[part])
