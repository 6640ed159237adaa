"""Tensors in safetensors files, one at a time: what is written or read never stands in memory as a
whole.
"""

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
        return prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """A safetensors file whose header is written first and whose tensors follow in any order, each
    at its place.

    The format (https://github.com/huggingface/safetensors#format) is the header's length in 8
    bytes, the header in JSON, the numbers.

    Args:
        forms: of every tensor that will come.

    Raises:
        CheckpointError: for a tensor that is unknown, comes twice or has another form, and on
            leaving where one never came.
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
            header[name] = {
                "dtype": FORMAT_NAMES[form.dtype],
                "shape": list(form.shape),
                "data_offsets": [self._starts[name], end],
            }
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None and self.missing:
            raise CheckpointError(
                f"the tensor '{min(self.missing)}' is missing ({len(self.missing)} missing):"
                f" {self.path.name} would be incomplete"
            )

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, of any strides."""
        if name not in self._forms:
            raise CheckpointError(
                f"there is no place for the tensor '{name}' in {self.path.name}: it does not belong"
                " to the model"
            )
        if name not in self.missing:
            raise CheckpointError(
                f"the tensor '{name}' came twice: it belongs into {self.path.name} once"
            )
        form = TensorForm(tensor.dtype, tuple(tensor.shape))
        if form != self._forms[name]:
            wanted = self._forms[name]
            raise CheckpointError(
                f"the tensor '{name}' is {form.dtype} {list(form.shape)}, and should be"
                f" {wanted.dtype} {list(wanted.shape)}"
            )
        self._file.seek(self._first + self._starts[name])
        self._file.write(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
        self.missing.remove(name)


class TensorReader:
    """The tensors of several safetensors files, read one by one; a name that several files have is
    joined along its first dimension.

    A file is opened for each reading and closed behind it: its pages would count as this process'
    memory for as long as it is open.

    Args:
        paths: in the order in which shares of a tensor are joined.

    Attributes:
        metadata: the texts that the files' headers hold beside the tensors.

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
                            f"the tensor '{name}' in {path} is stored as {part.get_dtype()}:"
                            " convert it to a floating type first"
                        )
                    self._holders.setdefault(name, []).append(
                        (path, TensorForm(dtype, tuple(part.get_shape())))
                    )

    @property
    def names(self) -> list[str]:
        """In the files' order."""
        return list(self._holders)

    def holders(self, name: str) -> list[tuple[Path, TensorForm]]:
        """The files that have a share of a tensor, with its form."""
        return self._holders[name]

    def form(self, name: str) -> TensorForm:
        """Of the joined tensor."""
        forms = [form for _, form in self._holders[name]]
        if len(forms) == 1:
            return forms[0]
        return TensorForm(
            forms[0].dtype, (sum(form.shape[0] for form in forms), *forms[0].shape[1:])
        )

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A whole tensor, or what stands at ``index`` of its first dimension."""
        holders = self._holders[name]
        if index is None:
            shares = [self._share(path, name) for path, _ in holders]
            return shares[0] if len(shares) == 1 else torch.cat(shares)
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
