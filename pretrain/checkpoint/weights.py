"""The fp32 weights of a checkpoint, in safetensors, with experts numbered over all ranks.

Evaluation, export and generation read them, without DeepSpeed and without pickles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM

DENSE_FILE = "weights-dense.safetensors"
EXPERTS_FILE = "weights-experts-{part:05d}-of-{parts:05d}.safetensors"
_EXPERTS_NAME = re.compile(r"^weights-experts-(\d{5})-of-(\d{5})\.safetensors$")


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's layers marked a parameter as belonging to routed experts."""
    return not getattr(parameter, "allreduce", True)


def global_name(name: str, first_expert: int, model: ModelConfig) -> str:
    """Return a tensor's name in files, which number experts over all ranks.

    In a model, layers that name each expert number those of this rank from 0.

    Args:
        first_expert: the number over all ranks of this rank's first expert.
    """
    return name if model.moe is None else model.moe.renumbered(name, lambda n: n + first_expert)


def write_weights(
    folder: Path,
    model: DecoderLM,
    master_weight: Callable[[nn.Parameter], torch.Tensor],
    rank: int,
    ep_size: int,
    num_experts: int,
    tables: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the fp32 weights.

    Rank 0 writes what is replicated; ranks 0 to ep_size - 1, which hold one full set of experts,
    write the experts. Every rank must call it, because gathering a sharded weight is collective.

    Args:
        master_weight: returns a parameter's whole fp32 weight.
        ep_size: ranks that share one set of experts.
        num_experts: of each layer, over all ranks.
        tables: this rank's part of expert tables, which are no parameters of the model while it is
            trained.
    """
    # contiguous(): safetensors stores memory as it is, and refuses strides.
    dense: dict[str, torch.Tensor] = {}
    experts: dict[str, torch.Tensor] = {}
    # Expert-parallel groups are neighbouring ranks: rank % ep_size is the place in the group.
    first_expert = rank % ep_size * (num_experts // ep_size)
    for name, parameter in model.named_parameters():
        # Collective at ZeRO 3: also for weights that this rank does not write.
        weight = master_weight(parameter)
        if is_expert(parameter) and rank < ep_size:
            stored_name = global_name(name, first_expert, model.config)
            experts[stored_name] = weight.to("cpu", torch.float32).contiguous()
        elif not is_expert(parameter) and rank == 0:
            dense[name] = weight.to("cpu", torch.float32).contiguous()
    # Tables belong to the optimizer during training, so they are no parameters.
    if rank < ep_size:
        experts |= {name: table.cpu() for name, table in (tables or {}).items()}
    # Buffers such as the routers' balancing biases.
    persistent = model.state_dict(keep_vars=True).keys()
    if rank == 0:
        dense |= {
            name: buffer.to("cpu", torch.float32)
            for name, buffer in model.named_buffers()
            if name in persistent
        }
    if dense:
        save_file(dense, folder / DENSE_FILE)
    if experts:
        save_file(experts, folder / EXPERTS_FILE.format(part=rank, parts=ep_size))


def open_weights(folder: Path) -> TensorReader:
    """Open all weights of a checkpoint in fp32, to be read one by one.

    The experts of all ranks are joined, which is the state of a model at ep_size 1: stacked experts
    in the order of their ranks, native ones each under its name.

    Raises:
        CheckpointError: for a file that is missing, damaged, or of another number of ranks than the
            others.
    """
    numbers = [
        match for path in sorted(folder.iterdir()) if (match := _EXPERTS_NAME.match(path.name))
    ]
    # Files of two numbers of ranks: somebody has copied one checkpoint over another.
    counts = sorted({int(match[2]) for match in numbers})
    if len(counts) > 1:
        strays = ", ".join(match[0] for match in numbers if int(match[2]) == counts[0])
        raise CheckpointError(
            f"{folder} has expert files of {' and of '.join(map(str, counts))} ranks "
            f"({strays} among them): remove those that do not belong there, or choose another "
            "step_N folder"
        )
    expected = [
        EXPERTS_FILE.format(part=part, parts=count) for count in counts for part in range(count)
    ]
    if missing := [name for name in expected if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} has {len(expected) - len(missing)} of {len(expected)} expert files, "
            f"{', '.join(missing)} is missing: the checkpoint is damaged, choose another step_N "
            "folder"
        )
    return TensorReader(folder / name for name in (DENSE_FILE, *expected))


def load_state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights that :func:`open_weights` opens."""
    weights = open_weights(folder)
    return {name: weights.read(name) for name in weights.names}


def read_experts_part(folder: Path, part: int, parts: int) -> dict[str, torch.Tensor]:
    """Read what :func:`write_weights` wrote of the experts of rank ``part`` of ``parts``."""
    weights = TensorReader([folder / EXPERTS_FILE.format(part=part, parts=parts)])
    return {name: weights.read(name) for name in weights.names}


def load_model(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DecoderLM, Recipe]:
    """Load the whole model of a checkpoint on one device, in evaluation mode.

    Returns:
        The model, and the recipe that it was trained with.

    Raises:
        CheckpointError: if weights are missing, superfluous or of another shape than in the recipe.
    """
    recipe = read_recipe(folder)
    # The kernel does not belong to a model: the one that it was trained with may need a package or
    # a device that is not here.
    attention = recipe.model.attention.model_copy(update={"kernel": "sdpa"})
    model = DecoderLM(recipe.model.model_copy(update={"attention": attention}))
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
