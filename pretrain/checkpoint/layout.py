"""Where a checkpoint's parts lie, how a complete one is told from a torn one, and how to find one.

checkpoints/
  latest                                  text: the name of the newest complete checkpoint best
  epoch_1 ...                       the same for what checkpoint.keep_best and keep_epochs keep
  step_300/
    recipe.yaml  ds_config.json           resolved, as this run used them state.json
    step, consumed tokens, fingerprints, topology tokenizer.json tokenizer_config.json ...
    of a model of others: tokenizer_files.py README.md                             the model card
    weights-dense.safetensors             fp32 master weights, readable without DeepSpeed
    weights-experts-00000-of-00002.safetensors ... deepspeed/                            DeepSpeed's
    own files: optimizer state, for resuming on the same topology rows/rank_00000.safetensors ...
    optimizer state of tables of experts, where the model has some (PEER) random/rank_00000.pt ...
    random state of every rank, and its steps that are in no row of metrics yet manifest.json
    size and sha256 of every file above; written last
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pretrain.config.load import parse_yaml, validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import recipe_at
from pretrain.core.errors import CheckpointError
from pretrain.core.files import file_sha256, write_synced

LATEST, BEST, EPOCH = "latest", "best", "epoch_"
MANIFEST, STATE, RECIPE, DS_CONFIG, TOKENIZER, CARD = (
    "manifest.json",
    "state.json",
    "recipe.yaml",
    "ds_config.json",
    "tokenizer.json",
    "README.md",
)
DEEPSPEED_TAG, RANDOM_FOLDER, ROWS_FOLDER = "deepspeed", "random", "rows"
STEP_NAME = re.compile(r"^step_(\d+)$")
POINTER_NAME = re.compile(rf"^({LATEST}|{BEST}|{EPOCH}\d+)$")


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step}"


def step_of(folder: Path) -> int:
    """The step of a folder that is named as a checkpoint is."""
    return int(STEP_NAME.match(folder.name)[1])  # type: ignore[index]


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders that were published whole, newest first.

    Torn ones carry a temporary name and are not among them.
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
    """The folder of a checkpoint, given itself, a pointer beside it (``latest``, ``best``,
    ``epoch_3``), or the folder that holds both.

    Raises:
        CheckpointError: where there is none, or it is not complete.
    """
    path = Path(path)
    if path.is_dir() and not (path / MANIFEST).is_file() and (path / LATEST).is_file():
        path = path / LATEST
    if path.is_file():
        name = (
            path.read_text(encoding="utf-8", errors="replace").strip()
            if path.stat().st_size < 200
            else ""
        )
        if not POINTER_NAME.match(path.name) or not STEP_NAME.match(name):
            raise CheckpointError(
                f"{path} is no checkpoint: give a step_N folder or the file '{LATEST}' that"
                " names one"
            )
        path = path.parent / name
    if not path.is_dir():
        others = complete_checkpoints(path.parent)
        hint = f"there is {others[0]}" if others else "train first, with launchers/pretrain.py"
        raise CheckpointError(f"there is no checkpoint {path}: {hint}")
    if not (path / MANIFEST).is_file() and (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a Hugging Face folder: convert it with tools/convert_checkpoint.py --from"
            f" hf {path} --output CHECKPOINT"
        )
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is no complete checkpoint (it has no {MANIFEST}): choose another step_N folder"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint is damaged, choose another step_N folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} is not valid JSON: the checkpoint is damaged, choose another step_N folder"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds no JSON object: the checkpoint is damaged, choose another step_N folder"
        )
    return content


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``state.json``: ``step``, ``consumed_tokens``, fingerprints, topology,
    losses.
    """
    return _read_json(folder / STATE)


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe that the checkpoint was trained with; of a run with phases, as it is in
    the checkpoint's own phase.
    """
    recipe = read_run_recipe(folder)
    return recipe_at(recipe, read_state(folder)["step"]) if recipe.phases else recipe


def read_run_recipe(folder: Path) -> Recipe:
    """The resolved recipe of the checkpoint's whole run."""
    path = folder / RECIPE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} is missing or damaged: choose another step_N folder"
        ) from None
    return validate_recipe(parse_yaml(text, str(path)), str(path))


def payload_files(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def damage(folder: Path, part: int = 0, parts: int = 1, with_hashes: bool = True) -> str | None:
    """What is wrong with a published checkpoint, in a few words, or None.

    Args:
        part: of the ``parts`` processes that share the hashing, the one that asks.
    """
    try:
        files = _read_json(folder / MANIFEST)["files"]
    except (CheckpointError, KeyError):
        return f"{MANIFEST} is no manifest"
    for index, (name, entry) in enumerate(sorted(files.items())):
        path = folder / name
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
    """Moves a pointer to a checkpoint, atomically."""
    write_synced(checkpoints / pointer, f"{name}\n".encode())


def pointers(checkpoints: Path) -> dict[str, str]:
    """The checkpoints that have a name, by it: ``{"best": "step_200", "epoch_1": "step_150",
    "latest": "step_300"}``.
    """
    if not checkpoints.is_dir():
        return {}
    found = sorted(
        path for path in checkpoints.iterdir() if POINTER_NAME.match(path.name) and path.is_file()
    )
    return {path.name: path.read_text(encoding="utf-8", errors="replace").strip() for path in found}
