"""Checks the files of a Hugging Face folder before anything of it is opened.

It may hold plain data and weights in safetensors, and no code but this project's model class.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.tokenizer_files import MORE_TEMPLATES
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject, leads_outside
from pretrain.export.custom.target import AUTO_MAP, CLASS_FILES, MODEL_TYPE
from pretrain.export.writer import (
    INDEX,
    WEIGHTS,
    json_fields,
    read_json_object,
    weight_files,
    weight_map,
)

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
# What transformers gets to see besides configs and weights. All of it is data.
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PLAIN_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
# Python runs a file of any of these on an import.
CODE_SUFFIXES = {".py", ".pyc", ".pyo", ".pyw", ".pyd", ".so"}
# Fields of config.json by which transformers reads other files than those that are checked here.
OTHER_FILES = ("configuration_files", "transformers_weights")
# Transformers makes lists and modules of these lengths before it looks at any weight.
COUNT = re.compile(r"n(um)?_.*(layers?|experts?)")
LARGEST_COUNT = 10_000
TOKENIZER_CLASS = re.compile(r"\w+(Tokenizer(Fast)?|Backend)")


def is_hf_folder(path: Path) -> bool:
    """Whether a path is a Hugging Face model folder; our checkpoints have no ``config.json``."""
    return (path / CONFIG).is_file()


def read_config(folder: Path) -> JsonObject:
    """The ``config.json`` of a folder without foreign code.

    Raises:
        CheckpointError: if it is no JSON object with a ``model_type``, and when the folder holds
            or names code that is not this project's.
    """
    _check_links(folder)
    config = read_json_object(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{folder / CONFIG} names no model_type: give the folder of a model for transformers"
        )
    _check_code_files(folder, own=config["model_type"] == MODEL_TYPE)
    _check_named_code(folder, config)
    for field in OTHER_FILES:
        if config.get(field) is not None:
            raise CheckpointError(
                f"{folder / CONFIG} has the field {field}, by which other files than {CONFIG} and"
                f" {WEIGHTS} are read: remove it"
            )
    for field, value, _ in json_fields(config):
        if COUNT.fullmatch(field) and isinstance(value, int | float) and value > LARGEST_COUNT:
            raise CheckpointError(
                f"{folder / CONFIG} says {field} = {value}, and no model has more than"
                f" {LARGEST_COUNT}: it is damaged"
            )
    return config


def unset_fields(fields: Mapping[str, Any]) -> str:
    """A clause with the fields that have no value; transformers' own errors rarely name them."""
    unset = [field for field, value in _entries(fields) if value is None]
    return f"; without a value are {', '.join(unset)}" if unset else ""


def _entries(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields and, of dictionaries, entries by their dotted names."""
    for field, value in fields.items():
        yield from (
            ((f"{field}.{name}", entry) for name, entry in value.items())
            if isinstance(value, dict)
            else [(field, value)]
        )


def _check_links(folder: Path) -> None:
    """Raises :class:`CheckpointError` for a link to a folder, or to a file elsewhere."""
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in folders):
            # os.walk does not follow links, but an import does.
            if path.is_symlink():
                raise CheckpointError(
                    f"{path} is a link to another folder, which may hold code: put a real folder"
                    " there or remove it"
                )
        for path in (Path(place) / name for name in files):
            if path.is_symlink() and leads_outside(path, folder):
                raise CheckpointError(
                    f"{path} is a link to a file elsewhere: put the file itself there or remove it"
                )


def _check_code_files(folder: Path, own: bool) -> None:
    """Raises :class:`CheckpointError` for code that is not a file of this project's class."""
    ours = {path.name: path.read_bytes() for path in CLASS_FILES} if own else {}
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place) / name
            if path.suffix.lower() not in CODE_SUFFIXES:
                continue
            if (
                path.parent != folder
                or name not in ours
                or not path.is_file()
                or path.read_bytes() != ours[name]
            ):
                raise CheckpointError(
                    f"{path} is code that does not come from this project, and is never run: remove"
                    f" it, and the auto_map of {CONFIG}, if transformers has the class itself;"
                    " otherwise take another folder"
                )


