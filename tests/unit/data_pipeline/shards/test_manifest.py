"""The manifest: what it proves, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.preprocess.coordinator import BuildResult
from data_pipeline.shards.manifest import MANIFEST_NAME, load_manifest, verify
from pretrain.core.errors import DataError
from tests.support.paths import ROOT


@pytest.fixture
def copied(built: BuildResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.folder, tmp_path / "copy"))


def test_a_complete_folder_passes_both_checks(copied: Path) -> None:
    manifest = load_manifest(copied)
    verify(manifest)
    verify(manifest, deep=True)


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "validation.idx"])
def test_damage_is_found(copied: Path, name: str) -> None:
    manifest = load_manifest(copied)
    flip_byte(copied / name, -1)
    verify(manifest)
    with pytest.raises(DataError, match=rf"{name} differs from its manifest"):
        verify(manifest, deep=True)
    (copied / name).write_bytes((copied / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, its manifest says"):
        verify(manifest)
    (copied / name).unlink()
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        verify(manifest)


def test_another_tokenizer_is_always_found(copied: Path) -> None:
    flip_byte(copied / "tokenizer.json", -2)
    with pytest.raises(DataError, match="wrong tokenizer for the shards"):
        verify(load_manifest(copied))


def test_missing_damaged_and_newer_manifests_are_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / MANIFEST_NAME
    content = json.loads(path.read_text())
    with pytest.raises(DataError, match=r"no data in .*nowhere.*run tools/preprocess_data\.py"):
        load_manifest(tmp_path / "nowhere")
    for text, reason in (
        ("{", "is not JSON"),
        ("[]", "has version None"),
        (json.dumps(content | {"version": 99}), "has version 99"),
        (json.dumps(content | {"dtype": "float64"}), "'dtype'"),
        (
            json.dumps({key: value for key, value in content.items() if key != "tokenizer"}),
            "'tokenizer'",
        ),
        (json.dumps(content | {"splits": {}}), "'splits'"),
        (json.dumps(content | {"sources": {}}), "of the source 'all', which is not listed"),
        (
            json.dumps(
                content | {"tokenizer": content["tokenizer"] | {"file": "../tokenizer.json"}}
            ),
            "'tokenizer.file'",
        ),
        (json.dumps(content).replace('"train"', '"/etc/train"'), "damaged"),
        ("[" * 100_000, "is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            load_manifest(copied)


def test_fingerprint_follows_the_data_and_not_how_it_was_described(built: BuildResult) -> None:
    manifest = built.manifest
    source = manifest.sources["all"]
    described = {"all": source.model_copy(update={"python_version": "9.9"})}
    elsewhere = {"sources": described, "created_by": "someone", "inputs_sha256": "0" * 64}
    assert manifest.model_copy(update=elsewhere).fingerprint == manifest.fingerprint
    other_source = {"all": source.model_copy(update={"sha256": "0" * 64})}
    other_tokenizer = manifest.tokenizer.model_copy(update={"sha256": "0" * 64})
    assert manifest.model_copy(update={"sources": other_source}).fingerprint != manifest.fingerprint
    assert (
        manifest.model_copy(update={"tokenizer": other_tokenizer}).fingerprint
        != manifest.fingerprint
    )


def test_only_the_loader_imports_torch() -> None:
    program = "import sys, data_pipeline.{}; sys.exit('torch' in sys.modules)"
    root = ROOT
    assert (
        subprocess.run(
            [sys.executable, "-c", program.format("preprocess.coordinator")], cwd=root
        ).returncode
        == 0
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program.format("loading.shard_loader")], cwd=root
        ).returncode
        == 1
    )
