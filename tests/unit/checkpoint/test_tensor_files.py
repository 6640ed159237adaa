from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.tensor_files import TensorFileWriter, TensorReader
from pretrain.checkpoint.tensor_headers import Range, TensorForm
from pretrain.core.errors import CheckpointError

TENSORS = {
    "odd": torch.randn(3).to(torch.bfloat16),
    "matrix": torch.randn(4, 6),
    "empty": torch.zeros(0, 5),
    "number": torch.tensor(7.0),
    "ids": torch.arange(5),
}
FORMS = {name: TensorForm(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with TensorFileWriter(path, FORMS) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def test_what_is_written_in_any_order_is_a_safetensors_file(tmp_path: Path) -> None:
    write(tmp_path / "a", dict(reversed(TENSORS.items())))
    found = load_file(tmp_path / "a")
    assert found.keys() == TENSORS.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in TENSORS.items()
    )


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    write(tmp_path / "a", TENSORS | {"matrix": TENSORS["matrix"].T.contiguous().T})
    assert torch.equal(load_file(tmp_path / "a")["matrix"], TENSORS["matrix"])


@pytest.mark.parametrize(
    "tensors,words",
    [
        ({name: tensor for name, tensor in TENSORS.items() if name != "ids"}, "'ids' is missing"),
        (TENSORS | {"more": torch.zeros(1)}, "no place for the tensor 'more'"),
        (
            TENSORS | {"matrix": torch.zeros(6, 4)},
            r"'matrix' is torch.float32 \[6, 4\], and should be torch.float32 \[4, 6\]",
        ),
        (
            TENSORS | {"matrix": torch.zeros(4, 6, dtype=torch.bfloat16)},
            "'matrix' is torch.bfloat16",
        ),
    ],
)
def test_a_missing_unknown_or_other_tensor_is_refused(
    tensors: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / "a", tensors)


def test_a_tensor_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="'matrix' came twice"),
        TensorFileWriter(tmp_path / "a", FORMS) as file,
    ):
        file.write("matrix", TENSORS["matrix"])
        file.write("matrix", TENSORS["matrix"])


def test_shares_of_several_files_are_one_tensor(tmp_path: Path) -> None:
    rows = torch.randn(5, 3)
    # Cut inside a row, as ZeRO cuts.
    for part, (start, stop) in enumerate(((0, 7), (7, 15))):
        share = rows.flatten()[start:stop]
        forms = {"rows": TensorForm(torch.float32, (stop - start,))}
        with TensorFileWriter(tmp_path / f"{part}", forms, {"rows": Range(start, (5, 3))}) as file:
            file.write("rows", share)
    reader = TensorReader([tmp_path / "1", tmp_path / "0"])
    assert reader.form("rows") == TensorForm(torch.float32, (5, 3))
    assert torch.equal(reader.read("rows"), rows)
    assert all(torch.equal(reader.read("rows", index), rows[index]) for index in range(5))
    for start, stop in combinations(range(16), 2):
        assert torch.equal(reader.read_range("rows", start, stop), rows.flatten()[start:stop])
    with pytest.raises(IndexError):
        reader.read("rows", 5)


def test_the_hash_is_that_of_the_file_if_it_was_written_in_order(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "a", FORMS) as file:
        for name in file.order:
            file.write(name, TENSORS[name])
    assert file.sha256() == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert file.bytes == (tmp_path / "a").stat().st_size
    with TensorFileWriter(tmp_path / "b", FORMS) as file:
        for name in reversed(file.order):
            file.write(name, TENSORS[name])
    assert file.sha256() is None
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_missing_cut_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-8])
    (tmp_path / "foreign").write_text("no tensors here")
    for name in ("missing", "cut", "foreign"):
        with pytest.raises(CheckpointError, match=name):
            TensorReader([tmp_path / name])
