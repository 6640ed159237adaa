from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.tensor_files import TensorFileWriter, TensorReader
from pretrain.checkpoint.tensor_headers import Columns, Range, TensorForm
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


def write_columns(
    folder: Path, matrix: torch.Tensor, parts: Sequence[tuple[int, int, int, int]]
) -> list[Path]:
    """A file for each part: first column, number of columns, first and last of their elements."""
    paths = []
    for number, (first, count, start, stop) in enumerate(parts):
        values = matrix[:, first : first + count].flatten()[start:stop]
        place = Range(start, tuple(matrix.shape), Columns(first, count))
        paths.append(folder / f"{number}")
        forms = {"matrix": TensorForm(torch.float32, (len(values),))}
        with TensorFileWriter(paths[-1], forms, {"matrix": place}) as file:
            file.write("matrix", values)
    return paths


def test_columns_of_several_files_are_one_tensor(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    # Two columns and four, the latter cut inside a row.
    paths = write_columns(tmp_path, matrix, [(2, 4, 0, 7), (0, 2, 0, 8), (2, 4, 7, 16)])
    reader = TensorReader(paths)
    assert reader.form("matrix") == TensorForm(torch.float32, (4, 6))
    assert torch.equal(reader.read("matrix"), matrix)
    assert all(torch.equal(reader.read("matrix", index), matrix[index]) for index in range(4))
    for start, stop in combinations(range(25), 2):
        assert torch.equal(reader.read_range("matrix", start, stop), matrix.flatten()[start:stop])
    # In other columns than those of the files, and in the same ones.
    for first, count in ((0, 3), (3, 3), (2, 4), (5, 1), (0, 6)):
        wanted = matrix[:, first : first + count].flatten()
        for start, stop in combinations(range(len(wanted) + 1), 2):
            place = Range(start, (4, 6), Columns(first, count))
            found = reader.read_part("matrix", place, stop - start)
            assert torch.equal(found, wanted[start:stop])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(0, 3, 0, 12)], "12 of 24 elements"),
        ([(3, 3, 0, 12)], "12 of 24 elements"),
        ([(0, 3, 0, 12), (3, 3, 0, 11)], "23 of 24 elements"),
        ([(0, 3, 0, 12), (3, 3, 1, 12)], "of 24 elements"),
        ([(0, 3, 0, 12), (4, 2, 0, 8)], "of 24 elements"),
        ([(0, 3, 0, 12), (2, 4, 0, 16)], "more than once"),
        ([(0, 3, 0, 12), (3, 3, 0, 12), (3, 3, 0, 12)], "more than once"),
        ([(0, 6, 0, 24), (3, 3, 0, 12)], "more than once"),
    ],
)
def test_columns_that_are_missing_or_come_twice_are_refused(
    parts: Sequence[tuple[int, int, int, int]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        TensorReader(write_columns(tmp_path, torch.randn(4, 6), parts))


@pytest.mark.parametrize("columns", [[-1, 3], [0], [0, 1, 2], "ab", [0, 10**30], [4, 3]])
def test_columns_that_no_tensor_has_are_refused(columns: object, tmp_path: Path) -> None:
    ranges = json.dumps({"matrix": [0, [4, 6], columns]})
    save_file({"matrix": torch.ones(12)}, tmp_path / "file", {"ranges": ranges})
    with pytest.raises(CheckpointError):
        TensorReader([tmp_path / "file"])


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
