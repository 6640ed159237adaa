"""Imports one shard of another program.

Every token is checked, and the file is not copied if its bytes are what training reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import xxhash

from data_pipeline.preprocess.workspace import no_space_is_told, read_json
from data_pipeline.shards.block_checksums import FileChecksums
from data_pipeline.shards.foreign import READ_TOKENS, ForeignShard
from data_pipeline.shards.indexed import (
    BLOCK_TOKENS,
    LONGEST_DOCUMENT,
    IndexedWriter,
    Tokens,
    WrittenShard,
    bin_path,
    idx_path,
    index_content,
)
from data_pipeline.shards.split import SPLITS, SplitName
from data_pipeline.tokenizer.text_bytes import TextBytes
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import DataError, StorageError
from pretrain.core.files import fsync_path

COPIED_BYTES = 1 << 24


@dataclass
class ImportRecord:
    """The result of importing one shard.

    Attributes:
        shards: what was written of each split, by the shard's name.
        utf8_bytes: of the texts of each split.
        empty: documents without a token, which are left out.
        end_with_eod, begin_with_bos: documents that do.
        largest_id: of all tokens.
        how: ``linked``, ``copied`` or ``converted``.
    """

    number: int
    shards: dict[SplitName, WrittenShard] = field(default_factory=dict)
    utf8_bytes: dict[SplitName, int] = field(default_factory=dict)
    empty: int = 0
    end_with_eod: int = 0
    begin_with_bos: int = 0
    largest_id: int = -1
    how: str = "converted"

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the record of a finished shard; None if there is no complete one."""
        content = read_json(path)
        if content is None:
            return None
        shards = {split: WrittenShard(**part) for split, part in content.pop("shards").items()}
        return cls(shards=shards, **content)


@dataclass(frozen=True)
class ImportJob:
    """One shard to import.

    Attributes:
        names: of the shard in each split that it may have documents of.
        share: of its documents that is held out, if it has both splits.
        folder: that the results are written into.
    """

    number: int
    shard: ForeignShard
    names: dict[SplitName, str]
    share: float
    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    folder: Path


class _Sink(Protocol):
    def add_part(self, tokens: Tokens) -> None: ...
    def end_documents(self, lengths: np.ndarray) -> None: ...
    def finish(self) -> WrittenShard: ...


def import_shard(job: ImportJob, advance: Callable[[int], object]) -> ImportRecord:
    """Writes the shards of one job and the record of it; a finished one is found again.

    Args:
        advance: is called with the number of tokens that were read; what it raises ends the work.

    Raises:
        DataError: for a token id that the tokenizer does not have, or a document that is too long.
        StorageError: if the disk is full.
    """
    place = job.folder / f"import-{job.number:05}.json"
    found = ImportRecord.read(place)
    if found is not None and all(
        path.exists() for name in job.names.values() for path in _files(job.folder / name)
    ):
        advance(job.shard.num_tokens)
        return found
    for name in job.names.values():
        for path in _files(job.folder / name):
            path.unlink(missing_ok=True)
    with no_space_is_told(job.folder):
        record = _Importer(job, advance).run()
        place.write_text(json.dumps(asdict(record)), encoding="utf-8")
    return record


def _files(prefix: Path) -> tuple[Path, Path]:
    return bin_path(prefix), idx_path(prefix)


