"""The small copies of published models, what each consists of, and the one that has most of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.shipped import recipe_names

SMALL_RECIPES = {name: load_recipe(name) for name in recipe_names() if name.endswith("_mini")}


def parts(recipe: Recipe) -> set[str]:
    """What a model consists of beside its sizes: each kind, each switch, and which optional numbers
    are given.
    """
    return set(_walk(recipe.model.model_dump(), ""))


def _walk(section: dict[str, Any], path: str) -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{path}{name}.")
        elif isinstance(value, str | bool):
            yield f"{path}{name}={value}"
        else:
            yield f"{path}{name} {'given' if value else 'not given'}"


def kinds(recipe: Recipe) -> set[str]:
    return {part for part in parts(recipe) if "kind=" in part}


def richest(recipes: dict[str, Recipe]) -> str:
    """The one with the most kinds, then the most parts."""
    return max(
        sorted(recipes), key=lambda name: (len(kinds(recipes[name])), len(parts(recipes[name])))
    )


def overrides_without_chance(recipe: Recipe) -> list[str]:
    """Overrides that leave nothing to chance in training; none where nothing is."""
    router = getattr(recipe.model.moe, "router", None)
    found = ["model.dropout={}"] if any(recipe.model.dropout.model_dump().values()) else []
    return found + (["model.moe.router.jitter=0"] if router is not None and router.jitter else [])
