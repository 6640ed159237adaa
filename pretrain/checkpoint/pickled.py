"""Files that ``torch.save`` wrote, read without running what a pickle could call.

torch's restricted loader calls none but a few functions that build tensors. Before it sees a file,
the file is searched for what takes endless memory or time: archives that inflate, and instructions
that nest or never end.
"""

from __future__ import annotations

import io
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject

# 200,000 tensors of 25 instructions each: no state dict comes near it.
MOST_INSTRUCTIONS = 5_000_000
LARGEST_PICKLE = 100_000_000
# A file of optimizer states has ten. Python's hash of a tuple overflows the stack at 100,000.
DEEPEST = 200
LONGEST_NAME = 1000
ZIP_START = b"PK\x03\x04"
# Magic number, protocol, machine, the object, and the keys of its storages; then the raw values.
PICKLES_BEFORE_1_6 = 5
# How torch names a function that it does not call.
REFUSED = re.compile(r"\bGLOBAL ([\w.]+)")


class _Object(NamedTuple):
    """An object on the unpickler's stack.

    Attributes:
        depth: how often others are nested in it.
        text: of a string or the name of a function; of a pair, that of its second entry.
    """

    depth: int = 0
    text: str = ""


MARK = _Object(-1)
STORE = {"PUT", "BINPUT", "LONG_BINPUT"}
RECALL = {"GET", "BINGET", "LONG_BINGET"}
EXTEND = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


@contextmanager
def _only_allowed(classes: list[Any]) -> Iterator[None]:
    """Let torch load these classes and its own: none that a library has registered meanwhile.

    Megatron-Core registers ``argparse.Namespace``, which would take the place of a stand-in.
    """
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)


def load_pickled(path: Path, stand_ins: Mapping[str, type] | None = None) -> JsonObject:
    """Return the dictionary in a file: tensors, numbers, strings and containers of them.

    Tensors stay in the file until they are read.

    Args:
        stand_ins: classes of this project by the dotted name of the class whose plain data they
            take: nothing of the named class is imported or run.

    Raises:
        CheckpointError: for a file that is missing or damaged, holds something else, or asks for
            code to be run, or for more memory than such a file can need.
    """
    try:
        # A pipe would block without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no plain file")
        is_archive = _starts_as_archive(path)
        _check_archive(path, path.stat().st_size) if is_archive else _check_old_file(path)
        # weights_only: a pickle may call any function. Files from before torch 1.6 are no archives,
        # and cannot be mapped.
        allowed: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
        with _only_allowed(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        # torch raises RuntimeError, UnpicklingError, EOFError and more for damaged and dangerous
        # files.
        raise CheckpointError(
            f"{path} cannot be read without running code that it holds, or is damaged "
            f"({_reason(error)}): take another checkpoint"
        ) from None
    # Somebody may have saved a whole module, or a single tensor.
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no tensors by name: take another checkpoint")
    return content


def load_pickled_tensor(content: bytes, origin: str) -> Tensor:
    """Return the tensor in what ``torch.save`` wrote for it alone.

    Args:
        content: a whole archive, such as a part of a ``.distcp`` file.
        origin: where it is, for the error sentence.

    Raises:
        CheckpointError: as :func:`load_pickled`, and for anything else than one tensor of numbers.
    """
    try:
        _check_archive(io.BytesIO(content), len(content))
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor):
            raise ValueError("it is no tensor")
        if fault := _fault(tensor, len(content)):
            raise ValueError(f"it {fault}")
    except Exception as error:  # as in load_pickled
        raise CheckpointError(
            f"{origin} cannot be read without running code that it holds, or is damaged "
            f"({_reason(error)}): take another checkpoint"
        ) from None
    return tensor


def plain_tensors(path: Path, content: JsonObject) -> dict[str, Tensor]:
    """Return the tensors of a dictionary from :func:`load_pickled`, by name.

    Raises:
        CheckpointError: for a tensor that is larger than the file or holds no plain numbers, and
            for a name that cannot be printed.
    """
    tensors: dict[str, Tensor] = {}
    size = path.stat().st_size
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor):
            continue
        name = str(key)
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise CheckpointError(
                f"{path} has a tensor with the name {name[:80]!r}, which is none: take another "
                "checkpoint"
            )
        if fault := _fault(tensor, size):
            raise CheckpointError(
                f"the tensor '{name}' in {path} {fault}: save the model's state_dict again"
            )
        tensors[name] = tensor
    return tensors


