"""tools/inspect_data.py and tools/verify_data.py on real data folders, whole and damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import BuildResult, build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.block_checksums import FileChecksums
from data_pipeline.shards.index_header import HEADER
from data_pipeline.shards.indexed import IndexedWriter
from data_pipeline.shards.inspection import (
    check_everything,
    documents,
    find_duplicates,
    length_statistics,
)
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.core.errors import DataError
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS


def run(tool: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run_python(TOOLS / tool, *options)


@pytest.fixture
def copied(built: BuildResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.folder, tmp_path / "copy"))


def ignore(_: int) -> None: ...


def with_checksums(folder: Path, kind: str) -> dict[str, object]:
    """The entries of the training shard's .bin or .idx for what is in it now, so that only content
    can give damage away.
    """
    checksums = FileChecksums()
    checksums.update((folder / f"train.{kind}").read_bytes())
    return {f"{kind}_sha256": checksums.hexdigest(), f"{kind}_blocks": checksums.blocks()}


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """Changes the training shard's entry."""
    content = json.loads((folder / "manifest.json").read_text())
    content["splits"]["train"]["shards"][0] |= changes
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_whole_folder_passes_and_the_tool_says_so(built: BuildResult) -> None:
    assert check_everything(built.manifest, ignore) == []
    result = run("verify_data.py", str(built.folder))
    assert (
        result.returncode == 0
        and "is whole" in result.stdout
        and built.manifest.fingerprint in result.stdout
    )


def test_every_flipped_byte_is_found(copied: Path) -> None:
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json"):
        content = (copied / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            (copied / name).write_bytes(
                content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]
            )
            assert any(
                name in fault for fault in check_everything(load_manifest(copied), ignore)
            ), (name, place)
        (copied / name).write_bytes(content)
    assert check_everything(load_manifest(copied), ignore) == []


def test_the_tool_lists_every_fault_and_ends_with_code_3(copied: Path) -> None:
    (copied / "train.bin").write_bytes(b"")
    (copied / "validation.idx").unlink()
    result = run("verify_data.py", str(copied), "--json", "-")
    assert result.returncode == 3 and "Traceback" not in result.stderr
    faults = json.loads(result.stdout)["faults"]
    assert any("train.bin has 0 bytes" in fault for fault in faults) and any(
        "validation.idx" in fault for fault in faults
    )


def test_content_that_contradicts_itself_is_found_though_its_checksums_are_right(
    copied: Path, built: BuildResult
) -> None:
    tokens = np.fromfile(copied / "train.bin", dtype="<u2")
    tokens[7] = 60_000
    tokens.tofile(copied / "train.bin")
    rewrite_manifest(copied, **with_checksums(copied, "bin"))
    [fault] = check_everything(load_manifest(copied), ignore)
    assert "token id 60000 at token 7" in fault
    tokens[7] = 1
    tokens[-1] = 1
    tokens.tofile(copied / "train.bin")
    rewrite_manifest(copied, **with_checksums(copied, "bin"))
    [fault] = check_everything(load_manifest(copied), ignore)
    assert "does not end with the end-of-document token" in fault
    index = bytearray((copied / "train.idx").read_bytes())
    index[HEADER.size] ^= 1
    (copied / "train.idx").write_bytes(bytes(index))
    rewrite_manifest(copied, **with_checksums(copied, "idx"))
    assert any(
        "train.idx" in fault and "offset" in fault
        for fault in check_everything(load_manifest(copied), ignore)
    )
    rewrite_manifest(copied, documents=3)
    assert any("its shards 3" in fault for fault in check_everything(load_manifest(copied), ignore))


def test_a_damaged_block_is_named_though_its_file_has_the_right_checksum(copied: Path) -> None:
    rewrite_manifest(copied, bin_blocks=["0" * 32])
    [fault] = check_everything(load_manifest(copied), ignore)
    assert "train.bin, block 0 of 1 (bytes 0 to" in fault


def test_documents_are_shown_as_they_were(built: BuildResult) -> None:
    library = load_tokenizer(built.manifest.tokenizer_path)
    found = list(documents(built.manifest, "train", [3, 0, 3]))
    assert [document.number for document in found] == [0, 3]
    originals = {
        path.read_text(encoding="utf-8") for path in (built.folder.parent / "raw").iterdir()
    }
    assert all(library.decode(document.tokens[:-1].tolist()) in originals for document in found)
    with pytest.raises(DataError, match="there is no document 999: the train split has"):
        list(documents(built.manifest, "train", [999]))


def test_lengths_are_counted_between_powers_of_two(tmp_path: Path, built: BuildResult) -> None:
    lengths = [1, 1, 2, 3, 4, 5, 100_000]
    folder = Path(shutil.copytree(built.folder, tmp_path / "data"))
    (folder / "train.bin").unlink(), (folder / "train.idx").unlink()
    with IndexedWriter(folder / "train", np.dtype("<u2")) as writer:
        writer.add(np.zeros(sum(lengths), dtype=np.int64), np.array(lengths))
        writer.finish()
    found = length_statistics(load_manifest(folder), "train")
    assert (found.documents, found.longest, found.mean) == (7, 100_000, sum(lengths) / 7)
    assert {
        found.edges[number + 1]: count for number, count in enumerate(found.counts) if count
    } == {1: 2, 2: 1, 4: 2, 8: 1, 131072: 1}
    assert found.percentiles[50] == 3


def test_repeated_documents_are_counted_and_named(tmp_path: Path) -> None:
    texts = ["one two three", "four five six", "one two three", "seven", "one two three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"kind": "jsonl", "input": [str(tmp_path / "a.jsonl")]}
    config = DataConfig.model_validate(
        {
            "source": source,
            "tokenizer": {"kind": "train_bpe", "vocab_size": 258},
            "validation_share": 0.0,
        }
    )
    found = find_duplicates(build(config, Output(tmp_path / "data")).manifest, "train", 5, ignore)
    assert (found.documents, found.repeated, found.most) == (5, 2, [(0, 3)])


def test_the_tool_prints_tables_documents_and_a_picture(built: BuildResult, tmp_path: Path) -> None:
    picture = tmp_path / "lengths.png"
    result = run(
        "inspect_data.py",
        str(built.folder),
        "--document",
        "0",
        "--duplicates",
        "--histogram",
        str(picture),
    )
    assert result.returncode == 0, result.stderr
    assert (
        "train document 0 of all" in result.stdout
        and "repeat an earlier one" in result.stdout
        and "█" in result.stdout
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(
        run("inspect_data.py", str(built.folder), "--sample", "3", "--json", "-").stdout
    )
    assert (
        len(content["documents"]) == 3
        and content["lengths"]["documents"] == built.manifest.splits["train"].documents
    )
    assert run("inspect_data.py", str(tmp_path / "nowhere")).returncode == 3


def test_a_picture_that_cannot_be_written_is_one_sentence(built: BuildResult) -> None:
    result = run("inspect_data.py", str(built.folder), "--histogram", "/proc/none/lengths.png")
    assert result.returncode == 5
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write /proc/none/lengths.png") and "--histogram" in last
