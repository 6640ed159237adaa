"""The files of a converted model, and a folder of them that appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from pretrain.config.durable import fsync_path
from pretrain.config.errors import CheckpointError, ConfigError, StorageError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "export.json"


@contextmanager
def published_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``output`` that takes its name when the block ends, and is removed when the block fails.

    Raises:
        ConfigError: when ``output`` is not empty and ``overwrite`` is false, or holds something else than an earlier export.
    """
    output = output.resolve()
    occupied = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(f"{output} is not empty: choose another --output, or replace what is there with --overwrite")
    if occupied and not (output / RECORD).is_file():
        raise ConfigError(f"{output} is no export (it has no {RECORD}), and --overwrite would delete it: choose another --output")
    temporary = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        readable = temporary.stat().st_mode & 0o666
        for path in temporary.iterdir():
            path.chmod(readable)  # safetensors leaves its files readable for their owner alone
            fsync_path(path)
        fsync_path(temporary)
        _replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, output: Path) -> None:
    """Gives ``new`` the name ``output``; an earlier folder of that name is deleted only after the new one stands there."""
    earlier = output.parent / f".{output.name}.earlier-{os.getpid()}"
    if output.exists():
        os.replace(output, earlier)
    try:
        os.replace(new, output)
    except OSError:
        if earlier.exists():
            os.replace(earlier, output)
        raise
    fsync_path(output.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def write_json_file(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str = "5GB") -> None:
    """Writes contiguous tensors as ``model.safetensors``, or as shards with an index where they are larger than ``max_shard_size``.

    Raises:
        StorageError: when a file cannot be written.
    """
    split = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size)
    for filename, names in tqdm(split.filename_to_tensors.items(), desc="writing weights", unit="file", disable=not split.is_sharded):
        try:
            save_file({name: tensors[name] for name in names}, folder / filename, metadata={"format": "pt"})
        except SafetensorError as error:
            raise StorageError(f"cannot write {folder / filename}: {error}; free space or choose another folder") from None
    if split.is_sharded:
        write_json_file(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors that :func:`write_weights` wrote."""
    index = folder / INDEX
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() else [WEIGHTS]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def copy_file(source: Path, destination: Path) -> None:
    """Raises :class:`CheckpointError` when there is no ``source``."""
    if not source.is_file():
        raise CheckpointError(f"{source} is missing: the checkpoint is incomplete, take another one")
    shutil.copyfile(source, destination)


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``bfloat16``, the way ``config.json`` writes it."""
    return str(dtype).removeprefix("torch.")
