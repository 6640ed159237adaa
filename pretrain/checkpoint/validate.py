"""Checks that a checkpoint has all weights of its recipe.

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
        CheckpointError: naming the first tensor that is missing, superfluous, in two files, cut off
            or of another shape.
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
        found = weights.form(name).shape
        if found != shape:
            files = ", ".join(share.path.name for share in weights.shares(name))
            raise CheckpointError(
                f"the tensor '{name}' in {files} is {list(found)} instead of {list(shape)}: {REMEDY}"
            )
    return weights
