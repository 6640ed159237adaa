"""Writes a Hugging Face folder: safetensors, configs, and a tokenizer that AutoTokenizer opens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.checkpoint.tokenizer_files import (
    GENERATION_CONFIG,
    ID_FIELDS,
    TOKEN_IDS,
    SideFiles,
    content_of,
    write_side_files,
)
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject
from pretrain.export.architectures.target import ExportTarget
from pretrain.export.hf_tokenizer import write_tokenizer
from pretrain.export.name_map import Link, Tensors, check_names, is_left_out, their_forms, to_theirs
from pretrain.export.parity import check_same_numbers
from pretrain.export.writer import (
    SHARD_BYTES,
    copy_file,
    dtype_name,
    open_exported_weights,
    write_json_file,
    write_weights,
)
from pretrain.model.config import ModelConfig


class Written(NamedTuple):
    """What a Hugging Face folder got.

    Attributes:
        tensors: how many, of ``bytes``.
        left_out: names of tensors that only training reads.
        tokenizer_note: where the ids of transformers differ, in a sentence; None if they do not.
    """

    tensors: int
    bytes: int
    left_out: tuple[str, ...]
    tokenizer_note: str | None


def write_hf_folder(
    folder: Path,
    target: ExportTarget,
    model: ModelConfig,
    ours: Tensors,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    side_files: SideFiles | None = None,
) -> Written:
    """Writes the whole folder, reads the weights back, and compares them bit for bit.

    Experts have one key each, if that is how transformers itself writes them: transformers 4 and 5,
    vLLM and converters to other formats all read such keys. The end-of-document token starts and
    ends a text, unless ``side_files`` have other ids.

    Args:
        model: with a plain embedding, unless the target keeps its factors.
        ours: its tensors in fp32.
        side_files: files that an imported model had next to its ``tokenizer.json``, written
            unchanged.

    Raises:
        CheckpointError: if the tokenizer has no end-of-document token, ``ours`` does not belong to
            ``model``, or a tensor does not read back as it was written.
    """
    if tokenizer.eod_id is None:
        raise CheckpointError(
            f"{tokenizer.origin} has no token that ends a document, which config.json must name:"
            " name one with data.tokenizer.eod_token in the checkpoint's recipe.yaml"
        )
    links = target.links(model)
    linked = {link.ours for link in links if isinstance(link, Link)}
    left_out = tuple(name for name in ours.names if is_left_out(name) and name not in linked)
    # Before the first byte is written: a tensor without a link would be missing in the export.
    check_names(links, ours, left_out)
    forms = their_forms(links, ours, dtype)
    write_weights(folder, forms, to_theirs(links, ours, dtype), shard_bytes)
    check_same_numbers(links, ours, open_exported_weights(folder))
    config = {
        "architectures": [target.architecture],
        **target.config(model, tokenizer.eod_id),
        "dtype": dtype_name(dtype),
    }
    note = _write_configs(
        folder, config, tokenizer, model.max_position_embeddings, side_files or {}
    )
    for file in target.files:
        copy_file(Path(file), folder / Path(file).name)
    return Written(len(forms), sum(form.bytes for form in forms.values()), left_out, note)


def _write_configs(
    folder: Path,
    config: JsonObject,
    tokenizer: Tokenizer,
    max_tokens: int,
    side_files: SideFiles,
) -> str | None:
    """Writes all files but the weights: ``config.json``, generation settings, and the tokenizer.

    Returns what :func:`~pretrain.export.hf_tokenizer.write_tokenizer` does.
    """
    eod_id = tokenizer.eod_id
    ids = content_of(side_files, TOKEN_IDS)
    if ids is not None:
        # A chat model may end a text with several tokens; our tokenizer knows a single one.
        config = {name: value for name, value in config.items() if name not in ID_FIELDS} | ids
    write_json_file(folder / "config.json", config)
    generation = {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id}
    write_json_file(folder / GENERATION_CONFIG, generation if ids is None else ids)
    note = write_tokenizer(folder, tokenizer, max_tokens)
    write_side_files(
        {name: content for name, content in side_files.items() if name != TOKEN_IDS}, folder
    )
    return note
