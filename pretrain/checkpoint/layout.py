"""Where the parts of a checkpoint are, how to find a complete one, and how to see damage.

checkpoints/
  latest                                  text: the name of the newest complete checkpoint
  best  epoch_1 ...                       the same for checkpoint.keep_best and keep_epochs
  step_300/
    recipe.yaml  ds_config.json           resolved, as this run used them
    state.json                            step, consumed tokens, fingerprints, topology: state.py
    tokenizer.json
    tokenizer_config.json ...             of an imported model: tokenizer_files.py
    README.md                             the model card
    weights-00000-of-00002.safetensors    fp32 weights, each element in one of the ranks' files
    optimizer-00000-of-00002.safetensors  moments and step counts: optimizer_state.py
    rank-00000-of-00002.safetensors       random state of a rank, and its steps that are in no
                                          metrics record yet
    manifest.json                         size and sha256 of every file above; written last
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from pretrain.checkpoint.state import CheckpointState
from pretrain.config.load import parse_yaml, validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import recipe_at
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject, file_sha256, write_synced

LATEST = "latest"
BEST = "best"
EPOCH = "epoch_"
MANIFEST = "manifest.json"
STATE = "state.json"
RECIPE = "recipe.yaml"
DS_CONFIG = "ds_config.json"
TOKENIZER = "tokenizer.json"
CARD = "README.md"
STEP_NAME = re.compile(r"^step_(\d+)$")
POINTER_NAME = re.compile(rf"^({LATEST}|{BEST}|{EPOCH}\d+)$")
# A pointer holds one short name: a larger file is something else, and is not read.
LARGEST_POINTER_BYTES = 200
OTHER_STEP = "the checkpoint is damaged, choose another step_N folder"


class FileEntry(TypedDict):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"step_{step}"


def step_of(folder: Path) -> int:
    """Return the step of a folder that is named as a checkpoint is."""
    return int(STEP_NAME.match(folder.name)[1])  # type: ignore[index]


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders that were published whole, newest first.

    A torn one still has its temporary name, and is not among them.
    """
    if not checkpoints.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in checkpoints.iterdir()
        if (match := STEP_NAME.match(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the folder of the checkpoint that a path names.

    Args:
        path: the folder, a pointer next to it (``latest``, ``best``, ``epoch_3``), or the folder
            that holds both.

    Raises:
        CheckpointError: if there is none, or it is not complete.
    """
    path = Path(path)
    # The folder of all checkpoints of a run.
    if path.is_dir() and not (path / MANIFEST).is_file() and (path / LATEST).is_file():
        path = path / LATEST
    if path.is_file():
        path = _pointed(path)
    if not path.is_dir():
        others = complete_checkpoints(path.parent)
        hint = f"there is {others[0]}" if others else "train first, with launchers/pretrain.py"
        raise CheckpointError(f"there is no checkpoint {path}: {hint}")
    if (path / MANIFEST).is_file():
        return path
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a Hugging Face folder: convert it with "
            f"tools/convert_checkpoint.py --from hf {path} --output CHECKPOINT"
        )
    raise CheckpointError(
        f"{path} is no complete checkpoint (it has no {MANIFEST}): choose another step_N folder"
    )


def _pointed(pointer: Path) -> Path:
    """Return the folder that a pointer names."""
    # Any file may be given for a pointer: neither its size nor its encoding is certain.
    name = ""
    if pointer.stat().st_size < LARGEST_POINTER_BYTES:
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not POINTER_NAME.match(pointer.name) or not STEP_NAME.match(name):
        raise CheckpointError(
            f"{pointer} is no checkpoint: give a step_N folder or the file '{LATEST}' that "
            "names one"
        )
    return pointer.parent / name


def _read_json(path: Path) -> JsonObject:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {OTHER_STEP}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is not valid JSON: {OTHER_STEP}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: {OTHER_STEP}")
    return content


def read_state(folder: Path) -> CheckpointState:
    """Return the checkpoint's ``state.json``."""
    return cast(CheckpointState, _read_json(folder / STATE))


def read_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe that a checkpoint was trained with.

    Of a run with phases, it is the recipe as it is in the phase of the last step.
    """
    recipe = read_run_recipe(folder)
    return recipe_at(recipe, read_state(folder)["step"]) if recipe.phases else recipe


def read_run_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe of the checkpoint's whole run."""
    path = folder / RECIPE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} is missing or damaged: choose another step_N folder"
        ) from None
    return validate_recipe(parse_yaml(text, str(path)), str(path))


def payload_files(folder: Path) -> list[Path]:
    """Return every file of a checkpoint except its manifest, in the same order on every rank."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def file_entry(path: Path) -> FileEntry:
    """Return what the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_manifest(folder: Path, files: Mapping[str, FileEntry]) -> Path:
    """Write the manifest, which makes a folder a complete checkpoint; return its path."""
    # Not synced here: the caller syncs the folder before it publishes.
    path = folder / MANIFEST
    path.write_text(json.dumps({"version": 1, "files": dict(files)}, indent=2), encoding="utf-8")
    return path


def damage(folder: Path, part: int = 0, parts: int = 1, with_hashes: bool = True) -> str | None:
    """Return what is wrong with a published checkpoint, in a few words; None if nothing is.

    Args:
        part: of the ``parts`` processes that share the hashing, the one that asks.
        parts: processes that share the hashing.
        with_hashes: without them only presence and sizes are compared.
    """
    try:
        files = _read_json(folder / MANIFEST)["files"]
    except (CheckpointError, KeyError):
        return f"{MANIFEST} is no manifest"
    # Sorted, so that the ranks share the files evenly and without gaps.
    for index, (name, entry) in enumerate(sorted(files.items())):
        path = folder / name
        # A checkpoint of somebody else may name any file of this machine.
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{MANIFEST} names {name}, outside of the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if with_hashes and index % parts == part and file_sha256(path) != entry["sha256"]:
            return f"{name} does not have the content that was saved"
    return None


def write_pointer(checkpoints: Path, name: str, pointer: str = LATEST) -> None:
    """Move a pointer to a checkpoint, atomically."""
    write_synced(checkpoints / pointer, f"{name}\n".encode())


def pointers(checkpoints: Path) -> dict[str, str]:
    """Return the checkpoints that have a name, by that name.

    For example ``{"best": "step_200", "epoch_1": "step_150", "latest": "step_300"}``.
    """
    if not checkpoints.is_dir():
        return {}
    found = sorted(
        path for path in checkpoints.iterdir() if POINTER_NAME.match(path.name) and path.is_file()
    )
    return {path.name: path.read_text(encoding="utf-8", errors="replace").strip() for path in found}
