"""The fp32 weights of a checkpoint, in safetensors, with experts numbered over all ranks.

Each rank writes a file of what it holds; ``places.py`` says how that is named.

Evaluation, export and generation read them, without DeepSpeed and without pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.tensor_shards import shard_of

WEIGHTS = "weights"
OPTIMIZER = "optimizer"
RANK = "rank"
_NAME = re.compile(r"^(?P<kind>[a-z]+)-\d{5}-of-(?P<parts>\d{5})\.safetensors$")


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's layers marked a parameter as belonging to routed experts."""
    return not getattr(parameter, "allreduce", True) and shard_of(parameter) is None


def global_name(name: str, first_expert: int, model: ModelConfig) -> str:
    """Return a tensor's name in files, which number experts over all ranks.

    In a model, layers that name each expert number those of this rank from 0.

    Args:
        first_expert: the number over all ranks of this rank's first expert.
    """
    return name if model.moe is None else model.moe.renumbered(name, lambda n: n + first_expert)


def file_of(kind: str, part: int, parts: int) -> str:
    """Return the name of the file that rank ``part`` of ``parts`` writes.

    Args:
        kind: ``WEIGHTS``, ``OPTIMIZER`` or ``RANK``.
    """
    return f"{kind}-{part:05d}-of-{parts:05d}.safetensors"


def files_of(folder: Path, kind: str) -> list[Path]:
    """Return the files of one kind that all ranks have written, in the order of the ranks.

    Raises:
        CheckpointError: if files are missing, or of another number of ranks than the others.
    """
    found = {
        path.name: int(match["parts"])
        for path in sorted(folder.iterdir())
        if (match := _NAME.match(path.name)) and match["kind"] == kind
    }
    # Files of two numbers of ranks: somebody has copied one checkpoint over another.
    counts = sorted(set(found.values()))
    if len(counts) > 1:
        strays = ", ".join(name for name, parts in found.items() if parts == counts[0])
        raise CheckpointError(
            f"{folder} has {kind} files of {' and of '.join(map(str, counts))} ranks "
            f"({strays} among them): remove those that do not belong there, or choose another "
            "step_N folder"
        )
    parts = counts[0] if counts else 1
    # A damaged name may claim any number of ranks.
    if parts != len(found):
        missing = next(
            name for part in range(parts) if (name := file_of(kind, part, parts)) not in found
        )
        raise CheckpointError(
            f"{folder} has {len(found)} of {parts} {kind} files, {missing} is missing: the "
            "checkpoint is damaged, choose another step_N folder"
        )
    return [folder / file_of(kind, part, parts) for part in range(parts)]


def open_weights(folder: Path) -> TensorReader:
    """Open all weights of a checkpoint in fp32, to be read one by one.

    What the ranks have written is joined, which is the state of a model at ep_size 1: stacked
    experts in one tensor, native ones each under its name.

    Raises:
        CheckpointError: for a file that is missing, damaged, or of another number of ranks than the
            others, and for a tensor of which a part is missing.
    """
    return TensorReader(files_of(folder, WEIGHTS))


def load_state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights that :func:`open_weights` opens."""
    weights = open_weights(folder)
    return {name: weights.read(name) for name in weights.names}


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    recipe: Recipe | None = None,
) -> tuple[DecoderLM, Recipe]:
    """Load the whole model of a checkpoint on one device, in evaluation mode.

    Args:
        recipe: to compute with; by default the one that it was trained with.

    Returns:
        The model and its recipe.

    Raises:
        CheckpointError: if weights are missing, superfluous or of another shape than in the recipe.
    """
    recipe = recipe or read_recipe(folder)
    # Kernels do not belong to a model: those that it was trained with may need a package or a
    # device that is not here.
    model = DecoderLM(recipe.model.portable())
    weights = load_state_dict(folder)
    # named_parameters() lists a shared tensor once, under the embedding's name.
    if recipe.model.tie_word_embeddings:
        weights.setdefault("head.weight", weights["embedding.weight"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {folder} do not fit its recipe: {' '.join(str(error).split())[:400]}"
        ) from None
    return model.to(device, dtype).eval(), recipe
