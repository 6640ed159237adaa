"""Reads ``torch_dist`` checkpoints of Megatron-Core without running what their pickles could call.

Three kinds of file are pickles: the index ``.metadata``, ``common.pt``, and each part of a tensor
in the ``.distcp`` files. Objects of Megatron and torch become plain holders of their state; what
else a pickle names is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import stat
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint.pickled import check_instructions, load_pickled, load_pickled_tensor
from pretrain.checkpoint.tensor_files import FORMAT_NAMES, TensorForm
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.core.strict_json import NotAnObject, read_object
from pretrain.export.megatron.torch_dist import BACKENDS, COMMON, ITERATION, METADATA, TRACKER

# 50 instructions a part: enough for two million parts, which is what DeepSeek-V3 has with its
# optimizer.
MOST_INSTRUCTIONS = 100_000_000
LARGEST_INDEX = 1_000_000_000
LARGEST_TRACKER = 100
LARGEST_COMMON = 100_000_000
# Classes of these packages hold plain data.
HELD = re.compile(r"(torch\.distributed\.checkpoint|megatron)(\.\w+)+")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FORMAT_NAMES}
RESTART = "save it again with Megatron-LM's --ckpt-format torch_dist"


class Held:
    """The state of an object whose class is not imported."""

    name = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """A field of a dataclass."""
        state = getattr(self, "state", None)
        return state.get(name, default) if isinstance(state, dict) else default


def _holder(module: str, name: str) -> type[Held]:
    return type("Held", (Held,), {"name": f"{module}.{name}"})


class _IndexUnpickler(pickle.Unpickler):
    """Finds no class but those that hold what torch.distributed.checkpoint writes."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._known: dict[tuple[str, str], Any] = {
            ("torch", "Size"): tuple,
            ("torch.serialization", "_get_layout"): _holder("torch", "layout"),
            ("pathlib", "PosixPath"): _holder("pathlib", "PosixPath"),
            ("collections", "OrderedDict"): dict,
            **{("torch", name): dtype for name, dtype in DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            if not HELD.fullmatch(f"{module}.{name}"):
                raise pickle.UnpicklingError(f"it calls {module}.{name}"[:150])
            self._known[module, name] = _holder(module, name)
        return self._known[module, name]


class Part(NamedTuple):
    """Where a part of a tensor is: its offset and shape in the tensor, and its bytes in a file."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class TorchDistTensors:
    """The tensors of a ``torch_dist`` checkpoint, sharded over any ranks, read block by block.

    Args:
        folder: of an iteration.

    Raises:
        CheckpointError: for a file that is missing, damaged, or asks for code to be run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forms: dict[str, TensorForm] = {}
        self._parts: dict[str, list[Part]] = {}
        self._places: dict[tuple[str, int], dict[tuple[int, ...], list[Part]]] = {}
        path = folder / METADATA
        try:
            self._read_index(_unpickled(path))
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is no index of a checkpoint ({type(error).__name__}:"
                f" {str(error)[:150]}): take another one"
            ) from None

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the order of the index."""
        return list(self._forms)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._forms

    def form(self, name: str) -> TensorForm:
        """The dtype and shape of a whole tensor."""
        return self._forms[name]

    def block(self, name: str, index: tuple[int, ...]) -> Tensor:
        """What a tensor has at ``index`` of its leading dimensions.

        Raises:
            CheckpointError: if a part of it is missing, damaged, or there twice.
        """
        form = self._forms[name]
        depth = len(index)
        shape = form.shape[depth:]
        parts = self._at(name, depth).get(index, [])
        if len(parts) == 1 and parts[0].shape == (*(1,) * depth, *shape):
            return self._read(name, parts[0]).reshape(shape)
        tensor = torch.empty(shape, dtype=form.dtype)
        covered = torch.zeros(shape, dtype=torch.bool)
        for part in parts:
            # A part may hold several layers: this block's is one of them.
            inside = tuple(at - start for at, start in zip(index, part.offset, strict=False))
            place = tuple(
                slice(start, start + size)
                for start, size in zip(part.offset[depth:], part.shape[depth:], strict=True)
            )
            if covered[place].any():
                raise CheckpointError(
                    f"elements of the tensor '{name}' are more than once in {self.folder}: take"
                    " another checkpoint"
                )
            covered[place] = True
            tensor[place] = self._read(name, part)[inside]
        if not covered.all():
            raise CheckpointError(
                f"the tensor '{name}' has {int(covered.sum())} of {covered.numel()} elements at"
                f" {list(index)} in {self.folder}: the checkpoint is incomplete, take another one"
            )
        return tensor

    def _at(self, name: str, depth: int) -> dict[tuple[int, ...], list[Part]]:
        """The parts of a tensor by the index in its ``depth`` leading dimensions."""
        if (name, depth) not in self._places:
            found: dict[tuple[int, ...], list[Part]] = {}
            for part in self._parts[name]:
                ranges = [
                    range(start, start + size)
                    for start, size in zip(part.offset[:depth], part.shape[:depth], strict=True)
                ]
                indices: list[tuple[int, ...]] = [()]
                for each in ranges:
                    indices = [(*index, number) for index in indices for number in each]
                for index in indices:
                    found.setdefault(index, []).append(part)
            self._places[name, depth] = found
        return self._places[name, depth]

    def _read(self, name: str, part: Part) -> Tensor:
        path = self.folder / part.file
        try:
            if path.is_symlink() or not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path} is no plain file: take another checkpoint")
            with path.open("rb") as file:
                file.seek(part.start)
                content = file.read(part.length)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}): the checkpoint is incomplete, take"
                " another one"
            ) from None
        tensor = load_pickled_tensor(content, f"{path}, tensor '{name}'")
        if tensor.dtype != self._forms[name].dtype or tuple(tensor.shape) != part.shape:
            raise CheckpointError(
                f"a part of the tensor '{name}' in {path} is {tensor.dtype} {list(tensor.shape)},"
                f" and the index says {self._forms[name].dtype} {list(part.shape)}: take another"
                " checkpoint"
            )
        return tensor

    # --- the index

    def _read_index(self, index: Held) -> None:
        sizes: dict[str, int] = {}
        shapes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
        for name, entry in index.get("state_dict_metadata").items():
            if "Bytes" in entry.name:
                continue
            properties = entry.get("properties").state
            dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
            shape = _numbers(entry.get("size"))
            name = str(name)
            self._forms[name] = TensorForm(dtype, shape)
            self._parts[name] = []
            shapes[name] = self._chunks(name, entry)
        for place, info in index.get("storage_data").items():
            name = place.get("fqn")
            if name not in self._forms:
                continue
            if info.get("transform_descriptors"):
                raise CheckpointError(
                    f"{self.folder} is compressed, which this tool does not read: {RESTART}"
                )
            file, start, length = (
                info.get("relative_path"),
                *_numbers((info.get("offset"), info.get("length"))),
            )
            if Path(file).name != file or file.startswith("."):
                raise ValueError(f"it names the file {file[:80]!r}")
            if file not in sizes:
                path = self.folder / file
                sizes[file] = path.stat().st_size if path.is_file() else -1
            if sizes[file] < start + length:
                raise CheckpointError(
                    f"{self.folder / file} is missing or cut off: the checkpoint is incomplete,"
                    " take another one"
                )
            offset = _numbers(place.get("offset") or (0,) * len(self._forms[name].shape))
            self._parts[name].append(Part(offset, shapes[name][offset], file, start, length))
            if prod(shapes[name][offset]) * self._forms[name].dtype.itemsize > length:
                raise ValueError(f"a part of '{name[:80]}' claims more elements than the file has")

    def _chunks(self, name: str, entry: Held) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a tensor's parts by their offsets."""
        whole = self._forms[name].shape
        found = {}
        for chunk in entry.get("chunks"):
            offset, shape = _numbers(chunk.get("offsets")), _numbers(chunk.get("sizes"))
            ends = zip(offset, shape, whole, strict=True)
            if any(first + size > last for first, size, last in ends):
                raise ValueError(f"a part of '{name[:80]}' is outside of it")
            found[offset] = shape
        return found


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(
        type(value) is int and value >= 0 for value in values
    ):
        raise ValueError("a size or an offset is no number")
    return tuple(values)


def _unpickled(path: Path) -> Held:
    """The object in ``.metadata``."""
    try:
        if path.is_symlink() or not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no plain file")
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = path.read_bytes()
        check_instructions(content, MOST_INSTRUCTIONS)
        found = _IndexUnpickler(io.BytesIO(content)).load()
        if not isinstance(found, Held):
            raise ValueError("it holds something else")
        return found
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: give a folder that Megatron-LM has saved with --ckpt-format"
            " torch_dist"
        ) from None
    # Unpickling damaged bytes raises almost anything.
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read without running code that it holds, or is damaged"
            f" ({' '.join(str(error).split())[:200]}): take another checkpoint"
        ) from None


