"""Data folders with chosen tokens: real shards, tokenizer and manifest, without a build."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.shards.indexed import IndexedWriter, token_dtype
from data_pipeline.shards.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    load_manifest,
)
from data_pipeline.shards.split import SplitName
from data_pipeline.shards.token_stream import TokenStream, open_split
from pretrain.core.files import file_sha256

EOD = 0
Shards = Sequence[Sequence[Sequence[int]]]


def write_folder(
    folder: Path,
    train: dict[str, Shards],
    validation: dict[str, Shards] | None = None,
    vocab_size: int = 1000,
    pad_id: int | None = None,
    tokenizer: str = "{}",
) -> Manifest:
    """Shards of documents of tokens, by source, and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_NAME).write_text(tokenizer)
    splits: dict[SplitName, SplitEntry] = {}
    for split, sources in (("train", train), ("validation", validation)):
        if sources is not None:
            shards = [
                write_shard(folder, f"{split}-{name}-{number:05}", name, documents, vocab_size)
                for name, pieces in sources.items()
                for number, documents in enumerate(pieces)
            ]
            documents, tokens = (
                sum(shard.documents for shard in shards),
                sum(shard.tokens for shard in shards),
            )
            splits[split] = SplitEntry(
                documents=documents, tokens=tokens, utf8_bytes=3 * tokens, shards=shards
            )
    entry = SourceEntry(
        kind="text", sha256="0" * 64, records=0, documents=0, tokens=0, utf8_bytes=0, share=0.0
    )
    manifest = Manifest(
        created_by="test",
        request_sha256="0" * 64,
        inputs_sha256="0" * 64,
        dtype=token_dtype(vocab_size).name,
        tokenizer=TokenizerEntry(
            file=TOKENIZER_NAME,
            sha256=file_sha256(folder / TOKENIZER_NAME),
            vocab_size=vocab_size,
            eod_id=EOD,
            pad_id=pad_id,
        ),
        sources=dict.fromkeys(dict.fromkeys([*train, *(validation or {})]), entry),
        splits=splits,
    )
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest.model_dump(mode="json")))
    return load_manifest(folder)


def write_shard(
    folder: Path, prefix: str, source: str, documents: Sequence[Sequence[int]], vocab_size: int
) -> ShardEntry:
    """One shard of one source."""
    with IndexedWriter(folder / prefix, token_dtype(vocab_size)) as writer:
        tokens = np.array([token for document in documents for token in document], dtype=np.int64)
        writer.add(tokens, np.array([len(document) for document in documents], dtype=np.int64))
        written = writer.finish()
    return ShardEntry.of(written, prefix, source)


def stream_of(folder: Path, shards: Shards, vocab_size: int = 1000) -> TokenStream:
    """The stream of these shards."""
    return open_split(write_folder(folder, {"all": shards}, vocab_size=vocab_size), "train")


def counting_stream(folder: Path, num_tokens: int) -> TokenStream:
    """Token i is i + 1, so a batch shows where it was read."""
    return stream_of(folder, [[list(range(1, num_tokens + 1))]], vocab_size=num_tokens + 1)
