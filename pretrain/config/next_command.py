"""Commands that a tool prints for its user to type next: whole, and quoted for the shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.config.load import (
    apply_override,
    import_plugins,
    read_recipe_file,
    validate_recipe,
)
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.errors import ConfigError
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import DEFAULT_DS_CONFIG, LAUNCHERS, shown

# Linux takes no argument of more than 128 KiB.
LONGEST_SETTING = 100_000
MOST_RANKS = 4096


def training_command(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    ranks: int = 1,
    ds_config: str | Path = DEFAULT_DS_CONFIG,
) -> str:
    """Return the command that trains a recipe, with this process's plugins.

    Args:
        recipe: its name or path.
        overrides: values of ``--set``.
        ranks: more than one are started by the deepspeed launcher.
    """
    launcher = ["deepspeed", "--num_accelerators", str(ranks)] if ranks > 1 else ["python"]
    command = [*launcher, shown(LAUNCHERS / "pretrain.py"), "--ds_config", str(ds_config)]
    command += [*plugin_arguments(), "--recipe", str(recipe)]
    return shlex.join([*command, *(part for value in overrides for part in ("--set", value))])


def fewest_ranks(recipe: Recipe, at_least: int) -> int:
    """Return the smallest number of ranks that the recipe's sizes allow with ZeRO stage 1.

    A smaller one than ``at_least`` if no other fits, and ``at_least`` itself if none does: the
    training then says what does not fit.
    """
    for ranks in [*range(at_least, MOST_RANKS + 1), *range(at_least - 1, 0, -1)]:
        with suppress(ConfigError):
            check_topology(recipe, ranks, 1)
            return ranks
    return at_least


def next_command(name: str, overrides: list[str], built: Recipe, path: Path) -> str:
    """Return the command that trains on data which were just built.

    Args:
        name: the recipe's name or path.
        overrides: of the build; those that the recipe does not take are left out.
        built: the recipe with what every option of the build has made of its data section. The
            command says that too, so that a saved run names what its data were built from.
        path: of the data.
    """
    kept: list[str] = []
    for override in overrides:
        # An override of a section that an option has replaced, such as --input the source, may
        # name what the recipe's own section does not have. Overrides may need earlier ones.
        with suppress(ConfigError):
            _trained_recipe(name, [*kept, override])
            kept.append(override)
    trained = _trained_recipe(name, kept)
    places = {"path", "corpora"}
    now, wanted = (
        recipe.data.model_dump(mode="json", exclude=places) for recipe in (trained, built)
    )
    short = built.data.model_dump(mode="json", exclude=places, exclude_defaults=True)
    # Field by field: the section as a whole would lose its place. A dump may lack what is null.
    settings = [
        setting
        for key in dict.fromkeys([*wanted, *now])
        for setting in _settings(f"data.{key}", now.get(key), wanted.get(key), short.get(key))
    ]
    # "source" and "sources" exclude each other: what is taken out comes first.
    settings.sort(key=lambda setting: not setting.endswith("=null"))
    kept += [setting for setting in settings if len(setting) <= LONGEST_SETTING]
    if Path(trained.data_path) != path or trained.data.corpora is not None:
        kept += ["data.corpora=null"] if trained.data.corpora is not None else []
        kept.append(f"data.path={_yaml(str(path))}")
    return training_command(name, kept, ranks=fewest_ranks(built, at_least=2))


def _settings(place: str, now: Any, wanted: Any, short: Any) -> Iterator[str]:
    """Yield the overrides that make one dumped section the other, as short as they can be.

    Args:
        short: ``wanted`` without its defaults.
    """
    if now == wanted:
        return
    is_same_kind = (
        isinstance(now, dict)
        and isinstance(wanted, dict)
        and now.get("kind") == wanted.get("kind")
        # A mapping whose keys are a user's own, such as sources, is replaced whole.
        and now.keys() == wanted.keys()
        and not any("." in key for key in wanted)
    )
    if not is_same_kind:
        yield f"{place}={_yaml(_with_kinds(wanted, short))}"
        return
    for key in wanted:
        below = short.get(key) if isinstance(short, dict) else None
        yield from _settings(f"{place}.{key}", now[key], wanted[key], below)


def _with_kinds(wanted: Any, short: Any) -> Any:
    """Return a dump without defaults, with the kind of each section in it."""
    if not isinstance(wanted, dict):
        return wanted
    kept = short if isinstance(short, dict) else {}
    keys = [key for key in wanted if key in kept or key == "kind"]
    return {key: _with_kinds(wanted[key], kept.get(key)) for key in keys}


def _yaml(value: Any) -> str:
    """Return a value as ``--set`` reads it back; a plain word or path without quotes."""
    if isinstance(value, str) and value and value == value.strip() and _is_plain(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _is_plain(text: str) -> bool:
    """Whether YAML reads a text as itself without quotes, for certain."""
    return (
        text[0].isalpha()
        and all(character.isalnum() or character in "/._- " for character in text)
        and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    )


def _trained_recipe(name: str, overrides: list[str]) -> Recipe:
    content, origin = read_recipe_file(name)
    for override in overrides:
        apply_override(content, override)
    import_plugins(content)
    return validate_recipe(content, origin)
