"""The weights of a checkpoint as a mapping that reads a tensor when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.weights import open_weights


class StoredWeights(Mapping[str, Tensor]):
    """All weights of a checkpoint, with the experts of all ranks joined.

    That is the state of a model at ep_size 1, in fp32.

    Attributes:
        folder: of the checkpoint.
        shapes: of every tensor, by name; known without reading one.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = open_weights(folder)
        # From the headers: a layer's experts can be planned for before one of them is read.
        self.shapes = {name: self._reader.form(name).shape for name in self._reader.names}

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.read(name)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """The elements ``start`` to ``stop`` (excluded) of a tensor, flat."""
        return self._reader.read_range(name, start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
