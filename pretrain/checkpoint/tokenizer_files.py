"""Files that belong to an imported tokenizer: special tokens, chat templates, sampling defaults.

They are data, never code. A model from Hugging Face comes with these files, every checkpoint
trained, merged or upcycled from it keeps them, and an export writes them again.
``config_token_ids.json`` is this project's: the ids of special tokens that were in ``config.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pretrain.checkpoint.foreign_state_dict import is_weights_file
from pretrain.checkpoint.layout import resolve_checkpoint
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject, leads_outside
from pretrain.core.strict_json import NotAnObject, read_object

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = "config_token_ids.json"
JSON_FILES = (
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TOKEN_IDS,
)
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.jinja")
ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGEST_BYTES = 64_000_000
# Fields that name code to run, which must not enter an export.
CODE = ("auto_map", "trust_remote_code", "custom_generate")

SideFiles = Mapping[str, bytes]


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a Hugging Face folder or of a checkpoint, by their path in it.

    Those that are not there are left out.

    Raises:
        CheckpointError: if one is larger than 64 MB, no JSON object, no UTF-8 or a link to a file
            elsewhere.
    """
    templates = [folder / CHAT_TEMPLATE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    # A checkpoint and an export get copies of these files: no other file may come into them.
    for path in (*(folder / name for name in (*JSON_FILES, "config.json")), *templates):
        if leads_outside(path, folder):
            raise CheckpointError(
                f"{path} is a link to a file elsewhere: put the file itself there"
            )
    files = {
        name: _json_bytes(_without_code(_read_json(folder / name)))
        for name in JSON_FILES
        if (folder / name).is_file()
    }
    for path in templates:
        if path.is_file() and TEMPLATE_NAME.fullmatch(path.name):
            files[path.relative_to(folder).as_posix()] = _read(path).encode()
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        files[TOKEN_IDS] = _json_bytes({name: config[name] for name in ID_FIELDS if name in config})
    return files


def write_side_files(files: SideFiles, folder: Path) -> None:
    """Write what :func:`read_side_files` read."""
    # Every name is one of those that read_side_files knows, so it cannot leave the folder.
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def content_of(files: SideFiles, name: str) -> JsonObject | None:
    """Return one of the JSON files; None if it is not there."""
    content: JsonObject | None = json.loads(files[name]) if name in files else None
    return content


def end_ids(files: SideFiles) -> frozenset[int]:
    """Return all tokens that end a text; none if the files do not say."""
    # transformers too prefers generation_config.json.
    for name in (GENERATION_CONFIG, TOKEN_IDS):
        if ids := token_ids((content_of(files, name) or {}).get("eos_token_id")):
            return ids
    return frozenset()


def token_ids(value: object) -> frozenset[int]:
    """Return the ids in an ``eos_token_id`` of transformers: one, several, or null."""
    listed = value if isinstance(value, list) else [value]
    # true is an int in Python.
    return frozenset(
        each for each in listed if isinstance(each, int) and not isinstance(each, bool)
    )


def origin_of(recipe: Recipe, newest: Path | None) -> Path | None:
    """Return the checkpoint whose files a run keeps: its newest one, or what it begins from.

    None if it begins from nothing, or from a file.
    """
    start = recipe.branch_from or recipe.initial_weights
    if newest is not None or start is None:
        return newest
    return None if is_weights_file(Path(start)) else resolve_checkpoint(start)


def _without_code(content: JsonObject) -> JsonObject:
    # A field that ends in _file is a path, which would be read in place of the file in the folder.
    kept = {
        name: value
        for name, value in content.items()
        if name not in CODE and not name.endswith("_file")
    }
    if "auto_map" in content and "tokenizer_class" in content:
        # The class that the code defined is in no release of transformers.
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return kept


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST_BYTES:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, and such a file has less than "
            f"{LARGEST_BYTES:,}: take it out"
        )
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} cannot be read as UTF-8: correct it or take it out"
        ) from None


def _read_json(path: Path) -> JsonObject:
    try:
        return read_object(path, finite=False)
    except NotAnObject as error:
        raise CheckpointError(f"{path} {error}: correct it or take it out") from None


def _json_bytes(content: JsonObject) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
