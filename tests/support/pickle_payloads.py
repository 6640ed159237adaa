"""Files of weights as an attacker would make them: each writes a canary if it is unpickled, or
takes memory and time without end.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

Payload = Callable[[Path, Path], None]  # writes the file; the second path is the canary


class Call:
    """Unpickling it calls a function; its arguments may be calls themselves."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class WithState:
    """The call is the state that ``__setstate__`` would get."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"state": self.call}


class WithItems:
    """The call is an item of a list, which the unpickler appends."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (), None, iter([self.call])


def _named(module: str, attribute: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


# A function by module and name, and its arguments; CANARY, CODE and SHELL stand for the canary's
# path, for Python and for a command that write it.
CALLS: dict[str, tuple[Any, ...]] = {
    "os.system": ("SHELL",),
    "posix.system": ("SHELL",),
    "subprocess.getoutput": ("SHELL",),
    "subprocess.check_call": (["touch", "CANARY"],),
    "subprocess.run": (["touch", "CANARY"],),
    "pty.spawn": (["touch", "CANARY"],),
    "builtins.eval": ("CODE",),
    "builtins.exec": ("CODE",),
    "builtins.open": ("CANARY", "w"),
    "io.open": ("CANARY", "w"),
    "io.FileIO": ("CANARY", "w"),
    "os.mkdir": ("CANARY",),
    "os.makedirs": ("CANARY",),
    "os.mkfifo": ("CANARY",),
    "os.symlink": ("/", "CANARY"),
    "os.open": ("CANARY", os.O_CREAT | os.O_WRONLY),
    "shutil.copyfile": (__file__, "CANARY"),
    "pathlib.Path.touch": (Path("CANARY"),),
    "pathlib.Path.mkdir": (Path("CANARY"),),
    "logging.FileHandler": ("CANARY",),
    "zipfile.ZipFile": ("CANARY", "w"),
    "tarfile.open": ("CANARY", "w"),
    "gzip.open": ("CANARY", "wb"),
    "bz2.open": ("CANARY", "wb"),
    "lzma.open": ("CANARY", "wb"),
    "cProfile.run": ("CODE", "/dev/null"),
    "torch.save": (1, "CANARY"),
    "numpy.memmap": ("CANARY", "uint8", "w+", 0, (1,)),
    "sqlite3.connect": ("CANARY",),
}


def _filled(value: Any, canary: Path) -> Any:
    if isinstance(value, list):
        return [_filled(each, canary) for each in value]
    if value == Path("CANARY"):
        return canary
    words = {
        "CANARY": str(canary),
        "CODE": f"open({str(canary)!r}, 'w').close()",
        "SHELL": f"touch '{canary}'",
    }
    return words.get(value, value) if isinstance(value, str) else value


def call(name: str, canary: Path) -> Call:
    module, _, attribute = name.partition(".")
    return Call(_named(module, attribute), *(_filled(each, canary) for each in CALLS[name]))


def shell(canary: Path) -> Call:
    return call("os.system", canary)


def chained(canary: Path) -> Call:
    """``getattr(import_module("os"), "system")("touch ...")``, of innocent parts."""
    system = Call(getattr, Call(importlib.import_module, "os"), "system")
    return Call(_named("operator", "call"), system, f"touch '{canary}'")


PLACES: dict[str, Callable[[Path], Any]] = {
    "at the top": shell,
    "in a dictionary": lambda canary: {"model": {"weight": shell(canary)}},
    "in a list": lambda canary: {"steps": [1, [2, shell(canary)]]},
    "in a tuple": lambda canary: {"pair": (1, (2, shell(canary)))},
    "as a key": lambda canary: {(1, shell(canary)): 1},
    "in a configuration": lambda canary: {"w": torch.ones(2), "config": {"a": shell(canary)}},
    "behind tensors": lambda canary: {"model": {"w": torch.ones(2)}, "optimizer": shell(canary)},
    "as a state": lambda canary: {"x": WithState(shell(canary))},
    "as an item": lambda canary: {"x": WithItems(shell(canary))},
    "by getattr": lambda canary: {"x": chained(canary)},
    "by partial": lambda canary: {
        "x": Call(
            _named("operator", "call"),
            Call(_named("functools", "partial"), os.system, f"touch '{canary}'"),
        )
    },
    "by a pickle in a pickle": lambda canary: {
        "x": Call(pickle.loads, pickle.dumps(shell(canary)))
    },
    "by map": lambda canary: {"x": Call(list, Call(map, os.system, [f"touch '{canary}'"]))},
    "as a size": lambda canary: {"x": Call(torch.Size, [shell(canary)])},
    "as a parameter": lambda canary: {
        "x": Call(torch._utils._rebuild_parameter, torch.ones(1), False, {"hook": shell(canary)})
    },
    "as a tensor's state": lambda canary: {
        "x": Call(
            torch._tensor._rebuild_from_type_v2,
            os.system,
            torch.Tensor,
            (f"touch '{canary}'",),
            {},
        )
    },
    "as hooks": lambda canary: {
        "x": Call(
            torch._utils._rebuild_tensor_v2,
            torch.ones(4).storage(),
            0,
            (4,),
            (1,),
            False,
            OrderedDict(x=shell(canary)),
        )
    },
    "as numpy's array": lambda canary: {"x": numpy.array([shell(canary)], dtype=object)},
}


def _zip_of(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive_of(path: Path, data: bytes, compress: int = zipfile.ZIP_STORED) -> None:
    """An archive as torch.save makes it, with any bytes for its pickle."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def _save(new: bool) -> Callable[[Path, Any], None]:
    return lambda path, content: torch.save(content, path, _use_new_zipfile_serialization=new)


def _plain(protocol: int) -> Callable[[Path, Any], None]:
    return lambda path, content: path.write_bytes(pickle.dumps(content, protocol))


def _as_data_pkl(path: Path, content: Any) -> None:
    archive_of(path, pickle.dumps(content, 2))


FORMATS: dict[str, Callable[[Path, Any], None]] = {
    "archive": _save(new=True),
    "old file": _save(new=False),
    "data.pkl": _as_data_pkl,
    "plain pickle": _plain(2),
}


def running_payloads() -> dict[str, Payload]:
    """Those that write the canary if an unrestricted unpickler reads them."""
    found: dict[str, Payload] = {}
    for number, name in enumerate(CALLS):
        form = list(FORMATS)[number % len(FORMATS)]
        found[f"{name} in {form}"] = lambda path, canary, name=name, form=form: FORMATS[form](
            path, {"model": {"w": call(name, canary)}}
        )
    for place, content in PLACES.items():
        for form in ("archive", "old file"):
            found[f"{place} in {form}"] = lambda path, canary, content=content, form=form: FORMATS[
                form
            ](path, content(canary))
    return found


def _rebuilt(*arguments: Any) -> Any:
    return {"w": Call(torch._utils._rebuild_tensor_v2, torch.ones(4).storage(), *arguments)}


def _hex_of_hex(times: int) -> Any:
    value: Any = Call(_named("_codecs", "encode"), "x" * 100, "latin1")
    for _ in range(times):
        value = Call(_named("_codecs", "encode"), value, "hex")
    return {"w": value}


def _inside_itself() -> Any:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


def _wide_configuration() -> Any:
    section: dict[str, Any] = {"hidden_size": 1}
    for _ in range(6):
        section = {str(number): section for number in range(200)}
    return {"config": section, "model": _inside_itself()}


def _lying_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.filelist[0].file_size = 1 << 40


def _two_pickles(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/data.pkl", "b/data.pkl", "b/version"):
            archive.writestr(name, pickle.dumps({}, 2))


class _Doubled(torch.nn.Module):
    """Without weights: TorchScript's own failed to save those of a process full of other tests."""

    def forward(self, x_BS: torch.Tensor) -> torch.Tensor:
        return x_BS * 2


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(_Doubled()), path)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle", "../outside"):
            content = pickle.dumps({"x": 1}, 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _saved(content: Callable[[], Any], new: bool = True) -> Callable[[Path], None]:
    return lambda path: torch.save(content(), path, _use_new_zipfile_serialization=new)


def _pickle(data: bytes) -> Callable[[Path], None]:
    return lambda path: archive_of(path, data)


def _cut(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = _zip_of({"w": torch.ones(100)})
        path.write_bytes(content[: int(len(content) * share)])

    return write


DEEP = 5_000
ENDLESS = 10_000
# Files that no code is in, and that no program may take for weights; sizes are in elements.
DAMAGED: dict[str, Callable[[Path], None]] = {
    "2^60 from one number": _saved(lambda: {"w": torch.zeros(1).expand(1 << 30, 1 << 30)}),
    "2^40 from one number": _saved(lambda: {"w": torch.zeros(1).expand(1 << 40)}, new=False),
    "2^60 of a storage of 4": _saved(lambda: _rebuilt(0, (1 << 60,), (1,), False, OrderedDict())),
    "2^60 in an old file": _saved(
        lambda: _rebuilt(0, (1 << 60,), (1,), False, OrderedDict()), new=False
    ),
    "2^34 in an old file": _saved(
        lambda: _rebuilt(0, (1 << 34,), (1,), False, OrderedDict()), new=False
    ),
    "a negative size": _saved(lambda: _rebuilt(0, (-4,), (1,), False, OrderedDict())),
    "a negative stride": _saved(lambda: _rebuilt(0, (4,), (-1,), False, OrderedDict())),
    "a negative offset": _saved(lambda: _rebuilt(-9, (4,), (1,), False, OrderedDict())),
    "an offset behind the end": _saved(lambda: _rebuilt(1 << 40, (4,), (1,), False, OrderedDict())),
    "a size of strings": _saved(lambda: _rebuilt(0, ("4",), (1,), False, OrderedDict())),
    "a size without strides": _saved(lambda: _rebuilt(0, (2, 2), (1,), False, OrderedDict())),
    "too few arguments": _saved(lambda: _rebuilt(0)),
    "a storage of 2^60": _saved(lambda: {"w": Call(torch.UntypedStorage, 1 << 60)}),
    "a tensor without values": _saved(lambda: {"w": torch.ones(4, device="meta")}),
    "a sparse tensor": _saved(lambda: {"w": torch.eye(3).to_sparse()}),
    "a quantized tensor": _saved(
        lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
    ),
    "complex numbers": _saved(lambda: {"w": torch.ones(2, dtype=torch.complex64)}),
    "a bytearray of 2^34": _saved(lambda: {"w": Call(bytearray, 1 << 34)}),
    "hexadecimal of hexadecimal": _saved(lambda: _hex_of_hex(40)),
    "a dictionary in itself": _saved(_inside_itself),
    "a configuration of 200^6 sections": _saved(_wide_configuration),
    "a name of two lines": _saved(lambda: {"w\nerror: x": torch.ones(1)}),
    "a name with NUL": _saved(lambda: {"w\0": torch.ones(1)}),
    "a name of 100,000 letters": _saved(lambda: {"w" * 100_000: torch.ones(1)}),
    "a list": _saved(lambda: [torch.ones(1)]),
    "a tensor": _saved(lambda: torch.ones(1)),
    "a number": _saved(lambda: 7),
    "nested lists": _pickle(b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."),
    "nested tuples": _pickle(b"\x80\x02N" + b"\x85" * DEEP + b"."),
    "nested tuples as a key": _pickle(b"\x80\x02}N" + b"\x85" * DEEP + b"K\x01s."),
    "nested dictionaries": _pickle(b"\x80\x02" + b"}K\x01" * DEEP + b"K\x02" + b"s" * DEEP + b"."),
    "instructions without end": _pickle(b"\x80\x02}" + b"K\x010" * ENDLESS + b"."),
    "an empty stack": _pickle(b"\x80\x02s."),
    "no mark": _pickle(b"\x80\x02t."),
    "a memory that was never filled": _pickle(b"\x80\x02h\x07."),
    "no end": _pickle(b"\x80\x02}"),
    "another instruction": _pickle(b"\x80\x02\xff."),
    "a length behind the end": _pickle(b"\x80\x02X\xff\xff\xff\x7fa."),
    "a zip bomb": lambda path: archive_of(
        path, pickle.dumps({"x": bytes(50_000_000)}, 2), zipfile.ZIP_DEFLATED
    ),
    "an archive that claims 2^40 bytes": _lying_archive,
    "an archive of two pickles": _two_pickles,
    "an archive of nothing": lambda path: zipfile.ZipFile(path, "w").close(),
    "a compiled module": _script,
    "a tar file": _tar,
    "nothing": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"\x80"),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "the beginning of an archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "half an archive": _cut(0.5),
    "nearly an archive": _cut(0.98),
    "numpy's file": lambda path: numpy.save(path.open("wb"), numpy.ones(3)),
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}
