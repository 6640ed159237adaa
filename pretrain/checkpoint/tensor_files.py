"""Reads and writes safetensors files one tensor at a time, so that no file is whole in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
_DTYPES = {name: dtype for dtype, name in FORMAT_NAMES.items()}


class TensorForm(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """Writes a safetensors file: first its header, then the tensors in any order.

    The format (https://github.com/huggingface/safetensors#format) is the header's length in 8
    bytes, the header in JSON, the values.

    Args:
        forms: of every tensor that will be written.

    Raises:
        CheckpointError: for a tensor that is unknown, comes twice or has another form, and on
            leaving if one never came.
        OSError: if the disk has no space for all of them.
    """

    def __init__(self, path: Path, forms: Mapping[str, TensorForm]) -> None:
        self.path = path
        self.missing = set(forms)
        self._forms = dict(forms)
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
        text = json.dumps(header, separators=(",", ":")).encode()
        # Spaces align the values to 8 bytes.
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self._file = path.open("wb")
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
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
        # As bytes, because numpy has no bfloat16; a view as uint8 needs contiguous memory.
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.seek(self._first + self._starts[name])
        self._file.write(values.numpy().data)
        self.missing.remove(name)


class TensorReader:
    """The tensors of several safetensors files, read one by one.

    A tensor that several files have a share of is joined along its first dimension. A file is
    opened for each reading and closed afterwards: while it is open, its pages count as this
    process' memory.

    Args:
        paths: in the order in which shares of a tensor are joined.

    Attributes:
        metadata: the strings in the files' headers.

    Raises:
        CheckpointError: for a file that is missing, cut off or not safetensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._holders: dict[str, list[tuple[Path, TensorForm]]] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            with _opened(path) as file:
                self.metadata |= file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"the tensor '{name}' in {path} is stored as {part.get_dtype()}: "
                            "convert it to a floating type first"
                        )
                    # A slice object reads no values: shapes of any model are known in milliseconds.
                    self._holders.setdefault(name, []).append(
                        (path, TensorForm(dtype, tuple(part.get_shape())))
                    )

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the files' order."""
        return list(self._holders)

    def holders(self, name: str) -> list[tuple[Path, TensorForm]]:
        """Return the files that have a share of a tensor, with the share's form."""
        return self._holders[name]

    def form(self, name: str) -> TensorForm:
        """Return the form of the joined tensor."""
        forms = [form for _, form in self._holders[name]]
        if len(forms) == 1:
            return forms[0]
        joined = sum(form.shape[0] for form in forms)
        return TensorForm(forms[0].dtype, (joined, *forms[0].shape[1:]))

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a whole tensor, or what is at ``index`` of its first dimension."""
        holders = self._holders[name]
        if index is None:
            shares = [self._share(path, name) for path, _ in holders]
            return shares[0] if len(shares) == 1 else torch.cat(shares)
        # Count the index down to the share that it is in.
        for path, form in holders:
            if index < form.shape[0]:
                return self._share(path, name, index)
            index -= form.shape[0]
        raise IndexError(f"the tensor '{name}' has no index {index}")

    @staticmethod
    def _share(path: Path, name: str, index: int | None = None) -> Tensor:
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the weights are incomplete, take another folder"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged, take another folder"
        ) from None
