"""The command that trains on data which were just built."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from pretrain.config.load import (
    apply_override,
    import_plugins,
    read_recipe_file,
    validate_recipe,
)
from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import DEFAULT_DS_CONFIG, LAUNCHERS, shown


def next_command(recipe: str, overrides: list[str], path: Path) -> str:
    """Return the command that trains on the data, with the overrides that its recipe takes."""
    kept: list[str] = []
    for override in overrides:
        # An override of a section that an option has replaced, such as --input the source, may
        # name what the recipe's own section does not have. Overrides may need earlier ones.
        with suppress(ConfigError):
            _trained_recipe(recipe, [*kept, override])
            kept.append(override)
    if Path(_trained_recipe(recipe, kept).data_path) != path:
        kept.append(f"data.path={path}")
    command = ["deepspeed", "--num_accelerators", "2", shown(LAUNCHERS / "pretrain.py")]
    command += ["--ds_config", DEFAULT_DS_CONFIG, *plugin_arguments(), "--recipe", recipe]
    return shlex.join([*command, *(part for value in kept for part in ("--set", value))])


def _trained_recipe(name: str, overrides: list[str]) -> Recipe:
    content, origin = read_recipe_file(name)
    for override in overrides:
        apply_override(content, override)
    import_plugins(content)
    return validate_recipe(content, origin)
