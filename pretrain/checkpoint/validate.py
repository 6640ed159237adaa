"""Checks that a checkpoint has all weights of its recipe, and each expert once.

Only the headers of the files are read.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.weights import open_weights
from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.core.errors import CheckpointError
from pretrain.model.config import ModelConfig

REMEDY = "the checkpoint is damaged, choose another step_N folder"


def open_whole_weights(folder: Path, model: ModelConfig) -> TensorReader:
    """Open the weights of a checkpoint, if they are exactly those of ``model``.

    Raises:
        CheckpointError: naming the first tensor that is missing, superfluous, in two files or cut
            off, and how many experts there are.
    """
    weights = open_weights(folder)
    dense, experts = tensor_shapes(model)
    names = set(weights.names)
    if missing := sorted((dense.keys() | experts.keys()) - names):
        raise CheckpointError(
            f"the weights in {folder} do not fit its recipe: '{missing[0]}' is missing "
            f"({len(missing)} missing): {REMEDY}"
        )
    if unknown := sorted(names - dense.keys() - experts.keys()):
        raise CheckpointError(
            f"the weights in {folder} do not fit its recipe, which has no '{unknown[0]}' "
            f"({len(unknown)} unknown): {REMEDY}"
        )
    for name, shape in (dense | experts).items():
        _check_shape(weights, name, shape, name in experts)
    return weights


def _check_shape(weights: TensorReader, name: str, shape: tuple[int, ...], is_expert: bool) -> None:
    holders = weights.holders(name)
    files = ", ".join(path.name for path, _ in holders)
    shares = [form.shape for _, form in holders]
    # Stacked experts are in one file for each rank, joined along the first dimension. A tensor that
    # is whole in two files is there twice.
    if len(holders) > 1 and (not is_expert or all(share == shape for share in shares)):
        raise CheckpointError(
            f"the tensor '{name}' is in {files}, and belongs into one of them: {REMEDY}"
        )
    # Shares may differ in their first dimension only.
    if any(share[1:] != shape[1:] for share in shares):
        wrong = next(path for path, form in holders if form.shape[1:] != shape[1:])
        raise CheckpointError(
            f"the tensor '{name}' in {wrong} has rows of {list(shares[0][1:])} instead of "
            f"{list(shape[1:])}: {REMEDY}"
        )
    # A scalar has no first dimension, and nothing left to compare.
    found = sum(share[0] for share in shares) if shape else 0
    if shape and found != shape[0]:
        what = "experts" if is_expert and len(shape) == 3 else "rows"
        each = ", ".join(
            f"{share[0]} in {path.name}" for (path, _), share in zip(holders, shares, strict=True)
        )
        raise CheckpointError(
            f"the tensor '{name}' has {found} of {shape[0]} {what} ({each}): {REMEDY}"
        )
