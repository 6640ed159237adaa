"""The files of a converted model, and a folder of them that appears complete or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.checkpoint.tensor_files import TensorFileWriter, TensorReader
from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.core.errors import CheckpointError, ConfigError, StorageError
from pretrain.core.files import JsonObject, appearing_folder
from pretrain.core.strict_json import NotAnObject, read_object

WEIGHTS = "model.safetensors"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "export.json"
SHARD_NAME = re.compile(r"[\w][\w .+=@-]{0,200}\.safetensors")
SHARD_BYTES = 5_000_000_000
# Files of weights that are read by unpickling or by other frameworks.
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".pkl"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@contextmanager
def published_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that gets the name ``output`` when the block ends, and is removed if it fails.

    Raises:
        ConfigError: if ``output`` is not empty and ``overwrite`` is false, or holds something
            else than an earlier export.
    """
    output = output.resolve()
    occupied = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(
            f"{output} is not empty: choose another --output, or replace what is there with"
            " --overwrite"
        )
    if occupied and not (output / RECORD).is_file():
        raise ConfigError(
            f"{output} is no export (it has no {RECORD}), and --overwrite would delete it: choose"
            " another --output"
        )
    with appearing_folder(output) as temporary:
        yield temporary


def write_json_file(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with an indent of two, as Hugging Face does."""
    # Not synced here: the whole folder is, before it gets its name.
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json_object(path: Path) -> JsonObject:
    """The object in a JSON file that anybody may have written.

    Raises:
        CheckpointError: if there is none, it has a key twice, or it is nested so deeply that Python
            cannot walk it.
    """
    try:
        # NaN and Infinity are in configs that transformers has written.
        return read_object(path, finite=False)
    except NotAnObject as error:
        raise CheckpointError(f"{path} {error}: give a whole Hugging Face folder") from None


def json_fields(content: Any) -> Iterator[tuple[str, Any, int]]:
    """Yields the name, value and depth of every field, and of every list item, whose name is ""."""
    # Without recursion: a hostile file may be nested more deeply than Python's stack.
    waiting = [("", content, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        yield name, value, depth
        if isinstance(value, dict):
            waiting += [(field, item, depth + 1) for field, item in value.items()]
        elif isinstance(value, list):
            waiting += [("", item, depth + 1) for item in value]


def parse_bytes(text: str) -> int:
    """``5GB``, ``500MB`` or a number of bytes.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"'{text}' is no size: write it as 5GB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def write_weights(
    folder: Path,
    forms: Mapping[str, TensorForm],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes ``model.safetensors``, or shards with an index if the tensors exceed ``shard_bytes``.

    Args:
        forms: of all tensors.
        tensors: the same ones in the same order; they are taken one by one, and no shard is held in
            memory.

    Raises:
        StorageError: if a file cannot be written.
    """
    shards = _shards(forms, shard_bytes)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [SHARD.format(number=number + 1, count=len(shards)) for number in range(len(shards))]
    )
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(form.bytes for form in forms.values())
    try:
        with (
            ExitStack() as opened,
            tqdm(total=total, desc="writing weights", unit="B", unit_scale=True) as bar,
        ):
            file: TensorFileWriter | None = None
            for tensor_name, tensor in tensors:
                path = folder / places[tensor_name]
                if file is None or file.path != path:
                    # Closes the shard before: tensors come in the order of the shards.
                    opened.close()
                    file = opened.enter_context(
                        TensorFileWriter(
                            path, {name: forms[name] for name in shards[names.index(path.name)]}
                        )
                    )
                file.write(tensor_name, tensor)
                bar.update(forms[tensor_name].bytes)
    except OSError as error:
        raise StorageError(
            f"cannot write {folder / WEIGHTS}: {error.strerror}; free space or choose another"
            " folder"
        ) from None
    if len(shards) > 1:
        write_json_file(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(forms: Mapping[str, TensorForm], shard_bytes: int) -> list[list[str]]:
    """The names of each shard, in order; a tensor larger than a shard gets one alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, form in forms.items():
        if shards[-1] and filled + form.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += form.bytes
    return shards


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: ``model.safetensors``, or the shards that the index names.

    Raises:
        CheckpointError: if there are none, or both, or the index is damaged.
    """
    whole = folder / WEIGHTS
    index = folder / INDEX
    if whole.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} has both {WEIGHTS} and {INDEX}, which may differ: remove what does not"
            " belong there"
        )
    if whole.is_file():
        return [whole]
    if index.is_file():
        return sorted({folder / name for name in weight_map(index).values()})
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES):
        raise CheckpointError(
            f"{folder} has its weights as {pickles[0]}, which can run code while it is read:"
            " convert it to safetensors"
        )
    raise CheckpointError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}: the weights are missing, take a whole folder"
    )


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index.

    Raises:
        CheckpointError: if an entry is not the name of a safetensors file in the same folder.
    """
    names = read_json_object(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise CheckpointError(f"{index} is no index of weights: take another folder")
    for name in names.values():
        if Path(name).name != name or not SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{index} names {name!r}, which is no safetensors file beside it: take another"
                " folder"
            )
    return names


def open_exported_weights(folder: Path) -> TensorReader:
    """The tensors of any Hugging Face folder, to be read one by one.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    return TensorReader(weight_files(folder))


def copy_file(source: Path, destination: Path) -> None:
    """Raises :class:`CheckpointError` when there is no ``source``."""
    if not source.is_file():
        raise CheckpointError(
            f"{source} is missing: the checkpoint is incomplete, take another one"
        )
    shutil.copyfile(source, destination)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``bfloat16``, the way ``config.json`` writes it."""
    return str(dtype).removeprefix("torch.")
