"""The small twins of published models, what each consists of, and a few of them that have most of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.config.load import load_recipe, recipe_names
from pretrain.config.schema import Recipe

MINIS = {name: load_recipe(name) for name in recipe_names() if name.endswith("_mini")}


def parts(recipe: Recipe) -> set[str]:
    """What a model consists of beside its sizes: each kind, each switch, and which optional numbers are given."""
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


def cover(recipes: dict[str, Recipe], count: int) -> list[str]:
    """``count`` names, each next one with the most kinds, then the most parts, that the ones before it lack."""
    chosen: list[str] = []
    covered: set[str] = set()
    for _ in range(count):
        best = max(sorted(recipes.keys() - set(chosen)), key=lambda name: (len(kinds(recipes[name]) - covered), len(parts(recipes[name]) - covered)))
        chosen.append(best)
        covered |= parts(recipes[best])
    return chosen


def quiet(recipe: Recipe) -> list[str]:
    """Overrides that leave nothing to chance in training; none where nothing is."""
    router = getattr(recipe.model.moe, "router", None)
    found = ["model.dropout={}"] if any(recipe.model.dropout.model_dump().values()) else []
    return found + (["model.moe.router.jitter=0"] if router is not None and router.jitter else [])
