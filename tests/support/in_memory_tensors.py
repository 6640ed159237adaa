"""Tensors that are read without files."""

from __future__ import annotations

from torch import Tensor

from pretrain.checkpoint.tensor_headers import TensorForm


class InMemoryTensors:
    """Tensors in memory behind the interface of a reader of files."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def form(self, name: str) -> TensorForm:
        return TensorForm(self.tensors[name].dtype, tuple(self.tensors[name].shape))

    def read(self, name: str, index: int | None = None) -> Tensor:
        return self.tensors[name] if index is None else self.tensors[name][index]
