"""Converts checkpoints to and from Megatron-Core's, and compares every tensor with its source."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.tokenizer.files import tokenizer_file
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.checkpoint.layout import list_file, read_recipe
from pretrain.checkpoint.tensor_files import TensorForm
from pretrain.checkpoint.tokenizer_files import TOKEN_IDS, read_side_files, write_side_files
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.checkpoint.weights import open_weights
from pretrain.checkpoint.weights_only import fill_weights_folder, tensor_shapes
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.convert import Conversion, write_card
from pretrain.export.folded_embedding import without_factors
from pretrain.export.hf_tokenizer import source_tokenizer, write_tokenizer
from pretrain.export.megatron.arguments import (
    arguments_of,
    for_namespace,
    options_of,
    refuse_unless_expressible,
)
from pretrain.export.megatron.blocks import EMBEDDING, Block, Layout, Piece, Shapes
from pretrain.export.megatron.reader import TorchDistTensors, iteration_folder, read_arguments
from pretrain.export.megatron.recipe import recipe_of
from pretrain.export.megatron.torch_dist import COMMON, Chunk, write_torch_dist
from pretrain.export.name_map import Tensors, is_left_out
from pretrain.export.parity import same_bits
from pretrain.export.writer import (
    RECORD,
    dtype_name,
    published_folder,
    read_json_object,
    write_json_file,
)

TARGET = "megatron"
OPTIONS = "megatron_options.txt"
UNCHECKED = (
    "logits were not compared, because Megatron's modules need a GPU; every tensor was compared"
    " with its source bit for bit"
)
# Of a training that is not converted: the optimizer's states.
OPTIMIZER = re.compile(r"(optimizer|chained_\d+)\.")
# Blocks that only training reads.
MULTI_TOKEN = re.compile(r"mtp\.")


def export_megatron(
    checkpoint: Path, output: Path, dtype: torch.dtype, overwrite: bool
) -> Conversion:
    """Writes what Megatron-LM's ``--load`` reads: weights and arguments, no optimizer state.

    Args:
        checkpoint: a ``step_N`` folder.
        dtype: of the weights; balancing biases are fp32.

    Raises:
        ConfigError: if Megatron's arguments cannot say what the model computes, or ``output`` is
            taken.
        CheckpointError: if weights are missing or doubled, or do not read back as they were
            written; ``output`` is then left as it was.
    """
    recipe = read_recipe(checkpoint)
    refuse_unless_expressible(recipe.model, recipe.name)
    _keep_other_iterations(output, overwrite)
    weights = open_whole_weights(checkpoint, recipe.model)
    model, ours = without_factors(recipe.model, weights)
    layout = Layout(model)
    blocks = list(layout.blocks())
    left_out = _check_all_are_placed(blocks, ours)
    shapes = {name: ours.form(name).shape for name in ours.names}
    arguments = arguments_of(model)
    with published_folder(output, overwrite) as folder:
        tokenizer = load_tokenizer(tokenizer_file(checkpoint), recipe.data.tokenizer)
        note = write_tokenizer(folder, tokenizer, model.max_position_embeddings)
        side_files = read_side_files(checkpoint)
        write_side_files({k: v for k, v in side_files.items() if k != TOKEN_IDS}, folder)
        step = write_card(checkpoint, folder, note)
        chunks = list(_chunks(blocks, ours, shapes, dtype))
        namespace = for_namespace(arguments, blocks[0].shape(shapes)[0])
        written = write_torch_dist(folder, chunks, layout.extra_states(), namespace, step)
        _check_written(blocks, ours, TorchDistTensors(written))
        options = [*options_of(arguments), "--use-checkpoint-args"]
        (folder / OPTIONS).write_text("\n".join(options) + "\n", encoding="utf-8")
        conversion = Conversion(
            TARGET,
            step,
            dtype_name(dtype),
            len({chunk.key for chunk in chunks}),
            sum(chunk.form.bytes for chunk in chunks),
            None,
            UNCHECKED,
            left_out,
        )
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion


def import_megatron(source: Path, output: Path, overwrite: bool) -> Conversion:
    """Writes a checkpoint of weights alone, with a recipe, from one of Megatron-Core.

    Args:
        source: the folder that Megatron-LM saves to, or that of one iteration.

    Raises:
        ConfigError: if no recipe can express the model, or ``output`` is taken.
        CheckpointError: if tensors are missing, superfluous, damaged or not finite; ``output`` is
            then left as it was.
    """
    folder, iteration = iteration_folder(source)
    arguments = read_arguments(folder)
    theirs = TorchDistTensors(folder)
    if not theirs.has(EMBEDDING):
        raise CheckpointError(
            f"{folder} has no tensor '{EMBEDDING}': give a checkpoint of Megatron's GPTModel"
        )
    rows = theirs.form(EMBEDDING).shape[0]
    recipe = recipe_of(folder.parent, output, arguments, folder / COMMON, rows)
    dense, experts = tensor_shapes(recipe.model)
    shapes = dense | experts
    blocks = list(Layout(recipe.model).blocks())
    aliases = {key for block in blocks for key in block.other_keys}
    blocks = [_found(block, theirs) for block in blocks]
    left_out = _check_all_are_known(blocks, aliases, theirs, shapes)
    with published_folder(output, overwrite) as temporary:
        tensors = _to_ours(blocks, theirs, shapes)
        tokenizer = source_tokenizer(folder.parent)
        fill_weights_folder(temporary, recipe, tensors, tokenizer, iteration)
        ours = open_weights(temporary)
        _check_written(blocks, ours, theirs)
        dtypes = {theirs.form(block.key).dtype for block in blocks if not block.exact}
        conversion = Conversion(
            recipe.name,
            iteration,
            dtype_name(dtypes.pop()) if len(dtypes) == 1 else "mixed",
            len(ours.names),
            sum(ours.form(name).bytes for name in ours.names),
            None,
            UNCHECKED,
            left_out,
        )
        write_json_file(temporary / RECORD, conversion.to_dict())
        # A checkpoint has no file that its manifest does not list.
        list_file(temporary, temporary / RECORD)
    return conversion


def _keep_other_iterations(output: Path, overwrite: bool) -> None:
    """Refuses to replace an export that Megatron-LM has saved further iterations into."""
    record = output / RECORD
    if not overwrite or not record.is_file():
        return
    exported = f"iter_{int(read_json_object(record).get('step', 0)):07d}"
    others = sorted(path.name for path in output.glob("iter_*") if path.name != exported)
    if others:
        raise ConfigError(
            f"{output} has {others[0]}, which this tool has not written, and --overwrite would"
            " delete it: choose another --output"
        )


def _check_all_are_placed(blocks: Iterable[Block], ours: Tensors) -> tuple[str, ...]:
    """Checks that each tensor of ours has a place; returns those that only training reads."""
    placed = {piece.ours for block in blocks for piece in block.pieces}
    left_out = tuple(name for name in ours.names if is_left_out(name))
    if unknown := sorted(set(ours.names) - placed - set(left_out)):
        raise CheckpointError(
            f"the export has no name for the tensor '{unknown[0]}' ({len(unknown)} unknown): the"
            " checkpoint does not belong to its recipe"
        )
    return left_out


def _chunks(
    blocks: Iterable[Block], ours: Tensors, shapes: Shapes, dtype: torch.dtype
) -> Iterator[Chunk]:
    for block in blocks:
        shape = block.shape(shapes)
        form = TensorForm(
            torch.float32 if block.exact else dtype, (*(1,) * len(block.index), *shape)
        )
        for key in (block.key, *block.other_keys):
            yield Chunk(
                key,
                (*block.counts, *shape),
                (*block.index, *(0,) * len(shape)),
                form,
                partial(block.join, ours),
            )


def _check_written(blocks: Iterable[Block], ours: Tensors, theirs: TorchDistTensors) -> None:
    """Compares each block in the files with what ours make of it, bit for bit."""
    for block in tqdm(list(blocks), desc="reading back", unit="block"):
        expected = block.join(ours)
        for key in (block.key, *block.other_keys):
            found = theirs.block(key, block.index)
            if block.rows is not None:
                # Megatron trains the padding too, which is nobody's token.
                expected, found = expected[: block.rows], found[: block.rows]
            if not same_bits(expected.to(found.dtype), found):
                raise CheckpointError(
                    f"the tensor '{key}' does not read back as it was written: nothing was"
                    " published; check the disk, then try again"
                )


def _found(block: Block, theirs: TorchDistTensors) -> Block:
    """The block under the name that the checkpoint has for it."""
    for key in (block.key, *block.other_keys):
        if theirs.has(key):
            return replace(block, key=key, other_keys=())
    raise CheckpointError(
        f"{theirs.folder} has no tensor '{block.key}': the checkpoint does not belong to its"
        " arguments"
    )


def _check_all_are_known(
    blocks: Iterable[Block], aliases: Container[str], theirs: TorchDistTensors, shapes: Shapes
) -> tuple[str, ...]:
    """Checks the shapes, and that no tensor is superfluous; returns what only training reads.

    Args:
        aliases: further keys of blocks, which may be there too.
    """
    known = set()
    for block in blocks:
        known.add(block.key)
        found = theirs.form(block.key).shape
        wanted = (*block.counts, *block.shape(shapes))
        if block.rows is not None and len(found) == 2 and found[0] >= block.rows:
            wanted = (found[0], *wanted[1:])  # any padding of the vocabulary
        if found != wanted:
            raise CheckpointError(
                f"the tensor '{block.key}' in {theirs.folder} is {list(found)} instead of"
                f" {list(wanted)}: the checkpoint does not belong to its arguments"
            )
    others = [name for name in theirs.names if name not in known]
    left_out = tuple(name for name in others if MULTI_TOKEN.match(name))
    unknown = [
        name
        for name in others
        if name not in aliases and name not in left_out and not OPTIMIZER.match(name)
    ]
    if unknown:
        raise CheckpointError(
            f"the tensor '{unknown[0]}' in {theirs.folder} has no place in the recipe's model"
            f" ({len(unknown)} unknown): take another checkpoint"
        )
    return left_out


def _to_ours(
    blocks: Iterable[Block], theirs: TorchDistTensors, shapes: Shapes
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of ours in fp32, one by one; padding of the vocabulary is zero."""
    places: dict[str, list[tuple[Block, Piece]]] = {}
    for block in blocks:
        for piece in block.pieces:
            places.setdefault(piece.ours, []).append((block, piece))
    for name, shape in shapes.items():
        tensor = torch.zeros(shape)
        for block, piece in places[name]:
            share = block.split(theirs.block(block.key, block.index), piece, shapes)
            if not share.isfinite().all():
                raise CheckpointError(
                    f"the tensor '{block.key}' in {theirs.folder} has values that are not finite:"
                    " take an earlier checkpoint"
                )
            (tensor if piece.expert is None else tensor[piece.expert])[: block.rows].copy_(share)
        yield name, tensor
