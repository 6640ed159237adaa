"""Tensors that are made of several of ours, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.config.errors import CheckpointError

Form = Literal["same", "stack", "rows"]


@dataclass(frozen=True)
class Join:
    """One tensor of an export.

    Attributes:
        theirs: its name.
        ours: what it is made of, in order.
        form: 'same', one of ours; 'stack', one of each expert, stacked; 'rows', stacked experts whose rows follow each other.
        rows: how many of the first rows are written, where the vocabulary is padded.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Form = "same"
    rows: int | None = None

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The export's tensor; shares memory with ours where that is one whole tensor.

        Raises:
            CheckpointError: when one of ours is missing.
        """
        if missing := [name for name in self.ours if name not in ours]:
            raise CheckpointError(f"the checkpoint has no tensor '{missing[0]}': it does not belong to its recipe")
        tensors = [ours[name] for name in self.ours]
        if self.form == "same":
            return tensors[0][: self.rows].contiguous()
        return torch.stack(tensors) if self.form == "stack" else torch.cat(tensors, dim=1)

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Ours again; of the vocabulary the written rows."""
        if self.form == "same":
            return {self.ours[0]: theirs}
        return dict(zip(self.ours, theirs.unbind(0) if self.form == "stack" else theirs.chunk(len(self.ours), dim=1), strict=True))
