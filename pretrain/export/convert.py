"""Writes a checkpoint as a folder of another format, compares it, and only then publishes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.tokenizer.files import tokenizer_file
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.checkpoint.layout import (
    CARD,
    RECIPE,
    read_recipe,
    read_run_recipe,
    read_state,
)
from pretrain.checkpoint.model_card import model_card
from pretrain.checkpoint.tokenizer_files import read_side_files, write_side_files
from pretrain.checkpoint.universal import check_universal, write_universal
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.config.load import recipe_to_yaml
from pretrain.export.folded_embedding import without_factors
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.name_map import Link, Tensors, their_forms, to_theirs
from pretrain.export.parity import (
    Parity,
    check_parity,
    check_same_numbers,
    compare_logits,
    free_memory,
    load_exported,
    parity_windows,
    reference_model,
)
from pretrain.export.targets import AUTO, choose_target
from pretrain.export.writer import (
    RECORD,
    SHARD_BYTES,
    copy_file,
    dtype_name,
    open_exported_weights,
    published_folder,
    write_json_file,
    write_weights,
)


@dataclass(frozen=True)
class Conversion:
    """What was written, also the content of ``export.json`` in the folder.

    Attributes:
        bytes: of the weights.
        parity: how far the logits differ; None if they were not compared.
        unchecked: why logits were not compared, in a sentence. Every tensor was compared with its
            source bit for bit in any case.
        left_out: tensors that only training reads, of multi-token prediction and router noise.
    """

    target: str
    step: int
    dtype: str
    tensors: int
    bytes: int
    parity: Parity | None
    unchecked: str | None = None
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The content of ``export.json``."""
        return asdict(self)


def export_hf(
    checkpoint: Path,
    output: Path,
    heldout: TokenStream,
    dtype: torch.dtype,
    overwrite: bool,
    target_name: str = AUTO,
    shard_bytes: int = SHARD_BYTES,
    memory_bytes: int | None = None,
) -> Conversion:
    """Writes a folder that transformers opens, and compares its logits with the checkpoint's.

    Args:
        checkpoint: a ``step_N`` folder.
        heldout: tokens of the checkpoint's own tokenizer; full windows of them are compared.
        dtype: of the written weights. Below fp32, logits are compared with those of the equally
            rounded checkpoint, all computed in fp32.
        memory_bytes: what both models in fp32 may take; free memory by default. If they do not
            fit, logits are not compared.

    Raises:
        ConfigError: if the architecture does not compute what the model computes, or ``output``
            is taken.
        CheckpointError: if weights are missing or doubled, or logits or tensors differ;
            ``output`` is then left as it was.
    """
    recipe = read_recipe(checkpoint)
    target = choose_target(recipe, target_name)
    tokenizer = load_tokenizer(tokenizer_file(checkpoint), recipe.data.tokenizer)
    windows_WS = parity_windows(heldout, recipe.train.sequence_length)
    weights = open_whole_weights(checkpoint, recipe.model)
    model, tensors_in = (
        (recipe.model, weights) if target.keeps_factors else without_factors(recipe.model, weights)
    )
    with published_folder(output, overwrite) as folder:
        side_files = read_side_files(checkpoint)
        tensors, size, left_out, note = write_hf_folder(
            folder, target, model, tensors_in, tokenizer, dtype, shard_bytes, side_files
        )
        parity = None
        unchecked = shortage(tensors_in, memory_bytes)
        if unchecked is None:
            # Below fp32 the reference is rounded like the export. A product of rounded factors is
            # not the rounded product, so that the reference then has the product too.
            reference = (
                reference_model(recipe.model, weights, dtype)
                if dtype == torch.float32
                else reference_model(model, tensors_in, dtype)
            )
            parity = compare_logits(reference, load_exported(folder), windows_WS)
            check_parity(parity)
        step = write_card(checkpoint, folder, note)
        conversion = Conversion(
            target.architecture, step, dtype_name(dtype), tensors, size, parity, unchecked, left_out
        )
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion


def write_card(checkpoint: Path, folder: Path, tokenizer_note: str | None = None) -> int:
    """Writes the model card into an export; returns the step that the weights are of."""
    state = read_state(checkpoint)
    card = model_card(read_run_recipe(checkpoint), state)
    if tokenizer_note is not None:
        card += f"\n## Tokenizer\n\n{tokenizer_note[0].upper()}{tokenizer_note[1:]}.\n"
    (folder / CARD).write_text(card, encoding="utf-8")
    return int(state["step"])


def shortage(ours: Tensors, memory_bytes: int | None) -> str | None:
    """Why two fp32 models do not fit into memory at once, in a sentence; None if they do."""
    needed = 2 * sum(ours.form(name).bytes for name in ours.names)
    free = free_memory() if memory_bytes is None else memory_bytes
    if needed <= free:
        return None
    return (
        f"logits were not compared, because two models in fp32 take {needed / 1e9:.1f} GB and"
        f" {free / 1e9:.1f} GB are free; every tensor was compared with its source bit for bit"
        " instead"
    )


def export_safetensors(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype,
    overwrite: bool,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Writes all weights as safetensors under their own names, the experts of all ranks joined.

    Raises:
        ConfigError: if ``output`` is taken.
        CheckpointError: if weights are missing or doubled, or do not read back as they were
            written; ``output`` is then left as it was.
    """
    recipe = read_recipe(checkpoint)
    ours = open_whole_weights(checkpoint, recipe.model)
    links = [link for name in ours.names for link in _same_name(name, ours.form(name).shape)]
    forms = their_forms(links, ours, dtype)
    with published_folder(output, overwrite) as folder:
        write_weights(folder, forms, to_theirs(links, ours, dtype), shard_bytes)
        check_same_numbers(links, ours, open_exported_weights(folder))
        (folder / RECIPE).write_text(recipe_to_yaml(recipe), encoding="utf-8")
        tokenizer = tokenizer_file(checkpoint)
        copy_file(tokenizer, folder / tokenizer.name)
        write_side_files(read_side_files(checkpoint), folder)
        size = sum(form.bytes for form in forms.values())
        conversion = Conversion(
            "safetensors",
            write_card(checkpoint, folder),
            dtype_name(dtype),
            len(forms),
            size,
            None,
        )
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion


def _same_name(name: str, shape: tuple[int, ...]) -> list[Link]:
    """Links of a tensor to itself, one an expert, so that stacked experts are never read whole."""
    if len(shape) < 3:
        return [Link(name, name, exact=name.endswith("balance_bias"))]
    return [Link(name, name, expert, their_expert=expert) for expert in range(shape[0])]


def export_universal(checkpoint: Path, output: Path, overwrite: bool) -> Conversion:
    """Writes DeepSpeed's universal format, which includes the states of the optimizer.

    Raises:
        ConfigError: if DeepSpeed cannot load such a checkpoint, or ``output`` is taken.
        CheckpointError: if a weight or a state is missing or damaged; ``output`` is then left as
            it was.
    """
    check_universal(checkpoint)
    with published_folder(output, overwrite) as folder:
        tensors, size = write_universal(checkpoint, folder)
        for path in (checkpoint / RECIPE, tokenizer_file(checkpoint)):
            copy_file(path, folder / path.name)
        write_side_files(read_side_files(checkpoint), folder)
        conversion = Conversion(
            "universal", write_card(checkpoint, folder), "float32", tensors, size, None
        )
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion
