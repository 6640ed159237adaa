"""Reads and writes safetensors files one tensor at a time, so that no file is whole in memory.

A file may hold a flat range of a tensor instead of all of it, as a rank of a distributed run does.
Such a tensor has one dimension, and the header's ``ranges`` say where its values belong:
``{name: [first element, shape of the whole tensor]}`` in row-major order. A third entry, ``[first,
number]``, says that it is a flat range of these columns alone (of the last dimension).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint.tensor_headers import (
    DTYPES_OF_NAMES,
    FORMAT_NAMES,
    RANGES,
    Columns,
    Range,
    TensorForm,
    all_columns,
    read_header,
    read_ranges,
)
from pretrain.core.errors import CheckpointError


class TensorFileWriter:
    """Writes a safetensors file: first its header, then the tensors in any order.

    The format (https://github.com/huggingface/safetensors#format) is the header's length in 8
    bytes, the header in JSON, the values.

    Args:
        forms: of every tensor that will be written.
        ranges: of those that are flat parts of a tensor.

    Attributes:
        order: the names in the order of the file. If they are written in it, :meth:`sha256` costs
            no second pass over the file.
        bytes: of the whole file.

    Raises:
        CheckpointError: for a tensor that is unknown, comes twice or has another form, and on
            leaving if one never came.
        OSError: if the disk has no space for all of them.
    """

    def __init__(
        self,
        path: Path,
        forms: Mapping[str, TensorForm],
        ranges: Mapping[str, Range] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.missing = set(forms)
        self._forms = dict(forms)
        self._starts: dict[str, int] = {}
        strings = {"format": "pt", **(metadata or {})}
        if ranges:
            entries = {name: place.entry() for name, place in ranges.items()}
            strings[RANGES] = json.dumps(entries, separators=(",", ":"))
        header: dict[str, object] = {"__metadata__": strings}
        end = 0
        # The widest dtypes come first, so that each tensor starts at a multiple of its item size.
        for name, form in sorted(forms.items(), key=lambda item: -item[1].dtype.itemsize):
            self._starts[name] = end
            end += form.bytes
            header[name] = {
                "dtype": FORMAT_NAMES[form.dtype],
                "shape": list(form.shape),
                "data_offsets": [self._starts[name], end],
            }
        self.order = list(self._starts)
        text = json.dumps(header, separators=(",", ":")).encode()
        # Spaces align the values to 8 bytes.
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self.bytes = self._first + end
        beginning = len(text).to_bytes(8, "little") + text
        self._hash = hashlib.sha256(beginning)
        self._hashed = self._first
        self._file = path.open("wb")
        try:
            self._file.write(beginning)
            self._file.flush()
            if end:
                # A full disk is an error here, before anything was computed.
                os.posix_fallocate(self._file.fileno(), self._first, end)
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None and self.missing:
            raise CheckpointError(
                f"the tensor '{min(self.missing)}' is missing ({len(self.missing)} missing): "
                f"{self.path.name} would be incomplete"
            )

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of any strides."""
        if name not in self._forms:
            raise CheckpointError(
                f"there is no place for the tensor '{name}' in {self.path.name}: "
                "it does not belong to the model"
            )
        if name not in self.missing:
            raise CheckpointError(
                f"the tensor '{name}' came twice: it belongs into {self.path.name} once"
            )
        form = TensorForm(tensor.dtype, tuple(tensor.shape))
        if form != self._forms[name]:
            wanted = self._forms[name]
            raise CheckpointError(
                f"the tensor '{name}' is {form.dtype} {list(form.shape)}, "
                f"and should be {wanted.dtype} {list(wanted.shape)}"
            )
        values = _bytes_of(tensor.detach().cpu().contiguous())
        place = self._first + self._starts[name]
        self._file.seek(place)
        self._file.write(values)
        if place == self._hashed:
            # Both release Python's lock, so training continues meanwhile.
            self._hash.update(values)
            self._hashed += form.bytes
        self.missing.remove(name)

    def sync(self) -> None:
        """Flush what was written to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def sha256(self) -> str | None:
        """The whole file's SHA-256 in hexadecimal; None if it was not written in order."""
        return self._hash.hexdigest() if self._hashed == self.bytes else None


class Share(NamedTuple):
    """The elements ``start`` to ``stop`` (excluded) of a tensor, or of its columns, in a file."""

    path: Path
    start: int
    stop: int
    first_byte: int
    columns: Columns


class TensorReader:
    """The tensors of several safetensors files, read one by one or in ranges.

    A tensor of which several files have a range is joined. A file is open only while it is read,
    and is never mapped: mapped pages would count as this process' memory.

    Args:
        paths: of the files.

    Attributes:
        metadata: the strings in the files' headers, without those of ranges.

    Raises:
        CheckpointError: for a file that is missing, cut off or not safetensors, and for a tensor of
            which elements are missing or come twice.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._shares: dict[str, list[Share]] = {}
        self._forms: dict[str, TensorForm] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            self._add(path)
        for name, shares in self._shares.items():
            shares.sort(key=lambda share: (share.columns, share.start))
            self._check_whole(name, shares)

    def _add(self, path: Path) -> None:
        header, first = read_header(path)
        strings = header.pop("__metadata__", {})
        ranges = read_ranges(strings.pop(RANGES, "{}"), path)
        self.metadata |= strings
        for name, entry in header.items():
            dtype = DTYPES_OF_NAMES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(
                    f"the tensor '{name}' in {path} is stored as {entry['dtype']}: "
                    "convert it to a floating type first"
                )
            stored = TensorForm(dtype, tuple(entry["shape"]))
            start, shape, columns = ranges.get(name, Range(0, stored.shape))
            form = self._forms.setdefault(name, TensorForm(dtype, shape))
            if form != (dtype, shape):
                raise CheckpointError(
                    f"the tensor '{name}' in {path} is {dtype} {list(shape)}, and in "
                    f"{self._shares[name][0].path.name} {form.dtype} {list(form.shape)}: the "
                    "weights are damaged, take another folder"
                )
            share = Share(
                path,
                start,
                start + stored.elements,
                first + entry["data_offsets"][0],
                columns or all_columns(shape),
            )
            self._shares.setdefault(name, []).append(share)

    def _check_whole(self, name: str, shares: list[Share]) -> None:
        """Check that the sorted shares are all elements of a tensor, each once."""
        form = self._forms[name]
        width, elements = all_columns(form.shape).number, form.elements
        end = columns_end = counted = 0
        columns = Columns(0, 0)
        for share in shares:
            if share.columns != columns:
                # The columns before must be whole, and these follow them.
                if counted != columns_end * (elements // max(width, 1)):
                    break
                if share.columns.first > columns_end:
                    break
                overlaps = share.columns.first < columns_end
                columns, end = share.columns, 0
                columns_end = columns.first + columns.number
            else:
                overlaps = False
            of_columns = elements // max(width, 1) * columns.number
            if overlaps or share.start < end or share.stop > of_columns or columns_end > width:
                files = ", ".join(sorted({share.path.name for share in shares}))
                raise CheckpointError(
                    f"elements of the tensor '{name}' are more than once in {files}: they belong "
                    "into one file, take another folder"
                )
            if share.start > end:
                break
            end = share.stop
            counted += share.stop - share.start
        if counted < elements:
            each = ", ".join(f"{share.stop - share.start} in {share.path.name}" for share in shares)
            held = sum(share.stop - share.start for share in shares)
            raise CheckpointError(
                f"the tensor '{name}' has {held} of {elements} elements ({each}): the weights are "
                "incomplete, take another folder"
            )

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the files' order."""
        return list(self._forms)

    def shares(self, name: str) -> list[Share]:
        """Return the parts of a tensor in the order of their elements."""
        return self._shares[name]

    def form(self, name: str) -> TensorForm:
        """Return the form of the whole tensor."""
        return self._forms[name]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a whole tensor, or what is at ``index`` of its first dimension."""
        shape = self._forms[name].shape
        if index is None:
            return self.read_range(name, 0, prod(shape)).view(shape)
        if not 0 <= index < shape[0]:
            raise IndexError(f"the tensor '{name}' has no index {index}")
        size = prod(shape[1:])
        return self.read_range(name, index * size, (index + 1) * size).view(shape[1:])

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements ``start`` to ``stop`` (excluded) of a tensor, flat.

        Raises:
            CheckpointError: if a file has changed or cannot be read.
        """
        shape, shares = self._forms[name].shape, self._shares[name]
        if not shares or shares[0].columns == all_columns(shape):
            return self._read_shares(name, shares, start, stop)
        # Whole rows, column by column.
        width = shape[-1]
        first_row, last_row = start // width, -(-stop // width)
        rows = torch.empty(last_row - first_row, width, dtype=self._forms[name].dtype)
        for columns in dict.fromkeys(share.columns for share in shares):
            first, number = columns
            found = self._read_columns(name, columns, first_row * number, last_row * number)
            rows[:, first : first + number] = found.view(-1, number)
        return rows.view(-1)[start - first_row * width : stop - first_row * width]

    def read_part(self, name: str, place: Range, elements: int) -> Tensor:
        """Return what belongs to a flat part of a tensor, whatever parts the files have."""
        start, shape, columns = place
        if columns is None:
            return self.read_range(name, start, start + elements)
        first, number = columns
        if any(share.columns == columns for share in self._shares[name]):
            return self._read_columns(name, columns, start, start + elements)
        first_row, last_row = start // number, -(-(start + elements) // number)
        rows = self.read_range(name, first_row * shape[-1], last_row * shape[-1])
        found = rows.view(-1, shape[-1])[:, first : first + number].reshape(-1)
        return found[start - first_row * number :][:elements]

    def _read_columns(self, name: str, columns: Columns, start: int, stop: int) -> Tensor:
        shares = [share for share in self._shares[name] if share.columns == columns]
        return self._read_shares(name, shares, start, stop)

    def _read_shares(self, name: str, shares: list[Share], start: int, stop: int) -> Tensor:
        dtype = self._forms[name].dtype
        values = torch.empty(stop - start, dtype=dtype)
        buffer = _bytes_of(values)
        for share in shares:
            first, last = max(start, share.start), min(stop, share.stop)
            if first >= last:
                continue
            place = slice((first - start) * dtype.itemsize, (last - start) * dtype.itemsize)
            try:
                with share.path.open("rb", buffering=0) as file:
                    file.seek(share.first_byte + (first - share.start) * dtype.itemsize)
                    _read_all(file, buffer[place])
            except (OSError, EOFError) as error:
                raise CheckpointError(
                    f"{share.path} cannot be read ({error}): it is damaged, take another folder"
                ) from None
        return values


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor; as bytes, because numpy has no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_all(file: Any, buffer: memoryview) -> None:
    # One call of the system reads at most 2 GB.
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("it ends too early")
        buffer = buffer[count:]
