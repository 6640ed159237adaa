"""All of a checkpoint's weights as one safetensors file, or as shards with an index, written a tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from pretrain.checkpoint.stored_weights import StoredWeights
from pretrain.checkpoint.tensor_files import TensorFileWriter, TensorForm
from pretrain.export.writer import INDEX, write_json_file


def join_shards(stored: StoredWeights, folder: Path, dtype: torch.dtype, max_shard_size: int | str | None) -> tuple[int, int]:
    """Writes ``model.safetensors``, or shards with ``model.safetensors.index.json`` where a size is given that all do not fit into.

    The experts of all ranks are joined. The names are ours, the format and the names of the files Hugging Face's.

    Args:
        max_shard_size: bytes, or a text such as ``5GB``; a larger tensor gets a file of its own.

    Returns:
        The number of files, and the bytes of the tensors.
    """
    forms = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in stored.shapes.items()}
    size = max_shard_size or sum(form.nbytes for form in forms.values()) + 1
    split = split_torch_state_dict_into_shards(forms, filename_pattern="model{suffix}.safetensors", max_shard_size=size)
    with tqdm(total=len(stored), desc="writing weights", unit="tensor") as progress:
        for filename, names in split.filename_to_tensors.items():
            with TensorFileWriter(folder / filename, {name: TensorForm(dtype, stored.shapes[name]) for name in names}) as writer:
                for name in names:
                    writer.write(name, stored[name].to(dtype))
                    progress.update()
    if split.is_sharded:
        write_json_file(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return len(split.filename_to_tensors), sum(form.nbytes for form in forms.values())
