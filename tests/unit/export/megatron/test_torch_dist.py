"""The files of a torch_dist checkpoint: what is read, and what is refused without running it."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from pretrain.checkpoint.tensor_files import TensorForm
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.megatron.reader import TorchDistTensors, iteration_folder, read_arguments
from pretrain.export.megatron.torch_dist import (
    BACKENDS,
    COMMON,
    METADATA,
    TRACKER,
    Chunk,
    write_torch_dist,
)
from tests.support.fork_server import run_python
from tests.support.pickle_payloads import CALLS, call

VALUES_LXY = torch.arange(24.0).view(2, 3, 4)


def write(folder: Path) -> Path:
    """A tensor of two layers, the second in two halves, and an object."""

    def chunk(offset: tuple[int, ...], shape: tuple[int, ...]) -> Chunk:
        place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        form = TensorForm(torch.float32, shape)
        return Chunk("layers.w", (2, 3, 4), offset, form, lambda: VALUES_LXY[place])

    chunks = [chunk((0, 0, 0), (1, 3, 4)), chunk((1, 0, 0), (1, 2, 4)), chunk((1, 2, 0), (1, 1, 4))]
    folder.mkdir(parents=True)
    return write_torch_dist(folder, chunks, ["layers.x._extra_state/shard_0_1"], {"a": 1}, 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("torch_dist") / "run")


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole.parent, tmp_path / "run")
    return tmp_path / "run" / whole.name


def test_torchs_own_reader_reads_what_was_written(whole: Path) -> None:
    state = {"layers.w": torch.zeros(2, 3, 4)}
    load(state, storage_reader=FileSystemReader(whole), no_dist=True)
    assert torch.equal(state["layers.w"], VALUES_LXY)
    assert iteration_folder(whole.parent) == (whole, 7) == iteration_folder(whole)
    common = torch.load(whole / COMMON, weights_only=False)
    assert common["args"] == argparse.Namespace(a=1) and common["iteration"] == 7
    assert json.loads((whole / BACKENDS).read_text())["sharded_backend"] == "torch_dist"


def test_blocks_are_read_from_whole_and_from_divided_layers(whole: Path) -> None:
    tensors = TorchDistTensors(whole)
    assert tensors.names == ["layers.w"] and tensors.form("layers.w").shape == (2, 3, 4)
    for layer in range(2):
        assert torch.equal(tensors.block("layers.w", (layer,)), VALUES_LXY[layer])
    assert torch.equal(tensors.block("layers.w", ()), VALUES_LXY)
    assert torch.equal(tensors.block("layers.w", (1, 2)), VALUES_LXY[1, 2])
    assert read_arguments(whole) == {"a": 1}


def edited_index(folder: Path, change: Callable[[Any], None]) -> None:
    index = pickle.loads((folder / METADATA).read_bytes())
    change(index)
    (folder / METADATA).write_bytes(pickle.dumps(index))


def test_missing_and_doubled_elements_are_refused(copied: Path) -> None:
    def without_last(index: Any) -> None:
        index.storage_data.popitem()

    edited_index(copied, without_last)
    with pytest.raises(CheckpointError, match="8 of 12 elements"):
        TorchDistTensors(copied).block("layers.w", (1,))

    def doubled(index: Any) -> None:
        chunks = index.state_dict_metadata["layers.w"].chunks
        chunks[1].sizes = torch.Size((1, 3, 4))

    edited_index(copied, doubled)
    with pytest.raises(CheckpointError, match="claims more elements|the index says"):
        TorchDistTensors(copied).block("layers.w", (1,))


def test_parts_that_overlap_are_refused(copied: Path) -> None:
    def moved(index: Any) -> None:
        chunks = index.state_dict_metadata["layers.w"].chunks
        (last,) = (place for place in index.storage_data if place.offset == (1, 2, 0))
        info = index.storage_data.pop(last)
        chunks[2].offsets = torch.Size((1, 1, 0))
        index.storage_data[dataclasses.replace(last, offset=chunks[2].offsets)] = info

    edited_index(copied, moved)
    with pytest.raises(CheckpointError, match="more than once"):
        TorchDistTensors(copied).block("layers.w", (1,))


@pytest.mark.parametrize("name", ["../common.pt", ".metadata", "/etc/passwd", "gone.distcp"])
def test_parts_are_read_from_files_of_the_folder_only(copied: Path, name: str) -> None:
    def moved(index: Any) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    edited_index(copied, moved)
    with pytest.raises(CheckpointError, match="take another"):
        TorchDistTensors(copied).block("layers.w", (0,))


def test_a_file_that_is_cut_off_or_damaged_is_named(copied: Path) -> None:
    (data,) = copied.glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"distcp is missing or cut off"):
        TorchDistTensors(copied)
    data.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match="damaged"):
        TorchDistTensors(copied).block("layers.w", (0,))
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(CheckpointError, match="missing or cut off|no plain file"):
        TorchDistTensors(copied)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_no_pickle_of_a_checkpoint_is_run(copied: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    payload = call(name, canary)
    (copied / METADATA).write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match="without running code|no index"):
        TorchDistTensors(copied)
    torch.save({"args": argparse.Namespace(x=payload)}, copied / COMMON)
    with pytest.raises(CheckpointError, match="without running code"):
        read_arguments(copied)
    assert not canary.exists()


def test_a_part_that_is_no_tensor_is_not_run(copied: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    buffer = io.BytesIO()
    torch.save(call("os.system", canary), buffer)
    (data,) = copied.glob("*.distcp")
    data.write_bytes(buffer.getvalue())

    def at_the_start(index: Any) -> None:
        for info in index.storage_data.values():
            info.offset, info.length = 0, len(buffer.getvalue())

    edited_index(copied, at_the_start)
    with pytest.raises(CheckpointError, match="without running code"):
        TorchDistTensors(copied).block("layers.w", (0,))
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04N.",
        pickle.dumps({"state_dict_metadata": {}}),
        # Python's unpickler would make a table of 2^31 entries.
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02" + b"(" * 300 + b"N" + b"t" * 300 + b".",
    ],
)
def test_an_index_of_something_else_is_refused(copied: Path, content: bytes) -> None:
    (copied / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        TorchDistTensors(copied)


class Mode:
    """Stands for an enumeration of Megatron's, whose package is not imported."""

    __module__ = "megatron.core.transformer.enums"


