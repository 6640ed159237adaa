"""Tensors in safetensors files, one at a time: what is written or read never stands in memory as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.errors import CheckpointError

FORMAT_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}


class TensorForm(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """A safetensors file whose header is written first and whose tensors follow in any order, each at its place.

    The format (https://github.com/huggingface/safetensors#format) is the header's length in 8 bytes, the header in JSON, the numbers.

    Args:
        forms: of every tensor that will come.

    Raises:
        CheckpointError: for a tensor that is unknown, comes twice or has another form, and on leaving where one never came.
        OSError: where the disk has no room for all of them.
    """

    def __init__(self, path: Path, forms: Mapping[str, TensorForm]) -> None:
        self.path, self.missing, self._forms = path, set(forms), dict(forms)
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # The widest numbers come first, so that each tensor starts at a multiple of its own width.
        for name, form in sorted(forms.items(), key=lambda item: -item[1].dtype.itemsize):
            self._starts[name], end = end, end + form.bytes
            header[name] = {"dtype": FORMAT_NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [self._starts[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self._file = path.open("wb")
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.flush()
            if end:
                os.posix_fallocate(self._file.fileno(), self._first, end)
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if error is None and self.missing:
            raise CheckpointError(f"the tensor '{min(self.missing)}' is missing ({len(self.missing)} missing): {self.path.name} would be incomplete")

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, of any strides."""
        if name not in self._forms:
            raise CheckpointError(f"there is no place for the tensor '{name}' in {self.path.name}: it does not belong to the model")
        if name not in self.missing:
            raise CheckpointError(f"the tensor '{name}' came twice: it belongs into {self.path.name} once")
        form = TensorForm(tensor.dtype, tuple(tensor.shape))
        if form != self._forms[name]:
            wanted = self._forms[name]
            raise CheckpointError(f"the tensor '{name}' is {form.dtype} {list(form.shape)}, and should be {wanted.dtype} {list(wanted.shape)}")
        self._file.seek(self._first + self._starts[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.missing.remove(name)
