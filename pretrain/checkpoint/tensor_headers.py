"""The headers of safetensors files, and what ours say of ranges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pretrain.core.errors import CheckpointError

FORMAT_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
DTYPES_OF_NAMES = {name: dtype for dtype, name in FORMAT_NAMES.items()}
RANGES = "ranges"
# Of a header: a longer one is no file of ours, and the library refuses it too.
LARGEST_HEADER_BYTES = 100_000_000


class TensorForm(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return self.elements * self.dtype.itemsize


class Columns(NamedTuple):
    """Some neighbouring elements of a tensor's last dimension."""

    first: int
    number: int


class Range(NamedTuple):
    """Where a flat part of a tensor belongs.

    Attributes:
        start: its first element, in the whole tensor or among those of ``columns``.
        shape: of the whole tensor.
        columns: that it is a part of; None for all.
    """

    start: int
    shape: tuple[int, ...]
    columns: Columns | None = None

    @property
    def is_first(self) -> bool:
        """Whether it begins with the whole tensor's first element."""
        return self.start == 0 and (self.columns is None or self.columns.first == 0)

    def entry(self) -> list[object]:
        """What a header says of it."""
        return list(self) if self.columns is not None else [self.start, self.shape]


def all_columns(shape: tuple[int, ...]) -> Columns:
    """The last dimension of a tensor of this shape."""
    return Columns(0, shape[-1] if shape else 1)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The decoded header of a file, and the offset of its values."""
    # The library checks that the header is sound and that the tensors fill the file.
    with _opened(path):
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, LARGEST_HEADER_BYTES))
    return dict(json.loads(text)), 8 + size


def read_ranges(text: str, path: Path) -> dict[str, Range]:
    """Decode the ranges in a header, which anybody may have written."""
    try:
        found = {
            name: Range(
                int(start),
                tuple(int(size) for size in shape),
                *(Columns(int(first), int(number)) for first, number in columns),
            )
            for name, (start, shape, *columns) in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        found = {"": Range(-1, ())}
    if any(
        min(start, *shape, *(columns or ()), 0) < 0 or (columns is not None and not shape)
        for start, shape, columns in found.values()
    ):
        raise CheckpointError(
            f"the header of {path} has ranges that are none: it is damaged, take another folder"
        )
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the weights are incomplete, take another folder"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged, take another folder"
        ) from None