def test_classes_of_megatron_in_the_arguments_are_not_imported(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    module = types.ModuleType(Mode.__module__)
    module.Mode = Mode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, Mode.__module__, module)
    arguments = argparse.Namespace(num_layers=2, attention_backend=Mode(), dtype=torch.bfloat16)
    torch.save({"args": arguments, "iteration": 3}, copied / COMMON)
    found = read_arguments(copied)
    assert found["num_layers"] == 2 and found["dtype"] == torch.bfloat16
    assert not isinstance(found["attention_backend"], Mode)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A limit of the size of files is what a full disk is for the writer."""
    program = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from pretrain.checkpoint.tensor_files import TensorForm
        from pretrain.core.errors import StorageError
        from pretrain.export.megatron.torch_dist import Chunk, write_torch_dist

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        form = TensorForm(torch.float32, (100_000,))
        chunk = Chunk("w", (100_000,), (0,), form, lambda: torch.zeros(100_000))
        try:
            write_torch_dist(Path(sys.argv[1]), [chunk], [], {}, 0)
        except StorageError as error:
            print(error)
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    (tmp_path / "run").mkdir()
    done = run_python(script, tmp_path / "run")
    assert done.returncode == 0 and "free space or choose another folder" in done.stdout


def test_other_formats_and_missing_folders_are_refused(copied: Path) -> None:
    run = copied.parent
    (run / TRACKER).write_text("release")
    with pytest.raises(CheckpointError, match="there is no folder"):
        iteration_folder(run)
    (run / TRACKER).write_text("../7")
    with pytest.raises(CheckpointError, match="names no iteration"):
        iteration_folder(run)
    (run / TRACKER).write_text("7")
    (copied / BACKENDS).write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConfigError, match="'zarr'"):
        iteration_folder(run)
    (copied / BACKENDS).unlink()
    with pytest.raises(ConfigError, match="no distributed checkpoint"):
        iteration_folder(run)
