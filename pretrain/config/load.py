"""From a recipe's name or path and dotted overrides to a checked :class:`Recipe`, with errors that
name the path and the nearest key.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from pretrain.config.recipe import Recipe
from pretrain.core.credentials import refuse_credentials
from pretrain.core.errors import ConfigError
from pretrain.core.plugins import (
    add_loaded_plugins,
    load_plugins,
    plugins_in,
    trust_remedy,
    untrusted_plugins,
)
from pretrain.core.registry import OneOf, kinds_of
from pretrain.core.shipped import RECIPES, recipe_names

# What runs, checkpoints and exports call the recipe that they are saved with, and what a sweep's
# folder has next to its own.
RECORD = "recipe.yaml"
STUDY = "study.json"


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads ``2e-3`` as text; recipes mean a number.

    Duplicate keys are refused, not silently merged.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


RecipeLoader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None


def read_recipe_file(name_or_path: str) -> tuple[dict[str, Any], str]:
    """Read a shipped recipe or a YAML file, laid over its base if it names one, and import its
    plugins.

    Returns:
        The mapping, with every plugin of this process under ``plugins``, and where it came from.

    Raises:
        ConfigError: for an unknown recipe or base, a file that is no recipe, bases that lead back
            to themselves, and plugins that cannot be imported.
    """
    content, origin = _read_with_base(_recipe_path(name_or_path, Path()), (), is_record=False)
    import_plugins(content)
    return content, origin


def import_plugins(content: dict[str, Any]) -> None:
    """Import what a user's recipe names, and add what ``--plugin`` gave, so that the saved recipe
    is complete.

    Never for a mapping that comes from the folder of a checkpoint, a run, a sweep or an export: see
    :mod:`pretrain.core.plugins`. After overrides it is to be called again: they may name plugins
    too.
    """
    load_plugins(plugins_in(content))
    add_loaded_plugins(content)


def _recipe_path(name_or_path: str, folder: Path) -> Path:
    """A shipped recipe's file, or a path as seen from ``folder``."""
    shipped = RECIPES / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else folder / name_or_path
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else "shipped recipes are " + ", ".join(recipe_names())
        )
        raise ConfigError(
            f"there is no recipe '{name_or_path}', neither in {RECIPES} nor as a file: {hint}"
        )
    return path


def _read_with_base(
    path: Path, above: tuple[Path, ...], is_record: bool
) -> tuple[dict[str, Any], str]:
    """A recipe's file laid over its base.

    Args:
        above: the files that led here, by ``base``.
        is_record: whether one of them is a record, whose author also chose what it leads to.
    """
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
        merged["plugins"] = list(plugins)  # a base's kinds are used above it, too
    return merged, f"{path} on {origin}"


def _is_record(path: Path) -> bool:
    """Whether a file is the recipe that a run, a checkpoint, an export or a sweep was saved with.

    It may come from anybody. What lies next to it does not matter: its author chose that as well.
    """
    return path.name == RECORD or (path.parent / STUDY).is_file()


def _refuse_code(path: Path, content: dict[str, Any]) -> None:
    """Refuse what a record names and reading or training it would execute."""
    if strange := untrusted_plugins(content):
        raise ConfigError(
            f"{path} is what a finished or running training has saved, and it names the plugin "
            f"{', '.join(strange)}: {trust_remedy(strange)}"
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


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: give a YAML recipe") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds no mapping: a recipe starts with 'name:', see {RECIPES}/debug.yaml"
        )
    return content


def merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """``upper`` laid over ``lower``, key by key; neither is changed.

    A mapping with another ``kind`` than the lower one replaces it whole, because the fields of one
    kind mean nothing to the other. A null removes what the lower one says, so that the default
    holds again.
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
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


def apply_override(content: dict[str, Any], override: str) -> None:
    """Applies one ``a.b=c`` to a mapping in place; the value is read as YAML.

    An entry of a list is called by its number, from 0.
    """
    path, separator, value = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {override}: write it as --set section.field=value")
    keys = path.strip().split(".")
    section: Any = content
    for depth, key in enumerate(keys[:-1]):
        place = _entry(section, key, override)
        below = section.setdefault(place, {}) if isinstance(section, dict) else section[place]
        if below is None:
            below = section[place] = {}
        if not isinstance(below, dict | list):
            raise ConfigError(
                f"--set {override}: '{'.'.join(keys[: depth + 1])}' is a value, it has no fields"
            )
        section = below
    section[_entry(section, keys[-1], override)] = parse_yaml(value, f"--set {override}")


def _entry(section: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    """What a key of an override indexes: a mapping's key, or the number of an entry that a list
    has.
    """
    if isinstance(section, dict):
        return key
    if not key.isdigit() or int(key) >= len(section):
        raise ConfigError(
            f"--set {override}: '{key}' stands for an entry of a list, which has numbers from 0 "
            f"to {len(section) - 1}"
        )
    return int(key)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_family(annotation):
        return list(kinds_of(annotation.__origin__))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (
        typing.Union,
        types.UnionType,
        typing.Annotated,
        dict,
        list,
    ):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _walk(location: tuple[str | int, ...]) -> tuple[str, list[str]]:
    """The dotted path of a pydantic error's location in the user's file, and the field names that
    are legal there.

    A discriminated union puts the chosen ``kind`` into the location; the file has no such level.
    """
    models: list[type[BaseModel]] = [Recipe]
    annotation: Any = Recipe
    dotted: list[str] = []
    legal: list[str] = []
    for part in location:
        tagged = [
            model
            for model in models
            if "kind" in model.model_fields
            and part in typing.get_args(model.model_fields["kind"].annotation)
        ]
        if tagged and (len(models) > 1 or _is_family(annotation)) and not _is_mapping(annotation):
            annotation = None
            models = tagged
            continue
        dotted.append(str(part))
        if isinstance(part, int):  # an entry of a list
            continue
        if _is_mapping(annotation):  # the part is a key of the user's own choice
            annotation = None
            continue
        legal = sorted({name for model in models for name in model.model_fields})
        annotation = next(
            (_annotation(model, str(part)) for model in models if part in model.model_fields), None
        )
        models = _models_in(annotation)
    return ".".join(dotted) or "the recipe", legal


def _is_family(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Annotated and any(
        isinstance(mark, OneOf) for mark in annotation.__metadata__
    )


def _annotation(model: type[BaseModel], name: str) -> Any:
    """A field's type; pydantic keeps what it was annotated with apart from it."""
    field = model.model_fields[name]
    marks = [mark for mark in field.metadata if isinstance(mark, OneOf)]
    return Annotated[field.annotation, marks[0]] if marks else field.annotation


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict or any(
        typing.get_origin(part) is dict for part in typing.get_args(annotation)
    )


def _sentence(detail: Any, origin: str, strange: list[str]) -> str:
    """One error of pydantic's as a sentence; ``strange`` are the plugins that were not imported."""
    location = detail["loc"]
    dotted, fields = _walk(location)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), fields, n=2)
        hint = (
            "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
            if near
            else f"it takes {', '.join(fields)}"
        )
        return f"{origin}: unknown field '{dotted}': {hint}"
    if detail["type"] == "missing":
        return f"{origin}: '{dotted}' is missing"
    if detail["type"] == "union_tag_invalid" and strange:
        return (
            f"{origin}: '{dotted}.kind' is '{detail['ctx']['tag']}', which is a part of the plugin "
            f"{' or '.join(strange)}, which the checkpoint names: {trust_remedy(strange)}"
        )
    if detail["type"] == "union_tag_invalid" and not detail["ctx"]["expected_tags"]:
        return (
            f"{origin}: '{dotted}.kind' is '{detail['ctx']['tag']}', and there is no such kind: "
            "name "
            "the module that defines it under 'plugins'"
        )
    if detail["type"] == "union_tag_invalid":
        return (
            f"{origin}: '{dotted}.kind' is '{detail['ctx']['tag']}', but it is one of "
            f"{detail['ctx']['expected_tags']}"
        )
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    if detail["type"] == "literal_error" and strange:
        message += (
            f", or of the plugin {' or '.join(strange)}, which the checkpoint names: "
            f"{trust_remedy(strange)}"
        )
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{origin}: '{dotted}': {message}{shown}"


def validate_recipe(content: dict[str, Any], origin: str) -> Recipe:
    """Return a checked recipe; the plugins that it names are not imported.

    Raises:
        ConfigError: with a sentence for each wrong field.
    """
    from pretrain.config.rules.sections import check_recipe

    refuse_credentials(content, origin)
    try:
        recipe = TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(
                _sentence(detail, origin, untrusted_plugins(content)) for detail in error.errors()
            )
        ) from None
    check_recipe(recipe)
    return recipe


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Loads a recipe by name or path and applies ``a.b=c`` overrides in order.

    Raises:
        ConfigError: for an unknown recipe, an unknown or wrong field, or sections that contradict
            each other.
    """
    content, origin = read_recipe_file(name_or_path)
    for override in overrides or []:
        apply_override(content, override)
    import_plugins(content)
    return validate_recipe(content, origin)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
