"""The engine's state as files: what each rank writes, and how any topology reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.layout import FileEntry, file_entry
from pretrain.checkpoint.optimizer_state import (
    Stored,
    load_optimizer,
)
from pretrain.checkpoint.places import buffers, own_pieces, pieces, table_pieces
from pretrain.checkpoint.tensor_files import TensorFileWriter, TensorReader
from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.core import faults
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import use_masters


def weight_tensors(engine: Engine) -> Iterator[Stored]:
    """Yield the fp32 weights that this rank writes, as views of what the optimizer updates."""
    for piece in own_pieces(engine):
        yield Stored(piece.name, piece.fragment.master, piece.range)
    for table in table_pieces(engine):
        yield Stored(table.name, table.rows.reshape(-1), table.range)
    # Buffers are equal on all ranks.
    if engine.topology.is_main:
        for name, buffer in buffers(engine).items():
            yield Stored(name, buffer.float())


@torch.no_grad()
def load_engine(engine: Engine, weights: TensorReader, optimizer: TensorReader) -> None:
    """Set weights, buffers and the optimizer's state. Every rank must call it.

    Args:
        weights, optimizer: of a checkpoint of any topology.
    """
    faults.reached("load.weights")
    for piece in pieces(engine):
        values = weights.read_part(piece.name, piece.range, piece.elements)
        piece.fragment.master.copy_(values)
    for table in table_pieces(engine, whole=True):
        start = table.range.start
        values = weights.read_range(table.name, start, start + table.rows.numel())
        table.rows.copy_(values.view_as(table.rows))
    for name, buffer in buffers(engine).items():
        buffer.copy_(weights.read(name))
    use_masters(engine.optimizer, engine.zero_stage, engine.precision)
    faults.reached("load.optimizer")
    load_optimizer(engine, optimizer)


class Snapshot:
    """Copies of tensors in host memory, which stay as they are while training continues.

    The memory is used again by the next snapshot: new memory would be slower to fill.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Iterable[Stored]) -> list[Stored]:
        """Copy tensors; the copies of the snapshot before are overwritten."""
        taken = []
        before, self._copies = self._copies, {}
        for name, values, place in tensors:
            copy = before.get(name)
            if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
                # Pinned memory takes copies from a GPU at the full speed of its bus.
                copy = torch.empty(
                    values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda"
                )
            copy.copy_(values, non_blocking=True)
            self._copies[name] = copy
            taken.append(Stored(name, copy, place))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken


def write_tensors(
    path: Path, tensors: Iterable[Stored], metadata: Mapping[str, str] | None = None
) -> FileEntry:
    """Write a file of tensors, one by one, and sync it; return what the manifest says of it.

    A part that is the whole tensor gets the tensor's shape.

    Raises:
        OSError: if the disk is full.
    """
    shaped: dict[str, Tensor] = {}
    ranges = {}
    for name, values, place in tensors:
        if place is None:
            shaped[name] = values
        elif values.numel() == torch.Size(place.shape).numel():
            shaped[name] = values.view(place.shape)
        else:
            shaped[name] = values
            ranges[name] = place
    forms = {name: TensorForm(values.dtype, tuple(values.shape)) for name, values in shaped.items()}
    with TensorFileWriter(path, forms, ranges, metadata) as file:
        for name in file.order:
            file.write(name, shaped[name])
        faults.reached("save.sync")
        file.sync()
    sha256 = file.sha256()
    if sha256 is None:
        return file_entry(path)
    return {"bytes": file.bytes, "sha256": sha256}