class _Importer:
    def __init__(self, job: ImportJob, advance: Callable[[int], object]) -> None:
        self.job = job
        self.shard = job.shard
        self.advance = advance
        self.eod_id = job.tokenizer.eod_id
        self.bos_id = job.tokenizer.bos_id
        self.text_bytes = TextBytes(job.tokenizer)
        ends = self.shard.document_ends(self.eod_id)
        sizes = np.diff(ends, prepend=0)
        self.record = ImportRecord(job.number, empty=int((sizes == 0).sum()))
        self.ends = ends[sizes > 0]
        self.sizes = sizes[sizes > 0]
        if len(sizes) and self.sizes.max(initial=0) > LONGEST_DOCUMENT:
            hint = (
                ", because the tokenizer's end-of-document token is not in it"
                if self.shard.ends is None
                else ""
            )
            raise DataError(
                f"{self.shard.path} has a document of {self.sizes.max():,} tokens{hint}: at most"
                f" {LONGEST_DOCUMENT:,} are possible"
            )

    def run(self) -> ImportRecord:
        names = self.job.names
        sinks = dict[SplitName, _Sink]()
        with ExitStack() as stack:
            linked = self._linked() if self._reads_as_it_is() else None
            for split, name in names.items():
                sinks[split] = linked or stack.enter_context(
                    IndexedWriter(self.job.folder / name, self.job.dtype)
                )
            for first, last in self._batches():
                self._take(first, last, sinks)
            for split, sink in sinks.items():
                self.record.shards[split] = sink.finish()
            if linked is not None:
                self.record.how = linked.how
        return self.record

    def _reads_as_it_is(self) -> bool:
        """Whether the file of the tokens can be the .bin.

        Unsigned ids of four bytes have the same bytes as signed ones below 2^31.
        """
        types = (
            {self.job.dtype, np.dtype("<u4")}
            if self.job.dtype == np.dtype("<i4")
            else {self.job.dtype}
        )
        is_one = len(self.job.names) == 1 and self.shard.is_whole_file
        return is_one and self.shard.dtype in types

    def _linked(self) -> _LinkedShard:
        (name,) = self.job.names.values()
        return _LinkedShard(
            self.job.folder / name, self.shard.path, self.job.dtype, self.sizes, self.advance
        )

    def _batches(self) -> Iterator[tuple[int, int]]:
        """Yield ranges first .. last - 1 of documents that are read at once.

        A range has at most ``READ_TOKENS`` tokens, or one longer document.
        """
        first = 0
        while first < len(self.ends):
            begin = int(self.ends[first] - self.sizes[first])
            last = max(
                int(np.searchsorted(self.ends, begin + READ_TOKENS, side="right")), first + 1
            )
            yield first, last
            first = last

    def _take(self, first: int, last: int, sinks: dict[SplitName, _Sink]) -> None:
        """Checks documents and passes them on to their splits."""
        begin = int(self.ends[first] - self.sizes[first])
        end = int(self.ends[last - 1])
        lengths = self.sizes[first:last]
        if end - begin > READ_TOKENS:
            self._take_long(begin, end, sinks)
            return
        tokens = self._checked(self.shard.read(begin, end), begin)
        ends = np.cumsum(lengths)
        self.record.end_with_eod += int((tokens[ends - 1] == self.eod_id).sum())
        self.record.begin_with_bos += (
            int((tokens[ends - lengths] == self.bos_id).sum()) if self.bos_id is not None else 0
        )
        sides = self._sides(
            [
                tokens[stop - size : stop]
                for stop, size in zip(ends.tolist(), lengths.tolist(), strict=True)
            ]
        )
        for split, sink in sinks.items():
            mine = sides == SPLITS.index(split)
            part = tokens if mine.all() else tokens[np.repeat(mine, lengths)]
            self._count_bytes(split, part, lengths[mine].tolist())
            sink.add_part(part)
            sink.end_documents(lengths[mine])
        self.advance(end - begin)

    def _take_long(self, begin: int, end: int, sinks: dict[SplitName, _Sink]) -> None:
        """The same for one document that is read in parts."""
        (side,) = self._sides([None], lambda: self.shard.parts(begin, end))
        split = SPLITS[side]
        for number, part in enumerate(self.shard.parts(begin, end)):
            start = begin + number * READ_TOKENS
            self._checked(part, start)
            if start == begin:
                self.record.begin_with_bos += int(part[0] == self.bos_id)
            if start + len(part) == end:
                self.record.end_with_eod += int(part[-1] == self.eod_id)
            self._count_bytes(split, part, [len(part)])
            sinks[split].add_part(part)
            self.advance(len(part))
        sinks[split].end_documents(np.array([end - begin]))

    def _checked(self, tokens: Tokens, begin: int) -> Tokens:
        """The tokens, whose ids the tokenizer has."""
        size = self.job.tokenizer.vocab_size
        largest = int(tokens.max())
        if largest >= size or int(tokens.min()) < 0:
            place = int(((tokens >= size) | (tokens < 0)).argmax())
            document = int(np.searchsorted(self.ends, begin + place, side="right"))
            raise DataError(
                f"{self.shard.path} holds the token id {tokens[place]} at token {begin + place:,},"
                f" in document {document:,} (the largest there is {largest}), but"
                f" {self.job.tokenizer.origin} has {size:,} entries: give the tokenizer that it was"
                " made with"
            )
        self.record.largest_id = max(self.record.largest_id, largest)
        return tokens

    def _count_bytes(self, split: SplitName, tokens: Tokens, lengths: list[int]) -> None:
        self.record.utf8_bytes[split] = self.record.utf8_bytes.get(
            split, 0
        ) + self.text_bytes.count(tokens, lengths)

    def _sides(
        self, documents: list[Any], parts: Callable[[], Iterator[Tokens]] | None = None
    ) -> np.ndarray:
        """The number of each document's split [documents].

        A hash of its ids decides, whatever type they have: equal documents go together.
        """
        if len(self.job.names) == 1:
            (split,) = self.job.names
            return np.full(len(documents), SPLITS.index(split))
        places = []
        for document in documents:
            digest = xxhash.xxh3_64()
            for part in [document] if parts is None else parts():
                # Converted to one type first: a document must fall on the same side, however its
                # shard stores ids.
                digest.update(part.astype("<i4").data)
            places.append(digest.intdigest() / 2**64)
        return (np.array(places) < self.job.share).astype(np.int64)


