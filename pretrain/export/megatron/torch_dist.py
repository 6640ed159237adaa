"""Writes the files of a ``torch_dist`` checkpoint, one tensor at a time.

The format is that of torch.distributed.checkpoint, with a ``metadata.json`` and a ``common.pt``
next to it (megatron.core.dist_checkpointing).
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from tqdm import tqdm

from pretrain.checkpoint.tensor_files import TensorForm
from pretrain.core.errors import StorageError
from pretrain.export.writer import write_json_file

COMMON = "common.pt"
BACKENDS = "metadata.json"
METADATA = ".metadata"
TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = "iter_{:07d}"
# What megatron.core.dist_checkpointing.core.CheckpointingConfig holds.
BACKEND: Mapping[str, Any] = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Chunk(NamedTuple):
    """A part of a tensor, made when it is written.

    Attributes:
        size: of the whole tensor.
        offset: of the part in it, one number a dimension.
        form: of the part, with as many dimensions.
    """

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    form: TensorForm
    make: Callable[[], Tensor]


class _ChunkPlanner(SavePlanner):
    """Hands chunks to torch's writer one by one; a default planner wants all tensors in memory."""

    def __init__(self, chunks: Iterable[Chunk], objects: Iterable[str]) -> None:
        self._chunks = {MetadataIndex(chunk.key, chunk.offset): chunk for chunk in chunks}
        self._objects = list(objects)
        buffer = io.BytesIO()
        # A list, as Megatron saves the shards of an object; None is what a module without fp8 has.
        torch.save([None], buffer)
        self._nothing = buffer.getvalue()
        self._bar = tqdm(
            total=sum(chunk.form.bytes for chunk in self._chunks.values()),
            desc="writing weights",
            unit="B",
            unit_scale=True,
        )

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        return

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index,
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.form.shape)),
                    TensorProperties(dtype=chunk.form.dtype),
                    torch.Size(chunk.size),
                ),
            )
            for index, chunk in self._chunks.items()
        ]
        objects = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan([*items, *objects])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._nothing)
        # Equal indices: the number of a chunk, which the plan adds, is not compared.
        chunk = self._chunks[write_item.index]
        self._bar.update(chunk.form.bytes)
        return chunk.make().to(chunk.form.dtype).reshape(chunk.form.shape).contiguous()

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()


def write_torch_dist(
    folder: Path,
    chunks: Iterable[Chunk],
    objects: Iterable[str],
    arguments: Mapping[str, Any],
    iteration: int,
) -> Path:
    """Write a checkpoint into a folder, as Megatron-LM's ``--load`` finds it.

    Args:
        folder: empty; it gets the tracker file and the folder of the iteration.
        objects: names of objects that are empty.
        arguments: of the ``argparse.Namespace``, plain values.

    Returns:
        The folder of the iteration.

    Raises:
        StorageError: if the disk is full.
    """
    inner = folder / ITERATION.format(iteration)
    try:
        inner.mkdir()
        planner = _ChunkPlanner(chunks, objects)
        with warnings.catch_warnings():
            # One process without a process group is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _save(inner, planner)
        planner.close()
        common = {
            "args": argparse.Namespace(**arguments),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "num_floating_point_operations_so_far": 0.0,
            # What Megatron keeps its tensors by: not each expert and half of a gated matrix alone.
            "content_metadata": {"singleton_local_shards": False},
        }
        torch.save(common, inner / COMMON)
        write_json_file(inner / BACKENDS, BACKEND)
        (folder / TRACKER).write_text(str(iteration), encoding="utf-8")
    # torch's writer of archives raises RuntimeError if a file system takes no more.
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(
            f"cannot write {inner}: {' '.join(str(reason).split())[:200]}; free space or choose"
            " another folder"
        ) from None
    return inner


def _save(folder: Path, planner: SavePlanner) -> None:
    """Call torch's writer, and raise what it wraps: errors of the disk, or of reading weights."""
    writer = checkpoint.FileSystemWriter(folder)
    try:
        checkpoint.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except checkpoint.CheckpointException as error:
        for cause, _ in error.failures.values():
            raise cause from None
        raise