def iteration_folder(source: Path) -> tuple[Path, int]:
    """The folder of the newest iteration, and its number.

    Args:
        source: the folder that Megatron-LM saves to, or that of one iteration.

    Raises:
        CheckpointError: if there is none.
        ConfigError: for a checkpoint of another format.
    """
    folder = source
    tracker = source / TRACKER
    if os.path.lexists(tracker):
        plain = tracker.is_file() and tracker.stat().st_size < LARGEST_TRACKER
        text = tracker.read_text(encoding="utf-8", errors="replace").strip() if plain else ""
        if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
            raise CheckpointError(
                f"{tracker} names no iteration: give the folder of one, such as"
                f" {source / ITERATION.format(1000)}"
            )
        folder = source / ("release" if text == "release" else ITERATION.format(int(text)))
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give one of Megatron-LM's checkpoints")
    if not (folder / BACKENDS).is_file():
        raise ConfigError(
            f"{folder} has no {BACKENDS}, and so is no distributed checkpoint of Megatron-Core:"
            f" {RESTART}"
        )
    try:
        backend = read_object(folder / BACKENDS).get("sharded_backend")
    except NotAnObject as error:
        raise CheckpointError(f"{folder / BACKENDS} {error}: take another checkpoint") from None
    if backend != "torch_dist":
        raise ConfigError(
            f"{folder / BACKENDS} has the format {str(backend)[:50]!r}, and this tool reads"
            f" torch_dist: {RESTART}"
        )
    digits = re.fullmatch(r"iter_([0-9]{1,12})", folder.name)
    return folder, int(digits[1]) if digits else 0