def _fault(tensor: Tensor, file_bytes: int) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return f"holds no plain numbers ({tensor.dtype}, {tensor.layout})"
    if tensor.device.type != "cpu":
        return "has no values in the file"
    # A stride of 0 makes a tensor of any size from a single number.
    if tensor.numel() * tensor.element_size() > file_bytes:
        return f"claims {tensor.numel():,} numbers, more than the file has"
    return None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if refused := REFUSED.search(text):
        return f"it calls {refused[1][:100]}"
    # torch's advice is to load the file without the restriction, which is not ours.
    if "weights_only" in text:
        return "torch's restricted loader refuses it"
    return text[:200] or type(error).__name__


def _starts_as_archive(path: Path) -> bool:
    # As torch decides: zipfile's own test looks for an archive at the end of any file.
    with path.open("rb") as file:
        return file.read(len(ZIP_START)) == ZIP_START


def _check_archive(file: Path | IO[bytes], size: int) -> None:
    """Raise ValueError for an archive of ``size`` bytes that ``torch.save`` does not write."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which torch.save never does")
        # Members may share their bytes, each with all of them.
        if sum(member.file_size for member in members) > size:
            raise ValueError("its members are larger than the file")
        if len({member.filename for member in members}) != len(members):
            raise ValueError("it has two members of one name")
        pickles = [each for each in members if each.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("it has no single data.pkl")
        if pickles[0].file_size > LARGEST_PICKLE:
            raise ValueError(f"its data.pkl has {pickles[0].file_size:,} bytes")
        check_instructions(archive.read(pickles[0]), MOST_INSTRUCTIONS)


def _check_old_file(path: Path) -> None:
    """Raise ValueError for a file of one pickle behind the other that never ends."""
    left = MOST_INSTRUCTIONS
    with path.open("rb") as file:
        for _ in range(PICKLES_BEFORE_1_6):
            left -= check_instructions(file, left)


def check_instructions(pickle: bytes | IO[bytes], most: int) -> int:
    """Count the instructions of a pickle, which is not run.

    Raises:
        ValueError: if it has more than ``most``, is torn, nests more than 200 times, or calls what
            makes something large from something small.
    """
    count = 0
    stack: list[_Object] = []
    remembered: dict[Any, _Object] = {}
    for instruction, argument, _ in pickletools.genops(pickle):
        count += 1
        if count > most:
            raise ValueError(f"it has more than {most:,} instructions")
        name = instruction.name
        if name in STORE:
            # Python's unpickler makes a table of that length.
            if isinstance(argument, int) and argument > count:
                raise ValueError(f"it numbers its object {count:,} as {argument:,}")
            remembered[argument] = stack[-1]
        elif name == "MEMOIZE":
            remembered[len(remembered)] = stack[-1]
        elif name in RECALL:
            stack.append(remembered.get(argument, _Object()))
        elif name == "MARK":
            stack.append(MARK)
        else:
            _apply(instruction, argument, stack)
        if stack and stack[-1].depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} times")
    return count


def _apply(instruction: pickletools.OpcodeInfo, argument: Any, stack: list[_Object]) -> None:
    """Take an instruction's operands from the stack, and put its results there."""
    name = instruction.name
    text = argument if isinstance(argument, str) and len(argument) < LONGEST_NAME else ""
    # Most instructions only push a constant.
    if not instruction.stack_before:
        stack += [_Object(0, text)] * len(instruction.stack_after)
        return
    wanted = list(instruction.stack_before)
    inner: list[_Object] = []
    if pickletools.markobject in wanted:
        while (found := stack.pop()) is not MARK:
            inner.append(found)
        wanted = wanted[: wanted.index(pickletools.markobject)]
    below = [stack.pop() for _ in wanted][::-1]
    if name in ("REDUCE", "NEWOBJ"):
        _check_call(*below)
    # A list that grows is no deeper than its deepest entry makes it.
    container = below.pop(0).depth if name in EXTEND and below else 0
    depth = max(container, max((each.depth for each in (*inner, *below)), default=-1) + 1)
    text = below[1].text if name == "TUPLE2" else ""
    stack += [_Object(depth, text)] * len(instruction.stack_after)


def _check_call(function: _Object, arguments: _Object) -> None:
    # torch allows both. bytearray(2 ** 40) fills that memory, and each encoding of bytes as "hex"
    # doubles them. Python itself writes bytes as text with "latin1".
    if function.text.endswith(" bytearray"):
        raise ValueError("it makes a bytearray of any size")
    if function.text == "_codecs encode" and arguments.text not in ("latin1", "latin-1"):
        raise ValueError(f"it encodes text as {arguments.text[:20]!r}")
