"""Which tensors of a checkpoint fit a model, and which fields say that they mean something else.

No tensor is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.differences import Difference, differences, with_field
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.core.section import Effect
from pretrain.model.config import ModelConfig

Shape = tuple[int, ...]
REMEDY = (
    "change the recipe's model, choose another, or set initial_weights_partial=true to start from "
    "what fits"
)


@dataclass(frozen=True)
class Comparison:
    """The names and shapes of a checkpoint's tensors, compared with those of a model.

    Attributes:
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
        """Whether every tensor of both fits."""
        return not (self.missing or self.unexpected or self.wrong_shapes)

    @property
    def counts(self) -> str:
        """How many tensors fit and do not, in words."""
        return (
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.wrong_shapes)} of another shape, {len(self.loaded)} that fit"
        )

    def first_fault(self, where: str) -> str:
        """Return a sentence about the first tensor that does not fit."""
        if self.missing:
            what = f"{where} has no tensor '{self.missing[0]}', which the recipe's model has"
        elif self.unexpected:
            what = f"{where} has a tensor '{self.unexpected[0]}', which the recipe's model has not"
        else:
            name, stored, wanted = self.wrong_shapes[0]
            what = (
                f"{where}: the tensor '{name}' is {list(stored)}, and the recipe's model wants "
                f"{list(wanted)}"
            )
        return f"{what} ({self.counts}): {REMEDY}"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return a table of what does not fit.

        Its columns: tensor, what is wrong with it, its shape in the checkpoint, and what happens to
        it.
        """
        random = "starts at random"
        ignored = "is not read"
        return [
            *((name, "missing", "", random) for name in self.missing),
            *(
                (name, "of another shape", f"{list(stored)}, not {list(wanted)}", random)
                for name, stored, wanted in self.wrong_shapes
            ),
            *((name, "unexpected", "", ignored) for name in self.unexpected),
        ]

    def to_dict(self) -> JsonObject:
        """Return it as ``initial_weights.json`` has it."""
        return asdict(self)


def compare(stored: Mapping[str, Shape], model: ModelConfig) -> Comparison:
    """Compare the shapes of a checkpoint's tensors with those of ``model``; names are sorted."""
    # Shapes of the whole model, with the experts of all ranks.
    dense, experts = tensor_shapes(model)
    shapes = dense | experts
    shared = sorted(shapes.keys() & stored.keys())
    return Comparison(
        loaded=[name for name in shared if stored[name] == shapes[name]],
        missing=sorted(shapes.keys() - stored.keys()),
        unexpected=sorted(stored.keys() - shapes.keys()),
        wrong_shapes=[
            (name, tuple(stored[name]), shapes[name])
            for name in shared
            if stored[name] != shapes[name]
        ],
    )


def unread_differences(
    stored: ModelConfig, wanted: ModelConfig, loaded: Collection[str]
) -> list[Difference]:
    """Return the fields by which tensors of one name and shape mean something else in ``wanted``.

    Weights must not be taken over then. Among these fields are parts of other kinds, and a field
    that says what is in a tensor which is loaded: 4 heads of 16 and 8 heads of 8 have matrices of
    one shape. A field is not among them if each of its tensors has another name or shape, so that
    none of them is loaded.

    Args:
        loaded: names of the tensors that would be taken over.
    """
    return [
        one
        for one in differences(stored, wanted)
        if one.effect is Effect.MEANING
        and (one.is_kind or not _shows_in_shapes(stored, wanted, one.path, loaded))
    ]


def _shows_in_shapes(
    stored: ModelConfig, wanted: ModelConfig, path: str, loaded: Collection[str]
) -> bool:
    """Whether a field decides on names or shapes of tensors, and none of those is loaded."""
    # Build the stored model with this one field changed, and look which shapes follow it.
    try:
        shapes = [
            dense | experts
            for dense, experts in map(tensor_shapes, (stored, with_field(stored, wanted, path)))
        ]
    except (ConfigError, ArithmeticError, AssertionError, RuntimeError, ValueError):
        # The one field alone makes a model that cannot be built: its weights are not known to be
        # safe.
        return False
    decided = {
        name
        for name in shapes[0].keys() | shapes[1].keys()
        if shapes[0].get(name) != shapes[1].get(name)
    }
    # A field that no shape depends on cannot be seen in shapes: it counts as a difference.
    return bool(decided) and decided.isdisjoint(loaded)


def check_same_function(models: Sequence[ModelConfig], places: Sequence[str]) -> None:
    """Check that equal weights compute the same in all models.

    Args:
        places: where each model is from, for the sentence.

    Raises:
        CheckpointError: naming every field in which another one differs from the first, both
            values, and both places.
    """
    # Fields that only training reads may differ: a mean of dropout 0 and 0.1 is a model.
    for model, place in zip(models[1:], places[1:], strict=True):
        found = [one for one in differences(models[0], model) if one.effect is not Effect.NONE]
        if found:
            fields = ", ".join(f"{one.path} ({one.values[0]} and {one.values[1]})" for one in found)
            raise CheckpointError(
                f"{places[0]} and {place} differ in {fields}: the same weights compute different "
                "things in them; give models that differ in what training alone reads"
            )
