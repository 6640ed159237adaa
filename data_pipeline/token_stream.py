"""The tokens of several shards as one stream. A shard is opened when something is read from it, so a corpus of any size starts at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.indexed import IndexedReader, bin_path
from data_pipeline.manifest import Manifest, ShardEntry, canonical_sha256
from data_pipeline.split import SplitName
from pretrain.config.errors import DataError


class Shard:
    """One shard as its manifest describes it."""

    def __init__(self, folder: Path, entry: ShardEntry, dtype: str) -> None:
        self.prefix, self.entry, self.dtype = folder / entry.prefix, entry, dtype
        self._reader: IndexedReader | None = None

    @property
    def reader(self) -> IndexedReader:
        """The opened shard.

        Raises:
            DataError: for a shard that is missing, damaged, or not the one of the manifest.
        """
        if self._reader is None:
            reader = IndexedReader(self.prefix)
            if (reader.num_tokens, reader.dtype.name) != (self.entry.tokens, self.dtype):
                raise DataError(
                    f"{bin_path(self.prefix)} holds {reader.num_tokens} tokens of {reader.dtype.name}, "
                    f"its manifest says {self.entry.tokens} of {self.dtype}: build the data again with tools/preprocess_data.py --fresh"
                )
            self._reader = reader
        return self._reader


class TokenStream:
    """The tokens of all shards, one after the other, as one stream across documents and shards."""

    def __init__(self, shards: list[Shard], vocab_size: int) -> None:
        self.shards, self.vocab_size = shards, vocab_size
        self._starts = np.cumsum([0, *(shard.entry.tokens for shard in shards)], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def start_of(self, shard: int) -> int:
        """Where the tokens of a shard begin."""
        return int(self._starts[shard])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1: int64 [count].

        Raises:
            IndexError: where the stream does not have them.
            DataError: for a token id that the vocabulary does not have; it names the shard.
        """
        result = np.empty(count, dtype=np.int64)
        for shard, begin, end, filled in self._pieces(start, count):
            part = shard.reader.tokens[begin:end]
            self._check(part, shard)
            result[filled : filled + len(part)] = part
        return result

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Which of the tokens start .. start + count - 1 begin a document, as the shards' indexes say: int64 in [0, count), sorted."""
        found = [shard.reader.document_starts(begin, end) + (filled - begin) for shard, begin, end, filled in self._pieces(start, count)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _pieces(self, start: int, count: int) -> list[tuple[Shard, int, int, int]]:
        """The shards that hold these tokens: (shard, first and last + 1 token in it, number of tokens before them)."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.num_tokens}")
        pieces, filled = [], 0
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < count:
            inside = start + filled - self.start_of(number)
            taken = min(count - filled, self.shards[number].entry.tokens - inside)
            if taken:
                pieces.append((self.shards[number], inside, inside + taken, filled))
            filled += taken
            number += 1
        return pieces

    def _check(self, part: np.ndarray, shard: Shard) -> None:
        if part.size and (part.max() >= self.vocab_size or part.min() < 0):
            raise DataError(
                f"{bin_path(shard.prefix)} holds token ids from {part.min()} to {part.max()}, but its tokenizer has {self.vocab_size} entries: "
                "it is damaged, or belongs to another tokenizer; build the data again with tools/preprocess_data.py --fresh"
            )


def open_split(manifest: Manifest, split: SplitName, source: str | None = None) -> TokenStream:
    """The token stream of a data folder's split, or of one source of it.

    Raises:
        DataError: where the folder has no such split.
    """
    if split not in manifest.splits:
        raise DataError(f"the data in {manifest.folder} has no {split} split: build it again with another data.validation_share")
    entries = [entry for entry in manifest.splits[split].shards if source in (None, entry.source)]
    return TokenStream([Shard(manifest.folder, entry, manifest.dtype) for entry in entries], manifest.tokenizer.vocab_size)


def source_fingerprint(manifest: Manifest, source: str) -> str:
    """SHA-256 of what training reads of one source, whatever other sources lie beside it: its tokenizer and its training shards."""
    shards = [
        [entry.tokens, entry.bin_sha256, entry.idx_sha256] for entry in manifest.splits["train"].shards if entry.source == source and entry.tokens
    ]
    return canonical_sha256({"tokenizer": manifest.tokenizer.sha256, "dtype": manifest.dtype, "shards": shards})
