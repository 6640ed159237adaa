"""Loads a recipe: from its name or path and dotted overrides to a checked :class:`Recipe`."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pretrain.config.error_sentences import sentence
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_recipe
from pretrain.core.credentials import refuse_credentials
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.core.plugins import (
    add_loaded_plugins,
    load_plugins,
    plugins_in,
    trust_remedy,
    untrusted_plugins,
)
from pretrain.core.shipped import RECIPES, recipe_names

# The name of the recipe that runs, checkpoints and exports are saved with, and of a file in the
# folder of every sweep.
RECORD = "recipe.yaml"
MOST_VALUES = 200_000
DEEPEST_BRACKETS = 200
BRACKETS = re.compile(r"[][{}]")
STUDY = "study.json"


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML as recipes mean it.

    YAML 1.1 takes ``2e-3`` for a string; here it is a number. A key that is there twice is an
    error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys differ."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


# A copy: the resolvers of SafeLoader are shared by every loader of the process.
RecipeLoader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: if it is not valid, or its aliases make it too large.
    """
    try:
        # Before the parser, which takes minutes for a thousand brackets and then no more stack.
        if _bracket_depth(text) > DEEPEST_BRACKETS:
            raise RecursionError
        value = yaml.load(text, Loader=RecipeLoader)
    except RecursionError:
        raise ConfigError(f"{origin} is not valid YAML: it is nested too deeply") from None
    # The constructors of dates and numbers raise errors of Python's own: 2020-13-45 is no date.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{origin} is not valid YAML: {' '.join(str(error).split())[:400]}"
        ) from None
    if _is_larger_than(value, MOST_VALUES):
        raise ConfigError(
            f"{origin} is not valid YAML: with its aliases it has more than {MOST_VALUES:,} values"
        )
    return value