class _LinkedShard:
    """A .bin that is the given file under another name, with an index of ours.

    Attributes:
        how: whether the file could be linked, or had to be copied.
    """

    def __init__(
        self,
        prefix: Path,
        source: Path,
        dtype: np.dtype[Any],
        lengths: np.ndarray,
        advance: Callable[[int], object],
    ) -> None:
        self.prefix = prefix
        self.source = source
        self.dtype = dtype
        self.lengths = lengths
        self._advance = advance
        self.how = "linked"
        self._checksums = FileChecksums()

    def add_part(self, tokens: Tokens) -> None:
        self._checksums.update(tokens.data)

    def end_documents(self, lengths: np.ndarray) -> None:
        """They are known already."""

    def finish(self) -> WrittenShard:
        path = bin_path(self.prefix)
        size = int(self.lengths.sum()) * self.dtype.itemsize
        try:
            os.link(self.source.resolve(), path)
        except OSError:
            # Another file system, or one that has no links, or files of somebody else.
            self.how = "copied"
            with self.source.open("rb") as source, path.open("wb") as target:
                while block := source.read(COPIED_BYTES):
                    target.write(block)
                    self._advance(0)
        if path.stat().st_size != size:
            raise StorageError(
                f"{self.source} changed while it was read: run the same command again once it is at"
                " rest"
            )
        fsync_path(path)
        index = FileChecksums()
        index_bytes = 0
        temporary = idx_path(self.prefix).with_suffix(".partial")
        with temporary.open("wb") as stream:
            for block in index_content(self.dtype, len(self.lengths), self._read_lengths):
                index.update(block)
                index_bytes += stream.write(block)
        fsync_path(temporary)
        os.replace(temporary, idx_path(self.prefix))
        # The parent folder holds the new names; without this a power cut may lose them.
        fsync_path(self.prefix.parent)
        return WrittenShard(
            documents=len(self.lengths),
            tokens=size // self.dtype.itemsize,
            bin_bytes=size,
            bin_checksum=self._checksums.hexdigest(),
            idx_bytes=index_bytes,
            idx_checksum=index.hexdigest(),
            bin_blocks=self._checksums.blocks(),
            idx_blocks=index.blocks(),
        )

    def _read_lengths(self) -> Iterator[bytes]:
        return (
            self.lengths[start : start + BLOCK_TOKENS].astype("<i4").tobytes()
            for start in range(0, len(self.lengths), BLOCK_TOKENS)
        )
