"""Checkpoints made of a trained tiny one: other weights, another recipe, more expert files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import layout
from pretrain.checkpoint.engine_state import write_tensors
from pretrain.checkpoint.optimizer_state import Stored
from pretrain.checkpoint.tensor_headers import Range
from pretrain.checkpoint.weights import WEIGHTS, file_of, load_state_dict
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


def over_ranks(folder: Path, ranks: int) -> Path:
    """Rewrites the weights of a checkpoint as ``ranks`` ranks with as many parts would have.

    Stacked experts are cut between experts, all other tensors anywhere, as ZeRO cuts them.
    """
    split_weights(folder, ranks)
    seal(folder)
    return folder


def split_weights(folder: Path, ranks: int) -> None:
    """The same, without a new manifest."""
    stored = load_state_dict(folder)
    (folder / file_of(WEIGHTS, 0, 1)).unlink()
    shares: list[list[Stored]] = [[] for _ in range(ranks)]
    for name, tensor in stored.items():
        rows = tensor.shape[0] if ".experts.w" in name else tensor.numel()
        size = tensor.numel() // rows
        bounds = [rows * rank // ranks * size for rank in range(ranks + 1)]
        for rank, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                place = Range(start, tuple(tensor.shape))
                shares[rank].append(Stored(name, tensor.flatten()[start:stop], place))
    for rank, share in enumerate(shares):
        write_tensors(folder / file_of(WEIGHTS, rank, ranks), share)
