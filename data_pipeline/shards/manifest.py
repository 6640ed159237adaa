"""``manifest.json``: what a data folder holds, and the checksums that prove it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from data_pipeline.shards.block_checksums import BLOCK_BYTES, num_blocks
from data_pipeline.shards.indexed import WrittenShard, bin_path, idx_path
from data_pipeline.shards.split import SplitName
from pretrain.core.errors import DataError
from pretrain.core.files import file_sha256

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
MANIFEST_VERSION = 3
# Version 2 has no checksums of blocks; all else is the same.
READ_VERSIONS = (2, 3)

Counts = dict[str, int]
# A manifest from elsewhere must not lead out of its own folder.
FileName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$", max_length=200)]


class ManifestPart(BaseModel):
    """A part of a manifest: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerEntry(ManifestPart):
    """The tokenizer, and which tokens it puts around a document."""

    file: FileName
    sha256: str
    vocab_size: int
    eod_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    append_eod: bool = True
    prepend_bos: bool = False
    # True or left out, so that data from before this field keep their fingerprint.
    parse_special_tokens: Literal[True] | None = None

    @model_validator(mode="after")
    def _tokens_are_in_the_vocabulary(self) -> TokenizerEntry:
        # Such an id has no row in the embedding: training would end with an index error.
        for name, token in (("eod", self.eod_id), ("bos", self.bos_id), ("pad", self.pad_id)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name}_id {token} is no id of a vocabulary of {self.vocab_size} tokens"
                )
        return self


class SourceEntry(ManifestPart):
    """Counts of one source's records, documents and tokens.

    Attributes:
        revision: the version of the data set that was read, for sources that have one.
        sha256: covers every document that was read, its name and its text, in order.
        records: all that were read: ``documents`` + ``bad`` + ``left_out`` + ``dropped``.
        documents, tokens, utf8_bytes: what the shards hold of it.
        share: of all tokens of the training split.
        bad: records that could not be read, by reason.
        left_out: records that the source itself passes over, by reason.
        dropped: documents that cleaning removed, by reason.
        edits: what cleaning changed inside documents.
        notes: what in the documents is worth a look, such as a CSV value over many lines.
    """

    kind: str
    python_version: str | None = None
    revision: str | None = None
    sha256: str
    records: int
    documents: int
    tokens: int
    utf8_bytes: int
    share: float
    bad: Counts = {}
    left_out: Counts = {}
    dropped: Counts = {}
    edits: Counts = {}
    notes: Counts = {}


class ShardEntry(ManifestPart):
    """One .bin/.idx pair of one source; ``prefix`` is relative to the manifest's folder.

    Attributes:
        block_bytes: of each block of both files but the last one; None in a manifest of version 2.
        bin_blocks, idx_blocks: the blocks' checksums, XXH3 of 128 bits in hexadecimal.
    """

    prefix: FileName
    source: str
    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    block_bytes: Annotated[int, Field(gt=0)] | None = None
    bin_blocks: list[str] = []
    idx_blocks: list[str] = []

    @model_validator(mode="after")
    def _every_block_has_a_checksum(self) -> ShardEntry:
        for name, size, blocks in (
            ("bin", self.bin_bytes, self.bin_blocks),
            ("idx", self.idx_bytes, self.idx_blocks),
        ):
            expected = 0 if self.block_bytes is None else num_blocks(size, self.block_bytes)
            if len(blocks) != expected:
                raise ValueError(
                    f"{self.prefix}.{name} has {len(blocks)} checksums of blocks, not {expected}"
                )
        return self

    @classmethod
    def of(cls, written: WrittenShard, prefix: str, source: str) -> ShardEntry:
        """The entry of a durable shard that was just written."""
        return cls(
            prefix=prefix,
            source=source,
            documents=written.documents,
            tokens=written.tokens,
            bin_bytes=written.bin_bytes,
            bin_sha256=written.bin_checksum,
            idx_bytes=written.idx_bytes,
            idx_sha256=written.idx_checksum,
            block_bytes=BLOCK_BYTES,
            bin_blocks=written.bin_blocks,
            idx_blocks=written.idx_blocks,
        )


class SplitEntry(ManifestPart):
    """``tokens`` include those that the policy puts around a document.

    ``utf8_bytes`` are those of the texts.
    """

    documents: int
    tokens: int
    utf8_bytes: int
    shards: list[ShardEntry]


NOT_IN_FINGERPRINT: Any = {
    "splits": {"__all__": {"shards": {"__all__": {"block_bytes", "bin_blocks", "idx_blocks"}}}}
}


