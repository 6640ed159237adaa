"""Blocks of shards against the checksums in the manifest."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_pipeline.preprocess.coordinator import BuildResult
from data_pipeline.shards import block_checksums
from data_pipeline.shards.block_checksums import FileChecksums
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.manifest import MANIFEST_NAME, canonical_sha256, load_manifest, verify
from data_pipeline.shards.verification import (
    BackgroundCheck,
    every_block,
    first_fault,
    lacks_blocks,
    sampled_blocks,
)
from pretrain.core.errors import DataError
from tests.support.data_folder import write_folder

BLOCK = 1000


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        block_checksums,
        __import__("data_pipeline.shards.manifest", fromlist=["manifest"]),
    ):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def folder(tmp_path: Path, small_blocks: None) -> Path:
    """A training shard of 7,000 bytes and an index of several blocks."""
    source = random.Random(0)
    documents = [[source.randrange(1000) for _ in range(35)] for _ in range(100)]
    write_folder(tmp_path / "data", {"all": [documents]}, {"all": [documents[:3]]})
    return tmp_path / "data"


def flip_low_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("sizes", [[0], [1], [999], [1000], [1001], [400, 0, 700, 3000], [5000]])
def test_checksums_do_not_depend_on_how_the_bytes_come(
    small_blocks: None, sizes: list[int]
) -> None:
    content = np.random.default_rng(0).integers(0, 256, sum(sizes), dtype=np.uint8).tobytes()
    found, start = FileChecksums(), 0
    for size in sizes:
        found.update(content[start : start + size])
        start += size
    assert found.hexdigest() == hashlib.sha256(content).hexdigest()
    assert found.blocks() == [
        xxhash.xxh3_128_hexdigest(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)
    ]


def test_every_block_of_every_file_is_listed_once_and_whole(folder: Path) -> None:
    manifest = load_manifest(folder)
    covered = dict.fromkeys((*folder.glob("*.bin"), *folder.glob("*.idx")), b"")
    for block in every_block([manifest]):
        assert block.start == len(covered[block.path])
        part = block.path.read_bytes()[block.start : block.start + block.size]
        assert block.checksum == xxhash.xxh3_128_hexdigest(part)
        covered[block.path] += part
    assert all(content == path.read_bytes() for path, content in covered.items())
    assert (
        len(every_block([manifest])) > 10
        and first_fault(every_block([manifest]), progress=False) is None
    )


@pytest.mark.parametrize(
    "name",
    [
        "train-all-00000.bin",
        "train-all-00000.idx",
        "validation-all-00000.bin",
        "validation-all-00000.idx",
    ],
)
def test_a_flipped_low_bit_is_found_with_its_file_block_and_bytes(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    for offset in (0, size // 2, size - 1):
        flip_low_bit(folder / name, offset)
        verify(load_manifest(folder))  # sizes say nothing
        number, of = offset // BLOCK, -(-size // BLOCK)
        last = min(number * BLOCK + BLOCK, size) - 1
        fault = first_fault(every_block([load_manifest(folder)]), progress=False)
        assert (
            fault is not None
            and f"{folder / name}, block {number} of {of} (bytes {number * BLOCK:,} to {last:,})"
            in fault
        )
        flip_low_bit(folder / name, offset)
    assert first_fault(every_block([load_manifest(folder)]), progress=False) is None


def test_files_that_are_cut_or_gone_are_faults_and_not_crashes(folder: Path) -> None:
    blocks = every_block([load_manifest(folder)])
    path = folder / "train-all-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert "ends 1 bytes too early" in (first_fault(blocks, progress=False) or "")
    path.unlink()
    assert "cannot be read: No such file" in (first_fault(blocks, progress=False) or "")


def test_a_sample_is_one_block_of_each_file_and_over_many_starts_all_of_them(folder: Path) -> None:
    manifest = load_manifest(folder)
    seen = set()
    for seed in range(200):
        sample = sampled_blocks([manifest], random.Random(seed))
        assert sorted(block.path.name for block in sample) == sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx")
        )
        seen |= {(block.path, block.number) for block in sample}
    assert seen == {(block.path, block.number) for block in every_block([manifest])}


def test_two_starts_do_not_read_the_same_blocks(folder: Path) -> None:
    datasets = load_datasets({"": str(folder)})
    read = [
        tuple((block.path, block.number) for block in datasets.check_blocks("sample", 0, 1)._blocks)
        for _ in range(12)
    ]
    assert len(set(read)) > 1


def test_ranks_share_the_blocks_and_leave_none(folder: Path) -> None:
    datasets = load_datasets({"": str(folder)})
    blocks = every_block(list(datasets.manifests.values()))
    for name in (blocks[0].path, blocks[-1].path):
        flip_low_bit(name, 0)
        for world_size in (1, 2, 3, 5):
            faults = [
                datasets.check_blocks("full", rank, world_size).fault for rank in range(world_size)
            ]
            assert sum(fault is not None for fault in faults) == 1, (name, world_size)
        flip_low_bit(name, 0)
    assert datasets.check_blocks("full", 0, 1).fault is None
    assert datasets.check_blocks("sizes", 0, 1).finish() is None


def test_a_background_check_finds_a_fault_and_can_be_given_up(folder: Path) -> None:
    blocks = every_block([load_manifest(folder)])
    assert BackgroundCheck(blocks).finish() is None
    flip_low_bit(folder / "validation-all-00000.idx", -1)
    assert "validation-all-00000.idx" in (BackgroundCheck(blocks).finish() or "")
    started = time.perf_counter()
    BackgroundCheck(blocks[:1] * 2_000_000).finish(
        give_up=True
    )  # reading them all would take minutes
    assert time.perf_counter() - started < 10


def as_version_2(folder: Path) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text())
    content["version"] = 2
    for split in content["splits"].values():
        for shard in split["shards"]:
            for name in ("block_bytes", "bin_blocks", "idx_blocks"):
                shard.pop(name, None)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def test_older_manifests_are_read_checked_by_sha256_and_keep_their_fingerprint(
    built: BuildResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(built.folder, tmp_path / "data"))
    newer = load_manifest(folder)
    as_version_2(folder)
    older = load_manifest(folder)
    content = json.loads((folder / MANIFEST_NAME).read_text())
    expected = {"bos_id": None, "pad_id": None} | content["tokenizer"]
    written = {
        "version": 2,
        "dtype": content["dtype"],
        "tokenizer": expected,
        "splits": content["splits"],
        "streamed": False,
    }
    assert older.fingerprint == newer.fingerprint
    assert older.fingerprint == canonical_sha256(
        written | {"sources": {"all": content["sources"]["all"]["sha256"]}}
    )
    assert lacks_blocks([older]) is older and lacks_blocks([newer]) is None
    datasets = load_datasets({"": str(folder)})
    assert datasets.check_blocks("sample", 0, 1).finish() is None
    assert capsys.readouterr().err.count("only sizes are compared") == 1
    flip_low_bit(folder / "train.bin", 7)
    assert "train.bin, block 0 of 1" in (datasets.check_blocks("full", 0, 1).fault or "")


def test_a_manifest_with_a_checksum_too_few_is_refused(folder: Path) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text())
    content["splits"]["train"]["shards"][0]["bin_blocks"].pop()
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bin has 6 checksums of blocks, not 7"):
        load_manifest(folder)
