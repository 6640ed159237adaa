"""Where the parts of a checkpoint are, how to find a complete one, and how to see damage.

checkpoints/
  latest                                  text: the name of the newest complete checkpoint
  best  epoch_1 ...                       the same for checkpoint.keep_best and keep_epochs
  step_300/
    recipe.yaml  ds_config.json           resolved, as this run used them
    state.json                            step, consumed tokens, fingerprints, topology: state.py
    tokenizer.json                        or tokenizer.model, a SentencePiece model
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
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TypedDict, cast

from pretrain.checkpoint.saved_state import wrong_type
from pretrain.checkpoint.state import CheckpointState
from pretrain.config.load import parse_yaml, validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import recipe_at
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import file_sha256, write_synced
from pretrain.core.plugins import untrusted_plugins
from pretrain.core.strict_json import NotAnObject, read_object

LATEST = "latest"
BEST = "best"
EPOCH = "epoch_"
MANIFEST = "manifest.json"
STATE = "state.json"
RECIPE = "recipe.yaml"
DS_CONFIG = "ds_config.json"
TOKENIZER = "tokenizer.json"
CARD = "README.md"
# In the run's folder, next to that of the checkpoints: one was published there at some time.
SAVED = ".checkpoint_saved"
# \Z, because $ also matches before a line break; no leading zeros, so that a step has one name.
STEP_NAME = re.compile(r"^step_(0|[1-9][0-9]{0,17})\Z")
POINTER_NAME = re.compile(rf"^({LATEST}|{BEST}|{EPOCH}[0-9]+)\Z")
SHA256 = re.compile(r"[0-9a-f]{64}")
VERSION = 1
# A recipe of a hundred phases has a tenth of it.
LARGEST_RECIPE_BYTES = 1_000_000
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
    name = _pointer_content(pointer)
    if not POINTER_NAME.match(pointer.name) or not STEP_NAME.match(name):
        raise CheckpointError(
            f"{pointer} is no checkpoint: give a step_N folder or the file '{LATEST}' that "
            "names one"
        )
    return pointer.parent / name


def _pointer_content(pointer: Path) -> str:
    """Return the text of a pointer; "" for a larger file, and one that was just removed."""
    # Any file may be given for a pointer: neither its size nor its encoding is certain.
    try:
        if pointer.stat().st_size >= LARGEST_POINTER_BYTES:
            return ""
        return pointer.read_text(encoding="utf-8", errors="replace").strip()
    # A save in the background drops pointers too.
    except FileNotFoundError:
        return ""


def read_state(folder: Path) -> CheckpointState:
    """Return the checkpoint's ``state.json``.

    Raises:
        CheckpointError: if it is missing, no JSON object, or a field has a value of a wrong type.
    """
    if fault := _state_fault(folder):
        raise CheckpointError(f"{folder / STATE} {fault}: {OTHER_STEP}")
    # A validation loss may be infinite, and Python writes that.
    return cast(CheckpointState, read_object(folder / STATE, finite=False))


def _state_fault(folder: Path) -> str | None:
    try:
        return wrong_type(read_object(folder / STATE, finite=False))
    except NotAnObject as error:
        return str(error)


def read_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe that a checkpoint was trained with.

    Of a run with phases, it is the recipe as it is in the phase of the last step.
    """
    recipe = read_run_recipe(folder)
    return recipe_at(recipe, read_state(folder)["step"]) if recipe.phases else recipe


def read_run_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe of the checkpoint's whole run.

    Raises:
        CheckpointError: if it is missing or damaged, or is no recipe.
        ConfigError: if it names plugins that are not loaded.
    """
    path = folder / RECIPE
    try:
        if path.stat().st_size > LARGEST_RECIPE_BYTES or not path.is_file():
            raise OSError
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise CheckpointError(
            f"{path} is missing or damaged: choose another step_N folder"
        ) from None
    content: object = None
    try:
        content = parse_yaml(text, str(path))
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no recipe: {OTHER_STEP}")
        return validate_recipe(content, str(path))
    except ConfigError as error:
        # A recipe with plugins is not damaged: the sentence says how they are loaded.
        if isinstance(content, dict) and untrusted_plugins(content):
            raise
        raise CheckpointError(f"{error}; {OTHER_STEP}") from None


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
    content = {"version": VERSION, "files": dict(files)}
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def list_file(folder: Path, path: Path) -> None:
    """Add a file to the manifest of a folder that is not published yet."""
    files = {**read_manifest(folder), path.relative_to(folder).as_posix(): file_entry(path)}
    write_manifest(folder, files)


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Return what the manifest says of each file, by its path in the folder.

    Raises:
        CheckpointError: if it is no manifest, or names something outside of the folder; the
            message has a few words and no remedy.
    """
    try:
        content = read_object(folder / MANIFEST)
    except NotAnObject as error:
        raise CheckpointError(f"{MANIFEST} is no manifest: it {error}") from None
    files = content.get("files")
    version = content.get("version")
    # bool is an int in Python, and must not pass for one.
    if version != VERSION or isinstance(version, bool) or not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST} is no manifest of version {VERSION} with files")
    for name, entry in files.items():
        if not _is_file_name(name):
            raise CheckpointError(
                f"{MANIFEST} names {name[:120]!r}, which is no file in the folder"
            )
        if not _is_entry(entry):
            raise CheckpointError(f"{MANIFEST} has no size and SHA-256 of {name[:120]!r}")
    if lacking := sorted({RECIPE, STATE} - files.keys()):
        raise CheckpointError(f"{MANIFEST} does not list {lacking[0]}")
    return files