class Manifest(ManifestPart):
    """The content of ``manifest.json``.

    Attributes:
        request_sha256: checksum of the configuration that was asked for.
        inputs_sha256: checksum of the sizes and times of the input files, so that an unchanged
            input is recognised without reading it.
        streamed: training reads the source itself; there is no training split here.
        held_out_sha256: checksum of what decided which documents are held out; None for shards that
            were imported, and data from before this field.
    """

    version: int = MANIFEST_VERSION
    created_by: str
    request_sha256: str
    inputs_sha256: str
    dtype: Literal["uint16", "int32"]
    tokenizer: TokenizerEntry
    sources: dict[str, SourceEntry]
    splits: dict[SplitName, SplitEntry] = Field(min_length=1)
    streamed: bool = False
    held_out_sha256: str | None = None

    _folder: Path = PrivateAttr(default=Path("."))

    @model_validator(mode="after")
    def _shards_have_sources(self) -> Manifest:
        unknown = {shard.source for split in self.splits.values() for shard in split.shards} - set(
            self.sources
        )
        if unknown:
            raise ValueError(f"a shard is of the source '{min(unknown)}', which is not listed")
        return self

    @property
    def folder(self) -> Path:
        """The folder that it was loaded from; the prefixes of its shards start here."""
        return self._folder

    @property
    def tokenizer_path(self) -> Path:
        """The path of the tokenizer's file."""
        return self._folder / self.tokenizer.file

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what training reads: tokenizer, sources and shards.

        Two machines that build the same corpus get the same one.
        """
        content = self.model_dump(
            mode="json",
            include={"dtype", "tokenizer", "splits", "streamed"},
            exclude=NOT_IN_FINGERPRINT,
        )
        # The blocks' checksums say nothing that SHA-256 does not: data keeps its fingerprint from
        # version 2.
        if content["tokenizer"]["parse_special_tokens"] is None:
            del content["tokenizer"]["parse_special_tokens"]
        return canonical_sha256(
            content
            | {
                "version": 2,
                "sources": {name: source.sha256 for name, source in self.sources.items()},
            }
        )

    def at(self, folder: Path) -> Manifest:
        """Return this manifest as it is in ``folder``."""
        self._folder = folder
        return self


def canonical_sha256(content: Mapping[str, object]) -> str:
    """SHA-256 of a mapping's canonical JSON: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")
    ).hexdigest()


def manifest_path(data: Path | str) -> Path:
    """Return the manifest of a data folder, or of the shards with a common prefix.

    The manifest of the prefix ``data/corpus`` is ``data/corpus.manifest.json``.
    """
    data = Path(data)
    return data / MANIFEST_NAME if data.is_dir() else data.with_name(f"{data.name}.{MANIFEST_NAME}")


def load_manifest(data: Path | str) -> Manifest:
    """Reads the manifest of a data folder or prefix.

    Raises:
        DataError: if it is missing, damaged, or of a version that this code does not know.
    """
    path = manifest_path(data)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"there is no data in {data} ({MANIFEST_NAME} is missing): run tools/preprocess_data.py"
            f" with --output {data}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(
            f"{path} is not JSON: build the data again with tools/preprocess_data.py --fresh"
        ) from None
    version = content.get("version") if isinstance(content, dict) else None
    if version not in READ_VERSIONS:
        raise DataError(
            f"{path} has version {version!r}, this code reads versions {READ_VERSIONS[0]} to"
            f" {READ_VERSIONS[-1]}: build the data again with tools/preprocess_data.py --fresh"
        )
    try:
        return Manifest.model_validate(content).at(path.parent)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "the manifest"
        raise DataError(
            f"{path} is damaged: '{where}': {detail['msg']}; build the data again with"
            " tools/preprocess_data.py --fresh"
        ) from None


def verify(manifest: Manifest, deep: bool = False) -> None:
    """Check that the files of a manifest exist, with their sizes and the tokenizer's checksum.

    With ``deep``, every checksum is compared.

    Raises:
        DataError: for the first file that is missing or differs; it names the file.
    """
    tokenizer = "it is the wrong tokenizer for the shards: put back the one they were built with"
    check_file(manifest.tokenizer_path, None, manifest.tokenizer.sha256, tokenizer)
    for split in manifest.splits.values():
        for shard in split.shards:
            prefix = manifest.folder / shard.prefix
            for path, size, checksum in (
                (bin_path(prefix), shard.bin_bytes, shard.bin_sha256),
                (idx_path(prefix), shard.idx_bytes, shard.idx_sha256),
            ):
                check_file(
                    path,
                    size,
                    checksum if deep else None,
                    "build the data again with tools/preprocess_data.py --fresh",
                )


def check_file(path: Path, size: int | None, checksum: str | None, remedy: str) -> None:
    """Compares a file with what is known of it.

    Raises:
        DataError: if it is missing or differs; the sentence ends with ``remedy``.
    """
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise DataError(f"{path} has {found} bytes, its manifest says {size}: {remedy}")
        if checksum is not None and file_sha256(path) != checksum:
            raise DataError(f"{path} differs from its manifest (SHA-256): {remedy}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
