"""The targets of an export, and which of them can compute the model of a recipe."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pretrain.export.architectures
import pretrain.export.custom.target  # defines a target too
from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.core.registry import classes_by_name
from pretrain.export.architectures.llama_like import LlamaLike
from pretrain.export.architectures.target import ExportTarget

AUTO = "auto"

# A file in the folder is an architecture: importing it defines its target, and no list names it.
for _file in iter_modules(pretrain.export.architectures.__path__, "pretrain.export.architectures."):
    import_module(_file.name)


def targets() -> list[ExportTarget]:
    """Return every target, those of plugins too, in the order in which ``auto`` tries them."""
    # The family is only a name here, and nothing makes one of it.
    found = classes_by_name(ExportTarget).values()  # type: ignore[type-abstract]
    return [each() for each in sorted(found, key=lambda each: each.order)]


def architectures() -> list[LlamaLike]:
    """Return the targets that ``--from hf`` opens as well."""
    return [target for target in targets() if isinstance(target, LlamaLike)]


def target_names() -> list[str]:
    """Return what ``--target`` may be, but ``auto``."""
    return [target.name for target in targets()]


def representable(recipe: Recipe) -> dict[str, list[str]]:
    """Return the reasons against each target, a clause each; none if it can compute the model."""
    return {target.name: target.reasons_against(recipe.model) for target in targets()}


def choose_target(recipe: Recipe, name: str = AUTO) -> ExportTarget:
    """Return the target of that name, or the first one, that computes exactly the recipe's model.

    Raises:
        ConfigError: with every reason, if there is none.
    """
    reasons = representable(recipe)
    asked = [target for target in targets() if name in (AUTO, target.name)]
    if not asked:
        raise ConfigError(
            f"there is no target '{name}': choose {AUTO} or one of {', '.join(target_names())}"
        )
    for target in asked:
        if not reasons[target.name]:
            return target
    listed = "".join(f"\n  {target.name}: {'; '.join(reasons[target.name])}" for target in asked)
    what = (
        "no exact counterpart in transformers"
        if name == AUTO
        else f"no exact counterpart in {name}"
    )
    raise ConfigError(
        f"the model of '{recipe.name}' has {what}; convert it with --to safetensors, or train one"
        f" that has. Against it speaks:{listed}"
    )