def read_arguments(folder: Path) -> JsonObject:
    """The arguments of the run in ``common.pt``, plain values by their names.

    Raises:
        CheckpointError: if the file is missing, damaged, or asks for code to be run.
    """
    path = folder / COMMON
    content = load_pickled(path, _stand_ins(path))
    arguments = content.get("args")
    if not isinstance(arguments, Held) or not isinstance(arguments.state, dict):
        raise CheckpointError(
            f"{path} has no arguments of the run, which the model is built from: {RESTART}"
        )
    return dict(arguments.state)


def _stand_ins(path: Path) -> Mapping[str, type]:
    """Holders for the classes that a file names and that only have state."""
    names = {"argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals"}
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(each for each in archive.namelist() if each.endswith("/data.pkl"))
            with archive.open(member) as file:
                names |= _named_classes(file.read(LARGEST_COMMON))
    except (OSError, StopIteration, ValueError, zipfile.BadZipFile, NotImplementedError):
        return {}  # load_pickled says what is wrong with it
    return {name: _holder(*name.rsplit(".", 1)) for name in names}


def _named_classes(content: bytes) -> set[str]:
    """The classes of Megatron that a pickle of torch's names."""
    found = set()
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name == "GLOBAL" and isinstance(argument, str):
            name = argument.replace(" ", ".")
            if name.startswith("megatron.") and HELD.fullmatch(name):
                found.add(name)
    return found
