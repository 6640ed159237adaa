"""A Hugging Face model folder: per-expert safetensors, configs, and a tokenizer that AutoTokenizer opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from pretrain.config.model_schema import ModelConfig
from pretrain.export.name_map import to_ours, to_theirs, without_padding
from pretrain.export.parity import check_same_tensors
from pretrain.export.targets import ExportTarget
from pretrain.export.writer import dtype_name, read_weights, total_bytes, write_json_file, write_weights


def write_hf_folder(
    folder: Path, target: ExportTarget, model: ModelConfig, ours: Mapping[str, Tensor], tokenizer: Tokenizer, max_shard_size: int | str = "5GB"
) -> tuple[int, int]:
    """Writes the whole folder, reads the weights back and compares them; returns the number of tensors and their bytes.

    The keys are one per expert: transformers 4 and 5, vLLM and converters to other formats all read these. The end-of-document token
    starts and ends a text.

    Raises:
        CheckpointError: when ``ours`` does not belong to ``model``, or a tensor does not read back as it was written.
    """
    links = target.links(model)
    theirs = to_theirs(links, ours)
    write_weights(folder, theirs, max_shard_size)
    check_same_tensors(without_padding(links, ours), to_ours(links, read_weights(folder)))
    dtype = dtype_name(next(iter(theirs.values())).dtype)
    config = {"architectures": [target.architecture], **target.config(model, tokenizer.eod_id), "dtype": dtype}
    write_configs(folder, config, tokenizer, model.max_position_embeddings)
    return len(theirs), total_bytes(theirs)


def write_configs(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, max_tokens: int) -> None:
    """Writes everything but the weights: ``config.json``, how texts start and end, and the tokenizer."""
    write_json_file(folder / "config.json", config)
    eod_id = tokenizer.eod_id
    write_json_file(folder / "generation_config.json", {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id})
    (folder / "tokenizer.json").write_bytes(tokenizer.content)
    eod_token = tokenizer.decode([tokenizer.eod_id])
    write_json_file(
        folder / "tokenizer_config.json",
        {
            # Without a class AutoTokenizer takes the model type's own one, with its own pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eod_token,
            "bos_token": eod_token,
            "model_max_length": max_tokens,
            "clean_up_tokenization_spaces": False,
        },
    )
