"""A checkpoint of weights alone, without optimizer state: what evaluation, generation, export and a
new training read like any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.checkpoint import layout
from pretrain.checkpoint.tensor_files import TensorFileWriter, TensorForm
from pretrain.checkpoint.tokenizer_files import read_side_files, write_side_files
from pretrain.checkpoint.weights import DENSE_FILE, EXPERTS_FILE, is_expert
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import appearing_folder, file_sha256
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM


def tensor_shapes(
    model: ModelConfig,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of what a checkpoint of ``model`` holds: first the dense tensors, then those
    of all routed experts.

    A tied head is not among them; the vocabulary is padded.
    """
    with torch.device("meta"):
        built = DecoderLM(model)
    parameters = dict(built.named_parameters())
    persistent = built.state_dict(keep_vars=True).keys()
    buffers = {
        name: tuple(buffer.shape) for name, buffer in built.named_buffers() if name in persistent
    }
    dense = {
        name: tuple(parameter.shape)
        for name, parameter in parameters.items()
        if not is_expert(parameter)
    }
    return dense | buffers, {
        name: tuple(parameter.shape)
        for name, parameter in parameters.items()
        if is_expert(parameter)
    }


def write_weights_folder(
    folder: Path,
    recipe: Recipe,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None,
    step: int = 0,
) -> None:
    """Writes ``recipe.yaml``, ``tokenizer.json``, ``weights-*.safetensors``, ``state.json`` and
    ``manifest.json``: all of them, or nothing.

    Args:
        folder: missing or empty; any name.
        recipe: with ``model.vocab_size`` set.
        tensors: name and tensor, as :func:`load_state_dict` gives them, in any order and of any
            floating dtype; written in fp32. They are taken one by one, so that a generator's peak
            memory is that of its largest tensor.
        tokenizer: a ``tokenizer.json`` to copy, with the files in its folder that belong to it;
            without one the weights can only be trained on or converted.

    Raises:
        ConfigError: where ``folder`` is not empty, or the vocabulary is unknown.
        CheckpointError: for a tensor that is missing, comes twice, is unknown or has another shape
            than the recipe says.
        OSError: where the disk is full.
    """
    if recipe.model.vocab_size is None:
        raise ConfigError(
            f"the recipe '{recipe.name}' does not say model.vocab_size: set it to the tokenizer's"
            " number of tokens"
        )
    folder = folder.resolve()
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
    """As :func:`write_weights_folder`, for a caller who gives an empty folder and publishes it."""
    _write_tensors(folder, recipe.model, tensors)
    (folder / layout.RECIPE).write_text(recipe_to_yaml(recipe), encoding="utf-8")
    if tokenizer is not None:
        if not tokenizer.is_file():
            raise CheckpointError(f"{tokenizer} is missing: give a tokenizer.json")
        shutil.copyfile(tokenizer, folder / layout.TOKENIZER)
        write_side_files(read_side_files(tokenizer.parent), folder)
    sha256 = None if tokenizer is None else file_sha256(tokenizer)
    state: dict[str, object] = {
        "step": step,
        "consumed_tokens": 0,
        "tokenizer_sha256": sha256,
        "data": {},
    }
    (folder / layout.STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in layout.payload_files(folder)
    }
    (folder / layout.MANIFEST).write_text(
        json.dumps({"version": 1, "files": files}, indent=2), encoding="utf-8"
    )


def _write_tensors(folder: Path, model: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    dense, experts = tensor_shapes(model)
    with ExitStack() as files:
        writers: dict[str, TensorFileWriter] = {}
        for file, shapes in ((DENSE_FILE, dense), (EXPERTS_FILE.format(part=0, parts=1), experts)):
            if shapes:
                forms = {name: TensorForm(torch.float32, shape) for name, shape in shapes.items()}
                writer = files.enter_context(TensorFileWriter(folder / file, forms))
                writers |= dict.fromkeys(shapes, writer)
        for name, tensor in tqdm(
            tensors, total=len(writers), desc="writing weights", unit="tensor"
        ):
            if name not in writers:
                raise CheckpointError(
                    f"the recipe's model has no tensor '{name}': the weights do not belong to it"
                )
            writers[name].write(name, tensor.to(torch.float32))


def is_weights_alone(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this ``state.json`` was written here, so that no run's data belong
    to it.
    """
    return state["data"] == {}
