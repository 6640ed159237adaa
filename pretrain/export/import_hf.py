"""Imports a Hugging Face folder as a recipe and a checkpoint of weights alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pretrain.checkpoint.layout import list_file
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.weights import open_weights
from pretrain.checkpoint.weights_only import fill_weights_folder, tensor_shapes
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.architectures.llama_like import LlamaLike
from pretrain.export.convert import Conversion, shortage
from pretrain.export.hf_files import CONFIG, read_config
from pretrain.export.hf_open import COMPUTED, check_stored, open_config
from pretrain.export.hf_recipe import recipe_of
from pretrain.export.hf_tokenizer import source_tokenizer
from pretrain.export.name_map import Links, Zeros, to_ours
from pretrain.export.parity import (
    check_parity,
    check_same_numbers,
    compare_logits,
    load_exported,
    reference_model,
    same_bits,
)
from pretrain.export.targets import architectures
from pretrain.export.writer import (
    RECORD,
    dtype_name,
    open_exported_weights,
    published_folder,
    write_json_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Random tokens that logits are compared on; a folder of others has no text to take them from.
WINDOWS = 4
WINDOW_TOKENS = 256


def import_hf(
    source: Path, output: Path, overwrite: bool, memory_bytes: int | None = None
) -> Conversion:
    """Writes a Hugging Face model as a checkpoint, and compares its logits with transformers'.

    Evaluation, generation, export and training read the folder like any other checkpoint.

    Args:
        source: with ``config.json``, safetensors and, if it has one, a tokenizer.
        memory_bytes: as in :func:`pretrain.export.convert.export_hf`.

    Raises:
        ConfigError: if no recipe can express the model, or ``output`` is taken.
        CheckpointError: if weights are missing, superfluous or damaged, or values differ;
            ``output`` is then left as it was.
    """
    target, config = architecture_of(source)
    # Names and shapes first: reading the weights may take long, and what does not hold together is
    # a damaged folder before it is a model that no recipe can express.
    check_stored(source)
    recipe = recipe_of(source, output, target, config)
    theirs = open_exported_weights(source)
    links = target.links(recipe.model)
    left_out = _left_out(theirs, links, recipe)
    dense, experts = tensor_shapes(recipe.model)
    tokenizer = source_tokenizer(source)
    with published_folder(output, overwrite) as folder:
        tensors = to_ours(links, theirs, dense | experts)
        fill_weights_folder(folder, recipe, tensors, tokenizer)
        ours = open_weights(folder)
        # Tensors that must be zero have no counterpart; _left_out has listed those that are not.
        check_same_numbers([link for link in links if not isinstance(link, Zeros)], ours, theirs)
        parity = None
        unchecked = shortage(ours, memory_bytes)
        if unchecked is None:
            shape = (WINDOWS, min(WINDOW_TOKENS, recipe.model.max_position_embeddings))
            # A fixed seed: the same folder always gives the same result.
            windows_WS = torch.randint(
                config.vocab_size, shape, generator=torch.Generator().manual_seed(0)
            )
            parity = compare_logits(
                reference_model(recipe.model, ours, torch.float32),
                load_exported(source),
                windows_WS,
            )
            check_parity(parity)
        dtypes = {theirs.form(name).dtype for name in theirs.names}
        dtype = dtype_name(dtypes.pop()) if len(dtypes) == 1 else "mixed"
        size = sum(ours.form(name).bytes for name in ours.names)
        conversion = Conversion(
            recipe.name, 0, dtype, len(ours.names), size, parity, unchecked, left_out
        )
        write_json_file(folder / RECORD, conversion.to_dict())
        # A checkpoint has no file that its manifest does not list.
        list_file(folder, folder / RECORD)
    return conversion


def architecture_of(source: Path) -> tuple[LlamaLike, PreTrainedConfig]:
    """The architecture and the config of a Hugging Face folder.

    Raises:
        ConfigError: for an architecture that no recipe can say, and for quantised weights.
        CheckpointError: if the config is damaged, or the folder holds foreign code.
    """
    path = source / CONFIG
    content = read_config(source)
    name = content["model_type"]
    known = {target.name: target for target in architectures()}
    if name not in known:
        raise ConfigError(
            f"{path} has the model_type {name!r}, and the ones that recipes can say are"
            f" {', '.join(known)}"
        )
    if content.get("quantization_config"):
        raise ConfigError(
            f"{path} says that the weights are quantised: convert them to bf16 or fp32 first, with"
            " the tool that quantised them"
        )
    return known[name], open_config(source)


def _left_out(theirs: TensorReader, links: Links, recipe: Recipe) -> tuple[str, ...]:
    """Tensors without effect on logits, such as those of multi-token prediction or a tied head.

    Raises:
        CheckpointError: for any other that no link names.
    """
    linked = {link.theirs for link in links if not isinstance(link, Zeros)}
    empty = {link.theirs for link in links if isinstance(link, Zeros)}
    layers = recipe.model.num_hidden_layers
    left_out = []
    for name in theirs.names:
        if name in linked or COMPUTED.search(name):
            continue
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        # A tied head may be stored once more; a different one would be an untied model.
        if name == "lm_head.weight" and same_bits(
            theirs.read(name), theirs.read("model.embed_tokens.weight")
        ):
            continue
        # DeepSeek stores the blocks of multi-token prediction as layers behind the last one.
        if name not in empty and not (layer and int(layer[1]) >= layers):
            raise CheckpointError(
                f"the tensor '{name}' has no place in the recipe's model: config.json and weights"
                " do not belong together"
            )
        if name not in empty or theirs.read(name).any():
            left_out.append(name)
    return tuple(left_out)
