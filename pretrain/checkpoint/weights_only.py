"""A checkpoint of weights alone, without optimizer state.

Evaluation, generation, export and a new training read it like any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.tokenizer.files import same_kind_of
from pretrain.checkpoint import layout
from pretrain.checkpoint.state import CheckpointState
from pretrain.checkpoint.tensor_files import TensorFileWriter
from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.checkpoint.tokenizer_files import read_side_files, write_side_files
from pretrain.checkpoint.weights import WEIGHTS, file_of, is_expert
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import appearing_folder, file_sha256
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM

Shapes = dict[str, tuple[int, ...]]
# By the model's section of a recipe, in JSON.
_known_shapes: dict[str, tuple[Shapes, Shapes]] = {}


def tensor_shapes(model: ModelConfig) -> tuple[Shapes, Shapes]:
    """Return names and shapes of what a checkpoint of ``model`` holds.

    First the dense tensors, then those of all routed experts. A tied head is not among them; the
    vocabulary is padded.
    """
    key = model.model_dump_json()
    if key in _known_shapes:
        return _known_shapes[key]
    # On the meta device a model of any size takes no memory.
    with torch.device("meta"):
        built = DecoderLM(model)
    parameters = dict(built.named_parameters())
    # Buffers that can be computed anew, such as rotary angles, are in no file.
    persistent = built.state_dict(keep_vars=True).keys()
    buffers = {
        name: tuple(buffer.shape) for name, buffer in built.named_buffers() if name in persistent
    }
    dense: Shapes = {}
    experts: Shapes = {}
    for name, parameter in parameters.items():
        (experts if is_expert(parameter) else dense)[name] = tuple(parameter.shape)
    # Each save asks: a model of hundreds of experts in each layer takes seconds to build.
    _known_shapes[key] = dense | buffers, experts
    return _known_shapes[key]


def write_weights_folder(
    folder: Path,
    recipe: Recipe,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None,
    step: int = 0,
) -> None:
    """Write a checkpoint of weights: all of its files, or nothing.

    They are ``recipe.yaml``, the tokenizer, ``weights-*.safetensors``, ``state.json`` and
    ``manifest.json``.

    Args:
        folder: missing or empty; it may have any name.
        recipe: with ``model.vocab_size`` set.
        tensors: name and tensor, as :func:`load_state_dict` returns them, in any order and of any
            floating dtype; written in fp32. They are taken one by one, so that a generator's peak
            memory is that of its largest tensor.
        tokenizer: its file to copy, with the files in its folder that belong to it;
            without one the weights can only be trained on or converted.
        step: optimizer steps behind the weights.

    Raises:
        ConfigError: if ``folder`` is not empty, or the vocabulary is unknown.
        CheckpointError: for a tensor that is missing, comes twice, is unknown or has another shape
            than in the recipe.
        OSError: if the disk is full.
    """
    if recipe.model.vocab_size is None:
        raise ConfigError(
            f"the recipe '{recipe.name}' does not say model.vocab_size: "
            "set it to the tokenizer's number of tokens"
        )
    folder = folder.resolve()
    # An empty folder may be one that the user has made for it.
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: choose another folder")
    with appearing_folder(folder) as temporary:
        fill_weights_folder(temporary, recipe, tensors, tokenizer, step)


def fill_weights_folder(
    folder: Path,
    recipe: Recipe,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None,
    step: int = 0,
) -> None:
    """Do the same in an empty folder that the caller publishes."""
    _write_tensors(folder, recipe.model, tensors)
    (folder / layout.RECIPE).write_text(recipe_to_yaml(recipe), encoding="utf-8")
    if tokenizer is not None:
        if not tokenizer.is_file():
            raise CheckpointError(f"{tokenizer} is missing: give a tokenizer.json")
        shutil.copyfile(tokenizer, folder / same_kind_of(tokenizer))
        write_side_files(read_side_files(tokenizer.parent), folder)
    sha256 = None if tokenizer is None else file_sha256(tokenizer)
    # Empty data mark weights without a run: see is_weights_alone.
    state: CheckpointState = {
        "step": step,
        "consumed_tokens": 0,
        "tokenizer_sha256": sha256,
        "data": {},
    }
    (folder / layout.STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    files = {
        path.relative_to(folder).as_posix(): layout.file_entry(path)
        for path in layout.payload_files(folder)
    }
    layout.write_manifest(folder, files)


def _write_tensors(folder: Path, model: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    dense, experts = tensor_shapes(model)
    forms = {name: TensorForm(torch.float32, shape) for name, shape in (dense | experts).items()}
    with TensorFileWriter(folder / file_of(WEIGHTS, 0, 1), forms) as file:
        for name, tensor in tqdm(tensors, total=len(forms), desc="writing weights", unit="tensor"):
            if name not in forms:
                raise CheckpointError(
                    f"the recipe's model has no tensor '{name}': the weights do not belong to it"
                )
            file.write(name, tensor.to(torch.float32))


def is_weights_alone(state: CheckpointState) -> bool:
    """Whether a checkpoint with this state was written here, and so has no run and no data."""
    return state["data"] == {}
