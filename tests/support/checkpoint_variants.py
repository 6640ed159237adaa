"""Checkpoints made of a trained tiny one: other weights, another recipe, more expert files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint import layout
from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.checkpoint.weights import EXPERTS_FILE, load_state_dict
from pretrain.checkpoint.weights_only import write_weights_folder
from pretrain.config.load import apply_override, validate_recipe
from pretrain.config.recipe import Recipe
from tests.support.tiny_checkpoint import Trained, seal

Edit = Callable[[dict[str, Tensor]], None]


def changed_recipe(recipe: Recipe, *overrides: str) -> Recipe:
    content = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(content, override)
    return validate_recipe(content, "a test's recipe")


def variant(
    trained: Trained, folder: Path, edit: Edit | None = None, *overrides: str, step: int = 1
) -> Path:
    """A folder of weights: the trained ones after ``edit``, with a recipe after ``overrides``."""
    tensors = load_state_dict(trained.checkpoint)
    if edit is not None:
        edit(tensors)
    write_weights_folder(
        folder,
        changed_recipe(trained.recipe, *overrides),
        tensors.items(),
        trained.checkpoint / layout.TOKENIZER,
        step,
    )
    return folder


def shaken(seed: int, size: float = 0.02) -> Edit:
    """Adds normal noise to every tensor."""

    def edit(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in tensors.items():
            tensors[name] = tensor + size * torch.empty_like(tensor).normal_(generator=generator)

    return edit


def over_ranks(folder: Path, ep_size: int) -> Path:
    """Rewrites the expert file of a checkpoint as ``ep_size`` ranks would have written it."""
    stored = StoredWeights(folder)
    (whole,) = folder.glob("weights-experts-*")
    experts = {name: stored[name].clone() for name in stored if ".experts.w" in name}
    whole.unlink()
    for part in range(ep_size):
        parts = {name: tensor.chunk(ep_size)[part].contiguous() for name, tensor in experts.items()}
        save_file(parts, folder / EXPERTS_FILE.format(part=part, parts=ep_size))
    seal(folder)
    return folder
