"""Which tensors of a checkpoint belong to a model, told before a number is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.checkpoint.weights_folder import tensor_shapes
from pretrain.config.model_schema import ModelConfig

Shape = tuple[int, ...]
REMEDY = "change the recipe's model, choose another, or set initial_weights_partial=true to start from what fits"


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    loaded: names that both have in the same shape.
    missing: what the model has and the checkpoint has not.
    unexpected: what the checkpoint has and the model has not.
    wrong_shapes: name, shape in the checkpoint, shape in the model.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    wrong_shapes: list[tuple[str, Shape, Shape]]

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shapes)

    @property
    def counts(self) -> str:
        return (
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.wrong_shapes)} of another shape, {len(self.loaded)} that fit"
        )

    def first_fault(self, where: str) -> str:
        """A sentence about the first tensor that does not fit."""
        if self.missing:
            what = f"{where} has no tensor '{self.missing[0]}', which the recipe's model has"
        elif self.unexpected:
            what = f"{where} has a tensor '{self.unexpected[0]}', which the recipe's model has not"
        else:
            name, stored, wanted = self.wrong_shapes[0]
            what = f"{where}: the tensor '{name}' is {list(stored)}, and the recipe's model wants {list(wanted)}"
        return f"{what} ({self.counts}): {REMEDY}"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table of what does not fit: tensor, what is wrong with it, shape in the checkpoint, what becomes of it."""
        random, ignored = "starts at random", "is not read"
        return [
            *((name, "missing", "", random) for name in self.missing),
            *((name, "of another shape", f"{list(stored)}, not {list(wanted)}", random) for name, stored, wanted in self.wrong_shapes),
            *((name, "unexpected", "", ignored) for name in self.unexpected),
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(stored: Mapping[str, Shape], model: ModelConfig) -> Comparison:
    """The shapes of a checkpoint's tensors against those of ``model``; names in alphabetical order."""
    dense, experts = tensor_shapes(model)
    shapes = dense | experts
    shared = sorted(shapes.keys() & stored.keys())
    return Comparison(
        loaded=[name for name in shared if stored[name] == shapes[name]],
        missing=sorted(shapes.keys() - stored.keys()),
        unexpected=sorted(stored.keys() - shapes.keys()),
        wrong_shapes=[(name, tuple(stored[name]), shapes[name]) for name in shared if stored[name] != shapes[name]],
    )
