"""``manifest.json``: what a data folder holds, and the checksums that prove it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data_pipeline.indexed import bin_path, idx_path
from data_pipeline.split import SPLITS, SplitName
from pretrain.config.durable import file_sha256
from pretrain.config.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
MANIFEST_VERSION = 1


class ManifestPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerEntry(ManifestPart):
    file: str
    sha256: str
    vocab_size: int
    eod_id: int


class SourceEntry(ManifestPart):
    """``sha256`` covers every document's id and text, in order; ``documents`` counts those, ``skipped`` the others by reason."""

    kind: str
    python_version: str | None = None
    patterns: list[str] | None = None
    sha256: str
    documents: int
    skipped: dict[str, int]


class ShardEntry(ManifestPart):
    """One .bin/.idx pair; ``prefix`` is relative to the manifest's folder."""

    prefix: str
    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


class SplitEntry(ManifestPart):
    """``tokens`` include one end-of-document token per document; ``utf8_bytes`` are those of the texts."""

    documents: int
    tokens: int
    utf8_bytes: int
    shards: list[ShardEntry]


class Manifest(ManifestPart):
    """``request_sha256`` stands for the configuration that was asked for: see :func:`data_pipeline.build.request_sha256`."""

    version: int = MANIFEST_VERSION
    created_by: str
    request_sha256: str
    dtype: Literal["uint16", "int32"]
    tokenizer: TokenizerEntry
    source: SourceEntry
    splits: dict[SplitName, SplitEntry]

    @model_validator(mode="after")
    def _has_both_splits(self) -> Manifest:
        missing = [split for split in SPLITS if split not in self.splits]
        if missing:
            raise ValueError(f"split '{missing[0]}' is missing")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what training reads: tokenizer, corpus and shards. Two machines that build the same corpus get the same one."""
        content = self.model_dump(mode="json", include={"version", "dtype", "tokenizer", "splits"}) | {"corpus": self.source.sha256}
        return canonical_sha256(content)


def canonical_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of a mapping's canonical JSON: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def load_manifest(folder: Path | str) -> Manifest:
    """Reads ``folder``'s manifest.

    Raises:
        DataError: where it is missing, damaged, or of a version that this code does not know.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no data in {folder} ({MANIFEST_NAME} is missing): run tools/preprocess_data.py with --output {folder}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{path} is not JSON: build the data again with tools/preprocess_data.py --fresh") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != MANIFEST_VERSION:
        raise DataError(
            f"{path} has version {version!r}, this code reads version {MANIFEST_VERSION}: build the data again with tools/preprocess_data.py --fresh"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "the manifest"
        raise DataError(f"{path} is damaged: '{where}': {detail['msg']}; build the data again with tools/preprocess_data.py --fresh") from None


def verify(folder: Path | str, manifest: Manifest, deep: bool = False) -> None:
    """Checks that the folder holds the files of its manifest: sizes and the tokenizer's checksum, and every checksum when ``deep``.

    Raises:
        DataError: for the first file that is missing or differs; it names the file.
    """
    folder = Path(folder)
    tokenizer = folder / manifest.tokenizer.file
    _check_file(tokenizer, None, manifest.tokenizer.sha256, "it is the wrong tokenizer for the shards: put back the one they were built with")
    for entry in manifest.splits.values():
        for shard in entry.shards:
            prefix = folder / shard.prefix
            for path, size, checksum in (
                (bin_path(prefix), shard.bin_bytes, shard.bin_sha256),
                (idx_path(prefix), shard.idx_bytes, shard.idx_sha256),
            ):
                _check_file(path, size, checksum if deep else None, "build the data again with tools/preprocess_data.py --fresh")


def _check_file(path: Path, size: int | None, checksum: str | None, remedy: str) -> None:
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise DataError(f"{path} has {found} bytes, its manifest says {size}: {remedy}")
        if checksum is not None and file_sha256(path) != checksum:
            raise DataError(f"{path} differs from its manifest (SHA-256): {remedy}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; build the data again with tools/preprocess_data.py --fresh") from None
