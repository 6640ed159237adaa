"""The data folders that a recipe trains on: one, or several by name."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.config import DataConfig
from data_pipeline.shards.manifest import Manifest, TokenizerEntry, load_manifest, verify
from data_pipeline.shards.split import SplitName
from data_pipeline.shards.token_stream import TokenStream, open_split, source_fingerprint
from data_pipeline.shards.verification import (
    BackgroundCheck,
    every_block,
    first_fault,
    lacks_blocks,
    sampled_blocks,
)
from pretrain.core.errors import DataError


@dataclass(frozen=True)
class SourceShards:
    """One source of one data folder: what windows never cross."""

    stream: TokenStream
    fingerprint: str


@dataclass(frozen=True)
class TrainingShare:
    """One source's part of the training split; ``share`` is that of all its tokens."""

    kind: str
    documents: int
    tokens: int
    share: float


@dataclass(frozen=True)
class Datasets:
    """Data folders with one and the same tokenizer.

    Attributes:
        manifests: by the corpus's name; a single folder is called "".
    """

    manifests: dict[str, Manifest]

    @property
    def first(self) -> Manifest:
        """The manifest of the first folder."""
        return next(iter(self.manifests.values()))

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer, which all folders share."""
        return self.first.tokenizer

    @property
    def tokenizer_path(self) -> Path:
        """The path of the tokenizer's file."""
        return self.first.tokenizer_path

    @property
    def pad_id(self) -> int:
        """The token that fills what no document fills.

        It has no loss, and no document sees it: without a token for it, any other one will do.
        """
        named = (self.tokenizer.pad_id, self.tokenizer.eod_id)
        return next((token for token in named if token is not None), 0)

    @property
    def place(self) -> str:
        """The folders, for sentences."""
        return ", ".join(str(manifest.folder) for manifest in self.manifests.values())

    def training_shards(self) -> dict[str, list[SourceShards]]:
        """Return the training shards by what the mixture calls a source.

        That is a source of a single folder, or each of several folders as a whole.

        Raises:
            DataError: if a folder has nothing to train on.
        """
        found: dict[str, list[SourceShards]] = {}
        for corpus, manifest in self.manifests.items():
            shards = manifest.splits["train"].shards if "train" in manifest.splits else []
            names = list(dict.fromkeys(entry.source for entry in shards if entry.tokens))
            if not names:
                raise DataError(
                    f"the data in {manifest.folder} has no training split: build it again with more"
                    " data or a lower data.validation_share"
                )
            for name in names:
                part = SourceShards(
                    open_split(manifest, "train", name), source_fingerprint(manifest, name)
                )
                found.setdefault(corpus or name, []).append(part)
        return found

    def training_sources(self) -> dict[str, TrainingShare]:
        """Return the sources of all folders: ``corpus/source`` if a folder has a name.

        It is empty if training reads the sources itself.
        """
        counts: dict[str, tuple[str, int, int]] = {}
        for corpus, manifest in self.manifests.items():
            for entry in manifest.splits["train"].shards if "train" in manifest.splits else []:
                name = f"{corpus}/{entry.source}" if corpus else entry.source
                kind, documents, tokens = counts.get(
                    name, (manifest.sources[entry.source].kind, 0, 0)
                )
                counts[name] = (kind, documents + entry.documents, tokens + entry.tokens)
        total = sum(tokens for _, _, tokens in counts.values()) or 1
        return {
            name: TrainingShare(kind, documents, tokens, tokens / total)
            for name, (kind, documents, tokens) in counts.items()
        }

    def validation_stream(self) -> TokenStream | None:
        """The held-out documents of all folders, one after the other.

        None if nothing is held out.
        """
        return self.stream("validation") if self.utf8_bytes("validation") else None

    def stream(self, split: SplitName) -> TokenStream:
        """A split of all folders that have it.

        Raises:
            DataError: if none has.
        """
        streams = [
            open_split(manifest, split)
            for manifest in self.manifests.values()
            if split in manifest.splits
        ]
        if not streams:
            raise DataError(
                f"the data in {self.place} has no {split} split: give data that has one, or build"
                " it with data.validation_share above 0"
            )
        return TokenStream(
            [shard for stream in streams for shard in stream.shards], self.tokenizer.vocab_size
        )

    def utf8_bytes(self, split: SplitName) -> int:
        """Bytes of a split's texts."""
        return sum(
            manifest.splits[split].utf8_bytes
            for manifest in self.manifests.values()
            if split in manifest.splits
        )

    def verify(self) -> None:
        """See :func:`data_pipeline.shards.manifest.verify`."""
        for manifest in self.manifests.values():
            verify(manifest)

    def check_blocks(
        self, how: Literal["sizes", "sample", "full"], rank: int, world_size: int
    ) -> BackgroundCheck:
        """Compare this rank's part of the files' blocks with the manifests.

        :meth:`verify` looks at the sizes only.

        Returns:
            What is still being read in the background; of ``full`` nothing is left to read.
        """
        manifests = list(self.manifests.values())
        if how == "full":
            return BackgroundCheck(
                [], first_fault(every_block(manifests)[rank::world_size], progress=rank == 0)
            )
        if how == "sizes":
            return BackgroundCheck([])
        if (old := lacks_blocks(manifests)) is not None and rank == 0:
            print(
                f"warning: the manifest in {old.folder} has no checksums of blocks, so that only"
                " sizes are compared: use --set data.verify=full, or build the data again",
                file=sys.stderr,
            )
        # Other blocks at each start: the seed is the system's, not the recipe's.
        return BackgroundCheck(sampled_blocks(manifests, random.Random())[rank::world_size])


def data_folders(data: DataConfig, path: str) -> dict[str, str]:
    """The data folders by the corpus's name; a single one is called ``""``.

    Args:
        path: of the folder if ``data`` names no corpora.
    """
    return data.corpora or {"": path}


def load_datasets(folders: dict[str, str]) -> Datasets:
    """Reads the manifests of :func:`data_folders`.

    Raises:
        DataError: if a folder holds no data, or the folders do not have the same tokenizer.
    """
    datasets = Datasets({name: load_manifest(folder) for name, folder in folders.items()})
    for manifest in datasets.manifests.values():
        if manifest.tokenizer.sha256 != datasets.tokenizer.sha256:
            raise DataError(
                f"the data in {manifest.folder} and {datasets.first.folder} have different"
                " tokenizers, so they cannot be mixed: build one again with --tokenizer"
                f" {datasets.tokenizer_path}"
            )
    return datasets