def _check_named_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises :class:`CheckpointError` for a config that makes transformers fetch code."""
    # auto_map may also name a repository on the hub ("owner/name--module.Class").
    expected = AUTO_MAP if config["model_type"] == MODEL_TYPE else {}
    named = config.get("auto_map")
    if named and named != expected:
        raise CheckpointError(
            f"{folder / CONFIG} has an auto_map that names other classes than this project's, and"
            " code of a folder is never run: remove the auto_map if transformers has the class"
            " itself; otherwise take another folder"
        )
    for path in sorted(folder.glob("*config*.json")):
        content = (
            {name: value for name, value in config.items() if name != "auto_map"}
            if path.name == CONFIG
            else read_json_object(path)
        )
        for field, value, _ in json_fields(content):
            if field == "auto_map" and value:
                raise CheckpointError(
                    f"{path} has an auto_map, and code of a folder is never run: remove it, or take"
                    " another folder"
                )
            # attn_implementation = "owner/kernel" makes transformers download and import it.
            if field.endswith("_implementation") and any("/" in text for text in _texts(value)):
                raise CheckpointError(
                    f"{path} names a kernel from the hub as {field}, which is code: remove the"
                    " field"
                )


def _texts(value: Any) -> list[str]:
    return [text for _, text, _ in json_fields(value) if isinstance(text, str)]


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a folder, from the headers of its files.

    Raises:
        CheckpointError: if a file is missing, cut off or not what the index says, or holds a
            tensor of packed numbers or one that another file holds too.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                # get_slice reads the header only: no tensor comes into memory.
                # It is no dict, and only keys() lists its tensors.
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: tuple(part.get_shape()) for name, part in parts.items()}
                packed = {
                    name: kind
                    for name, part in parts.items()
                    if (kind := part.get_dtype()) not in PLAIN_TYPES
                }
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing: the weights are incomplete, take a whole folder"
            ) from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): it is damaged, take another folder"
            ) from None
        if packed:
            name, kind = min(packed.items())
            raise CheckpointError(
                f"the tensor '{name}' in {path} is stored as {kind}: convert it to bf16 or fp32"
                " first"
            )
        # Which of two copies transformers loads depends on the order of the files.
        if twice := sorted(found.keys() & shapes.keys()):
            raise CheckpointError(
                f"'{twice[0]}' is in {places[twice[0]]} and in {path.name}: the weights do not"
                " belong together"
            )
        shapes |= found
        places |= dict.fromkeys(found, path.name)
    if (index := folder / INDEX).is_file():
        wanted = weight_map(index)
        if wrong := sorted(
            name for name in wanted.keys() | places.keys() if wanted.get(name) != places.get(name)
        ):
            raise CheckpointError(
                f"{index} says another file for '{wrong[0]}' than the one that holds it: the"
                " weights do not belong together"
            )
    return shapes


@contextmanager
def checked_view(folder: Path, config: Mapping[str, Any], weights: bool) -> Iterator[Path]:
    """A folder of links to those files alone that were checked, for transformers to open.

    So it cannot come upon anything else: an adapter, a distributed checkpoint, a pickle, a module,
    another version of a config.

    Args:
        config: what :func:`read_config` gave. The view has it without the names of classes.
        weights: with the weights; otherwise only config and tokenizer.
    """
    # The config is written, not linked: what was checked is what transformers reads.
    with tempfile.TemporaryDirectory(prefix="hf-folder-") as name:
        view = Path(name)
        (view / CONFIG).write_text(
            json.dumps({field: value for field, value in config.items() if field != "auto_map"})
        )
        for path in (folder / GENERATION, folder / TOKENIZER_CONFIG):
            if path.is_file():
                (view / path.name).write_text(json.dumps(_without_paths(read_json_object(path))))
        paths = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
        if weights:
            paths += [
                *weight_files(folder),
                *([folder / INDEX] if (folder / INDEX).is_file() else []),
            ]
        (view / MORE_TEMPLATES).mkdir()
        paths += sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
        for path in paths:
            (view / path.relative_to(folder)).symlink_to(path.resolve())
        yield view


def _without_paths(config: JsonObject) -> JsonObject:
    """Without the fields by which a tokenizer's config names files elsewhere."""
    return {
        name: value
        for name, value in config.items()
        if not name.endswith("_file") and name != "name_or_path"
    }


def check_tokenizer_files(folder: Path) -> None:
    """Raises :class:`CheckpointError` without a vocabulary, or if the class is no tokenizer's."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder} has no tokenizer.json: copy the tokenizer of the model there"
        )
    for path in (folder / TOKENIZER_CONFIG, folder / CONFIG):
        name = read_json_object(path).get("tokenizer_class") if path.is_file() else None
        if name is not None and not (isinstance(name, str) and TOKENIZER_CLASS.fullmatch(name)):
            raise CheckpointError(
                f"{path} names the tokenizer_class {name!r}, which is no tokenizer: correct it"
            )
