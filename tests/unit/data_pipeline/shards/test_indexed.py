"""Megatron's .bin/.idx format: interchange with Megatron's own code, and damage."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.shards.index_header import HEADER
from data_pipeline.shards.indexed import IndexedReader, IndexedWriter, WrittenShard, token_dtype
from pretrain.core.errors import DataError, StorageError
from pretrain.core.files import file_sha256

with warnings.catch_warnings():  # Megatron misses optional CUDA packages, aloud
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")

DOCUMENTS = [[5, 6, 7], [1], [65000, 0, 2, 3], []]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 65001) -> WrittenShard:
    with IndexedWriter(prefix, token_dtype(vocab_size)) as writer:
        for part in (documents[:2], documents[2:]):
            writer.add(
                np.array([token for tokens in part for token in tokens], dtype=np.int64),
                np.array([len(tokens) for tokens in part], dtype=np.int64),
            )
        return writer.finish()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_token_type_changes_at_megatrons_limit(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype


@pytest.mark.parametrize("vocab_size", [65001, 100_000])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab_size: int) -> None:
    write(tmp_path / "shard", DOCUMENTS, vocab_size)
    dataset = IndexedDataset(str(tmp_path / "shard"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.index.dtype == token_dtype(vocab_size)


def test_we_read_what_megatron_writes_with_several_sequences_a_document(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "shard.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([5, 6, 7, 8]), [3, 1])
    builder.add_item(torch.tensor([100_000]))
    builder.end_document()
    builder.finalize(str(tmp_path / "shard.idx"))
    reader = IndexedReader(tmp_path / "shard")
    assert [reader[index].tolist() for index in range(len(reader))] == [[5, 6, 7], [8], [100_000]]
    assert reader.tokens.tolist() == [5, 6, 7, 8, 100_000]
    assert (reader.num_documents, reader.document_marks.tolist()) == (2, [0, 2, 3])


def test_files_are_those_of_megatrons_builder_byte_for_byte(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for tokens in DOCUMENTS:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()


def test_copied_sequences_are_those_of_the_other_shard_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "whole", DOCUMENTS)
    write(tmp_path / "kept", [DOCUMENTS[0], *DOCUMENTS[2:]])
    reader = IndexedReader(tmp_path / "whole")
    with IndexedWriter(tmp_path / "copied", reader.dtype) as writer:
        writer.copy(reader, 0, 1)
        writer.copy(reader, 2, 4)
        writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copied{suffix}").read_bytes() == (
            tmp_path / f"kept{suffix}"
        ).read_bytes()


def test_document_starts_are_found_in_any_range(tmp_path: Path) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    reader = IndexedReader(tmp_path / "shard")
    for begin in range(9):
        for end in range(begin, 9):
            assert reader.document_starts(begin, end).tolist() == [
                start for start in (0, 3, 4) if begin <= start < end
            ], (begin, end)


def test_document_starts_follow_megatrons_marks_where_a_document_has_several_sequences(
    tmp_path: Path,
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "shard.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([5, 6, 7, 8]), [3, 1])
    builder.add_document(torch.tensor([9, 9]), [1, 1])
    builder.finalize(str(tmp_path / "shard.idx"))
    reader = IndexedReader(tmp_path / "shard")
    assert reader.document_starts(0, 6).tolist() == [0, 4]
    assert reader.document_starts(1, 6).tolist() == [4]


def test_other_tokens_make_other_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one", [[1, 2], [3]])
    write(tmp_path / "other", [[1], [2, 3]])
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "other.bin").read_bytes()
    assert (tmp_path / "one.idx").read_bytes() != (tmp_path / "other.idx").read_bytes()


def test_writer_reports_the_checksums_and_sizes_on_disk(tmp_path: Path) -> None:
    written = write(tmp_path / "shard", DOCUMENTS)
    assert (written.documents, written.tokens) == (4, 8)
    assert (written.bin_checksum, written.idx_checksum) == (
        file_sha256(tmp_path / "shard.bin"),
        file_sha256(tmp_path / "shard.idx"),
    )
    assert (written.bin_bytes, written.idx_bytes) == (
        (tmp_path / "shard.bin").stat().st_size,
        (tmp_path / "shard.idx").stat().st_size,
    )


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "shard", token_dtype(300)) as writer:
        writer.add(np.arange(5), np.array([5]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_writer_overwrites_nothing(tmp_path: Path) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    with pytest.raises(StorageError, match=r"shard\.bin is there already"):
        write(tmp_path / "shard", DOCUMENTS)


@pytest.mark.parametrize("token", [-1, 65536])
def test_writer_refuses_ids_that_would_wrap_around(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match="do not fit uint16"):
        write(tmp_path / "shard", [[1, token]])


def test_empty_shard_is_read_as_empty(tmp_path: Path) -> None:
    write(tmp_path / "shard", [])
    reader = IndexedReader(tmp_path / "shard")
    assert (len(reader), reader.num_documents, reader.num_tokens) == (0, 0, 0)


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def int32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


LENGTHS, OFFSETS = HEADER.size, HEADER.size + 4 * len(DOCUMENTS)
MARKS = OFFSETS + 8 * len(DOCUMENTS)


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (0, b"PK", "does not begin with MMIDIDX"),
        (9, b"\x02", "index version 2"),
        (17, b"\x07", "float32 numbers"),
        (17, b"\x63", "unknown token type"),
        (17, b"\x04", "offset of sequence 1"),
        (18, b"\xff" * 8, "18446744073709551615 sequences"),
        (26, b"\xff" * 8, "18446744073709551615 document marks"),
        (LENGTHS, int32(-3), "negative length"),
        (LENGTHS, int32(2), "offset of sequence 1"),
        (LENGTHS + 8, int32(5), "offset of sequence 3"),
        (LENGTHS + 12, int32(7), "its index ends at 30"),
        (OFFSETS + 8, int32(0), "offset of sequence 1"),
        (MARKS, int32(1), "document marks"),
        (MARKS + 8, int32(3), "document marks"),
        (MARKS + 32, int32(9), "document marks"),
    ],
)
def test_damaged_index_is_refused_with_its_name_and_the_reason(
    tmp_path: Path, offset: int, data: bytes, reason: str
) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    IndexedReader(tmp_path / "shard")
    patch(tmp_path / "shard.idx", offset, data)
    with pytest.raises(DataError, match=reason) as caught:
        IndexedReader(tmp_path / "shard")
    assert str(tmp_path / "shard") in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "size"), [(".idx", 0), (".idx", 20), (".idx", 40), (".bin", 0), (".bin", 15)]
)
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, size: int) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=path.name):
        IndexedReader(tmp_path / "shard")


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "shard", DOCUMENTS)
    (tmp_path / f"shard{suffix}").unlink()
    with pytest.raises(DataError, match=rf"shard\{suffix} is missing"):
        IndexedReader(tmp_path / "shard")
