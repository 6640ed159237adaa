"""What travels with a tokenizer.json of others: special tokens, chat templates, sampling defaults.

Data alone, never code.

A model that came from Hugging Face brings these files in, every checkpoint trained, merged or
upcycled from it keeps them, and an export writes them again. ``config_token_ids.json`` is ours: the
ids of special tokens that were in ``config.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.foreign_state_dict import is_weights_file
from pretrain.checkpoint.layout import resolve_checkpoint
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError

TOKENIZER_CONFIG, GENERATION_CONFIG, TOKEN_IDS = (
    "tokenizer_config.json",
    "generation_config.json",
    "config_token_ids.json",
)
JSON_FILES = (
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TOKEN_IDS,
)
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.jinja")
ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGEST_BYTES = 64_000_000
# Code to be run, and paths of files elsewhere that would be read in place of those in the folder.
CODE = ("auto_map", "trust_remote_code", "custom_generate")

SideFiles = Mapping[str, bytes]


def read_side_files(folder: Path) -> dict[str, bytes]:
    """The files of a Hugging Face folder or of a checkpoint, by their path in it; those that are
    not there are left out.

    Raises:
        CheckpointError: where one is larger than 64 MB, no JSON object or no UTF-8.
    """
    files = {
        name: _json_bytes(_without_code(_read_json(folder / name)))
        for name in JSON_FILES
        if (folder / name).is_file()
    }
    templates = [folder / CHAT_TEMPLATE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    for path in templates:
        if path.is_file() and TEMPLATE_NAME.fullmatch(path.name):
            files[path.relative_to(folder).as_posix()] = _read(path).encode()
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        files[TOKEN_IDS] = _json_bytes({name: config[name] for name in ID_FIELDS if name in config})
    return files


def write_side_files(files: SideFiles, folder: Path) -> None:
    """Writes what :func:`read_side_files` read."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def content_of(files: SideFiles, name: str) -> dict[str, Any] | None:
    """One of the JSON files; None where it is not there."""
    content: dict[str, Any] | None = json.loads(files[name]) if name in files else None
    return content


def end_ids(files: SideFiles) -> frozenset[int]:
    """All tokens that end a text; empty where the files do not say. transformers too prefers
    ``generation_config.json``.
    """
    for name in (GENERATION_CONFIG, TOKEN_IDS):
        if ids := token_ids((content_of(files, name) or {}).get("eos_token_id")):
            return ids
    return frozenset()


def token_ids(value: Any) -> frozenset[int]:
    """``eos_token_id`` as transformers writes it: an id, several, or null."""
    listed = value if isinstance(value, list) else [value]
    return frozenset(
        each for each in listed if isinstance(each, int) and not isinstance(each, bool)
    )


def origin_of(recipe: Recipe, newest: Path | None) -> Path | None:
    """The checkpoint whose files a run carries on: its own newest one, or what it begins from.

    None where it begins from nothing.
    """
    given = recipe.branch_from or recipe.initial_weights
    if newest is not None or given is None:
        return newest
    return None if is_weights_file(Path(given)) else resolve_checkpoint(given)


def _without_code(content: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in content.items()
        if name not in CODE and not name.endswith("_file")
    }
    # The class that the code was for is in no release of transformers.
    return kept | (
        {"tokenizer_class": "PreTrainedTokenizerFast"}
        if "auto_map" in content and "tokenizer_class" in content
        else {}
    )


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST_BYTES:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, and such a file has less than"
            f" {LARGEST_BYTES:,}: take it out"
        )
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} cannot be read as UTF-8: correct it or take it out"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object: correct it or take it out")
    return content


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