def _bracket_depth(text: str) -> int:
    """Return how deeply brackets are nested, those in strings included."""
    deepest = depth = 0
    for bracket in BRACKETS.findall(text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _is_larger_than(value: Any, limit: int) -> bool:
    """Whether a value has more than ``limit`` values in it, each alias counted as a copy."""
    # Ten lines of aliases of aliases make 10^9 values, which take no memory until they are walked.
    count = 0
    waiting = [value]
    while waiting and count <= limit:
        count += 1
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return count > limit


def read_recipe_file(name_or_path: str) -> tuple[JsonObject, str]:
    """Read a shipped recipe or a YAML file over its base, and import its plugins.

    Returns:
        The mapping, with every plugin of this process under ``plugins``, and where it came from.

    Raises:
        ConfigError: for an unknown recipe or base, a file that is no recipe, bases that lead back
            to themselves, and plugins that cannot be imported.
    """
    content, origin = _read_with_base(_recipe_path(name_or_path, Path()), (), is_record=False)
    import_plugins(content)
    return content, origin


def import_plugins(content: JsonObject) -> None:
    """Import the plugins that a user's recipe names, and add those of ``--plugin`` to it.

    So the saved recipe is complete. It must be called again after overrides, which may name plugins
    too, and never for a mapping from the folder of a checkpoint, a run, a sweep or an export: see
    :mod:`pretrain.core.plugins`.
    """
    load_plugins(plugins_in(content))
    add_loaded_plugins(content)


def _recipe_path(name_or_path: str, folder: Path) -> Path:
    """Return a shipped recipe's file, or a path relative to ``folder``."""
    shipped = RECIPES / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else folder / name_or_path
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
        hint = "shipped recipes are " + ", ".join(recipe_names())
        if near:
            hint = f"did you mean '{near[0]}'?"
        raise ConfigError(
            f"there is no recipe '{name_or_path}', neither in {RECIPES} nor as a file: {hint}"
        )
    return path


def _read_with_base(path: Path, above: tuple[Path, ...], is_record: bool) -> tuple[JsonObject, str]:
    """Read a recipe's file over its base.

    Args:
        above: the files that led here, by ``base``.
        is_record: whether one of them is a record: its author also chose what it leads to.
    """
    # A base that a record leads to is no more trustworthy than the record.
    is_record = is_record or _is_record(path)
    content = _read_mapping(path)
    if path.resolve() in above:
        raise ConfigError(
            f"{path}: its base leads back to itself: "
            f"{' -> '.join(file.name for file in (*above, path))}; take one 'base' out"
        )
    if is_record:
        _refuse_code(path, content)
    if "base" not in content:
        return content, str(path)
    base = content.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' is the name or the path of one recipe (got {base!r})")
    try:
        below = _recipe_path(base, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: 'base': {error}") from None
    lower, origin = _read_with_base(below, (*above, path.resolve()), is_record)
    merged = merge(lower, content)
    if plugins := dict.fromkeys([*plugins_in(lower), *plugins_in(content)]):
        # The kinds of a base's plugins may be used above it too.
        merged["plugins"] = list(plugins)
    return merged, f"{path} on {origin}"


def _is_record(path: Path) -> bool:
    """Whether a file is the recipe that a run, a checkpoint, an export or a sweep was saved with.

    It may come from anybody, and so may whatever is next to it.
    """
    return path.name == RECORD or (path.parent / STUDY).is_file()


def _refuse_code(path: Path, content: JsonObject) -> None:
    """Refuse a record that names code which would run when it is read or trained."""
    if untrusted := untrusted_plugins(content):
        raise ConfigError(
            f"{path} is what a finished or running training has saved, and it names the plugin "
            f"{', '.join(untrusted)}: {trust_remedy(untrusted)}"
        )
    evaluation = content.get("evaluation")
    if (
        path.name == RECORD
        and isinstance(evaluation, dict)
        and evaluation.get("include_path") is not None
    ):
        raise ConfigError(
            f"{path} is what a training has saved, and its evaluation.include_path names a folder "
            "of task files, which may run code: copy it to a file of another name if you trust it"
        )


def _read_mapping(path: Path) -> JsonObject:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: give a YAML recipe") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds no mapping: a recipe starts with 'name:', see {RECIPES}/debug.yaml"
        )
    return content


def merge(lower: JsonObject, upper: JsonObject) -> JsonObject:
    """Return ``upper`` over ``lower``, merged key by key; neither is changed.

    A mapping with another ``kind`` than the lower one replaces it whole, because the fields of one
    kind mean nothing to the other. A null removes the lower value, so that the default holds again.
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
        # Null at the first level that sets a key stays: it may be the field's value.
        if value is None and key in lower:
            del merged[key]
        elif (
            isinstance(value, dict)
            and isinstance(below, dict)
            and value.get("kind", below.get("kind")) == below.get("kind")
        ):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def apply_override(content: JsonObject, override: str) -> None:
    """Apply one ``a.b=c`` to a mapping in place; the value is read as YAML.

    The key of an entry of a list is its index, from 0.
    """
    path, separator, value = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {override}: write it as --set section.field=value")
    keys = path.strip().split(".")
    section: Any = content
    for depth, key in enumerate(keys[:-1]):
        place = _entry(section, key, override)
        below = section.setdefault(place, {}) if isinstance(section, dict) else section[place]
        # "section: null" in a recipe, such as for an optional section.
        if below is None:
            below = section[place] = {}
        if not isinstance(below, dict | list):
            raise ConfigError(
                f"--set {override}: '{'.'.join(keys[: depth + 1])}' is a value, it has no fields"
            )
        section = below
    section[_entry(section, keys[-1], override)] = parse_yaml(value, f"--set {override}")


def _entry(section: JsonObject | list[Any], key: str, override: str) -> Any:
    """Return what a key of an override indexes: a mapping's key, or the index of a list."""
    if isinstance(section, dict):
        return key
    if not key.isdigit() or int(key) >= len(section):
        raise ConfigError(
            f"--set {override}: instead of '{key}' give the index of an entry of a list, from 0 "
            f"to {len(section) - 1}"
        )
    return int(key)


def validate_recipe(content: JsonObject, origin: str) -> Recipe:
    """Return a checked recipe; the plugins that it names are not imported.

    Raises:
        ConfigError: with a sentence for each wrong field.
    """
    # Recipes are printed, saved and exported.
    refuse_credentials(content, origin)
    try:
        recipe = TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        not_imported = untrusted_plugins(content)
        sentences = [sentence(detail, origin, not_imported) for detail in error.errors()]
        raise ConfigError("; ".join(sentences)) from None
    check_recipe(recipe)
    return recipe


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe by name or path, and apply ``a.b=c`` overrides in order.

    Raises:
        ConfigError: for an unknown recipe, an unknown or wrong field, or sections that contradict
            each other.
    """
    content, origin = read_recipe_file(name_or_path)
    # Before validation: an override may correct what would be refused.
    for override in overrides or []:
        apply_override(content, override)
    import_plugins(content)
    return validate_recipe(content, origin)


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, which :func:`load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
