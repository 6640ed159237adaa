"""The architectures that a checkpoint can be exported to, and which of them can compute what a recipe describes."""

from __future__ import annotations

from typing import Any, Protocol

from pretrain.config.errors import ConfigError
from pretrain.config.model_schema import ModelConfig
from pretrain.config.schema import Recipe
from pretrain.export.name_map import Link
from pretrain.export.qwen3_moe import Qwen3Moe


class ExportTarget(Protocol):
    """An architecture of transformers. A new one is a file with such a class, and a line in ``TARGETS``."""

    architecture: str

    def reasons_against(self, model: ModelConfig) -> list[str]:
        """Why the architecture cannot compute what ``model`` computes, a clause each; empty when it can."""

    def links(self, model: ModelConfig) -> list[Link]:
        """A link for each tensor of the export; only asked where nothing speaks against it."""

    def config(self, model: ModelConfig, eod_id: int) -> dict[str, Any]:
        """The architecture's own fields of ``config.json``."""


TARGETS: tuple[ExportTarget, ...] = (Qwen3Moe(),)


def representable(recipe: Recipe) -> list[str]:
    """Why no target can compute what the recipe's model computes, a clause each; empty when one can."""
    against = {target.architecture: target.reasons_against(recipe.model) for target in TARGETS}
    if not all(against.values()):
        return []
    return [f"{reason} ({architecture})" for architecture, reasons in against.items() for reason in reasons]


def choose_target(recipe: Recipe) -> ExportTarget:
    """The first target that computes exactly what the recipe's model computes.

    Raises:
        ConfigError: with every reason, when there is none.
    """
    for target in TARGETS:
        if not target.reasons_against(recipe.model):
            return target
    raise ConfigError(
        f"the model of '{recipe.name}' has no exact counterpart in transformers: {'; '.join(representable(recipe))}; "
        "convert it with --to safetensors, or train one that has"
    )