def _is_file_name(name: str) -> bool:
    """Whether a manifest's name is one that :func:`payload_files` would have: "a" or "a/b"."""
    path = PurePosixPath(name)
    return (
        bool(name)
        and name.isprintable()
        and len(name) <= 1000
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        # Neither "./a" nor "a//b" nor "a/": two names of one file would both be found.
        and path.as_posix() == name
        and name not in (".", MANIFEST)
    )


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    size, sha256 = entry.get("bytes"), entry.get("sha256")
    return (
        isinstance(size, int)
        and not isinstance(size, bool)
        and size >= 0
        and isinstance(sha256, str)
        and SHA256.fullmatch(sha256) is not None
    )


def damage(folder: Path, part: int = 0, parts: int = 1, with_hashes: bool = True) -> str | None:
    """Return what is wrong with a published checkpoint, in a few words; None if nothing is.

    The folder holds exactly the files that the manifest lists, with their sizes and contents, and
    no link: a checkpoint of somebody else may name any file of this machine.

    Args:
        part: of the ``parts`` processes that share the hashing, the one that asks.
        parts: processes that share the hashing.
        with_hashes: without them only names and sizes are compared.
    """
    try:
        files = read_manifest(folder)
        sizes = dict(_plain_files(folder))
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"the folder cannot be read ({error.strerror})"
    if missing := sorted(files.keys() - sizes.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(sizes.keys() - files.keys()):
        return f"{extra[0]!r} is not in {MANIFEST}"
    for name, entry in sorted(files.items()):
        if sizes[name] != entry["bytes"]:
            return f"{name} has {sizes[name]} bytes instead of {entry['bytes']}"
    # Sorted, so that the ranks share the files evenly and without gaps.
    for name, entry in sorted(files.items())[part::parts] if with_hashes else ():
        try:
            if file_sha256(folder / name) != entry["sha256"]:
                return f"{name} does not have the content that was saved"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    # Last: a file with another content than was saved is damaged in any case.
    return f"{STATE} {fault}" if (fault := _state_fault(folder)) else None


def _plain_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the path and size of every file below a folder but its manifest.

    Raises:
        CheckpointError: in a few words, for a link, a pipe or any other thing that is no plain
            file or folder.
    """
    with os.scandir(folder / prefix) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _plain_files(folder, f"{name}/")
            elif not stat.S_ISREG(status.st_mode):
                what = "a link" if stat.S_ISLNK(status.st_mode) else "no plain file"
                raise CheckpointError(f"{name!r} is {what}")
            elif name != MANIFEST:
                yield name, status.st_size


def write_pointer(checkpoints: Path, name: str, pointer: str = LATEST) -> None:
    """Move a pointer to a checkpoint, atomically; the first ``latest`` leaves the mark ``SAVED``.

    Raises:
        CheckpointError: if a folder has the pointer's name.
    """
    path = checkpoints / pointer
    if pointer == LATEST and not (mark := checkpoints.parent / SAVED).exists():
        write_synced(mark, f"{name}\n".encode())
    if path.is_dir() and not path.is_symlink():
        raise CheckpointError(
            f"{path} is a folder, and should be a file that names a checkpoint: move it elsewhere"
        )
    write_synced(path, f"{name}\n".encode())


def pointers(checkpoints: Path) -> dict[str, str]:
    """Return the checkpoints that have a name, by that name.

    For example ``{"best": "step_200", "epoch_1": "step_150", "latest": "step_300"}``. A file that
    names none is left out.
    """
    if not checkpoints.is_dir():
        return {}
    found = sorted(
        path for path in checkpoints.iterdir() if POINTER_NAME.match(path.name) and path.is_file()
    )
    named = {path.name: _pointer_content(path) for path in found}
    return {pointer: name for pointer, name in named.items() if STEP_NAME.match(name)}
