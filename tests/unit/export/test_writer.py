from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.core.errors import CheckpointError, ConfigError, StorageError
from pretrain.export.name_map import Link
from pretrain.export.parity import check_same_numbers, same_bits
from pretrain.export.writer import (
    INDEX,
    RECORD,
    WEIGHTS,
    open_exported_weights,
    parse_bytes,
    published_folder,
    write_json_file,
    write_weights,
)


def tensors() -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.randn(10, 10) for index in range(6)}


def write(folder: Path, written: dict[str, torch.Tensor], shard_bytes: int = 5000) -> None:
    forms = {
        name: TensorForm(tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()
    }
    write_weights(folder, forms, written.items(), shard_bytes)


def check_reads_back(folder: Path, written: dict[str, torch.Tensor]) -> None:
    reader = open_exported_weights(folder)
    assert set(reader.names) == written.keys() and all(
        same_bits(reader.read(name), tensor) for name, tensor in written.items()
    )


def test_small_weights_are_one_file_that_reads_back(tmp_path: Path) -> None:
    written = tensors()
    write(tmp_path, written)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    check_reads_back(tmp_path, written)


def test_large_weights_are_shards_with_an_index_that_names_every_tensor(tmp_path: Path) -> None:
    written = tensors()
    write(tmp_path, written, shard_bytes=1000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 6 * 400
    assert index["weight_map"].keys() == written.keys()
    shards = set(index["weight_map"].values())
    assert len(shards) == 3 and all((tmp_path / shard).stat().st_size > 800 for shard in shards)
    check_reads_back(tmp_path, written)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    written = tensors()
    write(tmp_path, written, shard_bytes=300)
    assert len(list(tmp_path.glob("model-*-of-00006.safetensors"))) == 6
    check_reads_back(tmp_path, written)


@pytest.mark.parametrize(
    "text,expected", [("5GB", 5_000_000_000), ("500mb", 500_000_000), ("1.5 KB", 1500), ("77", 77)]
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "5 apples", "-1GB", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no size"):
        parse_bytes(text)


def test_the_comparison_notices_one_changed_bit_and_takes_nan_for_itself(tmp_path: Path) -> None:
    written = tensors()
    written["t2"][0, 0] = torch.nan
    links = [Link(name, name) for name in written]
    for side in ("ours", "theirs"):
        (tmp_path / side).mkdir()
        write(tmp_path / side, written)
    check_same_numbers(
        links, open_exported_weights(tmp_path / "ours"), open_exported_weights(tmp_path / "theirs")
    )
    written["t3"].view(torch.int32)[2, 2] ^= 1
    write(tmp_path / "theirs", written)
    with pytest.raises(CheckpointError, match="'t3'"):
        check_same_numbers(
            links,
            open_exported_weights(tmp_path / "ours"),
            open_exported_weights(tmp_path / "theirs"),
        )


def test_a_file_that_cannot_grow_is_a_storage_error_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with (
            pytest.raises(StorageError, match=WEIGHTS),
            published_folder(tmp_path / "out", overwrite=False) as folder,
        ):
            write(folder, {"large": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def fill(folder: Path, text: str) -> None:
    (folder / "file").write_text(text)
    write_json_file(folder / RECORD, {})


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), published_folder(output, overwrite=False) as folder:
        fill(folder, "half")
        raise ZeroDivisionError
    assert list((tmp_path / "deep").iterdir()) == []
    with published_folder(output, overwrite=False) as folder:
        fill(folder, "whole")
        assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "file").read_text() == "whole"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with published_folder(tmp_path / "out", overwrite=False) as folder:
        fill(folder, "whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_weights_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with published_folder(tmp_path / "out", overwrite=False) as folder:
        folder.chmod(0o755)
        write(folder, tensors())
    assert (tmp_path / "out" / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_an_earlier_export_is_replaced_only_when_asked_and_only_by_a_complete_one(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    with published_folder(output, overwrite=False) as folder:
        fill(folder, "first")
    with pytest.raises(ConfigError, match="--overwrite"), published_folder(output, overwrite=False):
        pass
    with pytest.raises(ZeroDivisionError), published_folder(output, overwrite=True) as folder:
        fill(folder, "half")
        raise ZeroDivisionError
    assert (output / "file").read_text() == "first"
    with published_folder(output, overwrite=True) as folder:
        fill(folder, "second")
    assert (output / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_export_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(ConfigError, match="is no export"),
        published_folder(tmp_path, overwrite=True),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
