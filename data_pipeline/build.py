"""From a source to a data folder: read -> split -> tokenizer -> shards -> manifest.

All files are written in a staging folder and take their names at the end, the manifest last: a folder with a manifest is complete, and a
build that was killed or failed leaves none.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
from tqdm import tqdm

from data_pipeline.indexed import IndexedWriter, token_dtype
from data_pipeline.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    canonical_sha256,
    load_manifest,
    verify,
)
from data_pipeline.sources import Document, PythonStdlib, TextFiles, open_source
from data_pipeline.split import SPLITS, SplitName, SplitPlan, plan_split
from data_pipeline.storage import publish, staging
from data_pipeline.tokenizer import Tokenizer, cut_before_white_space, load_tokenizer, train_bpe
from pretrain.config.durable import only_writer, write_synced
from pretrain.config.errors import ConfigError, DataError
from pretrain.config.schema import DataConfig, TokenizerFile, TrainBPE

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 22
Source = PythonStdlib | TextFiles


@dataclass(frozen=True)
class BuildResult:
    """A complete data folder; ``reused`` where it was there already."""

    folder: Path
    manifest: Manifest
    reused: bool


@dataclass
class Corpus:
    """What one reading of a source found; ``sha256`` covers every document's id and text, in order."""

    document_ids: list[str] = field(default_factory=list)
    utf8_bytes: int = 0
    sha256: str = ""
    skipped: Counter[str] = field(default_factory=Counter)


def build(config: DataConfig, output: Path, fresh: bool = False, progress: bool = False) -> BuildResult:
    """Builds the data of ``config`` in the folder ``output``, or finds it there.

    Args:
        config: source, tokenizer and validation share; ``path`` and ``document_mask`` do not change the files.
        output: the folder; created.
        fresh: build also where the folder holds data, and replace it once the new data is complete.
        progress: show progress bars on standard error.

    Raises:
        ConfigError: where the folder holds other data and ``fresh`` is false.
        DataError: for a source or a tokenizer that cannot be used.
        StorageError: where the disk is full, or another process builds in the same folder.
    """
    given = load_tokenizer(Path(config.tokenizer.path)) if isinstance(config.tokenizer, TokenizerFile) else None
    _check_vocab_size(config, given)
    source = open_source(config.source)
    request = request_sha256(config, given)
    corpus = read_corpus(source, progress)
    plan = plan_split(corpus.document_ids, config.validation_share)
    with only_writer(output, "choose another --output"):
        has_manifest = (output / MANIFEST_NAME).exists()
        if has_manifest and not fresh:
            return BuildResult(output, _matching_manifest(output, request, corpus), reused=True)
        if not has_manifest and any((output / name).exists() for name in _file_names()):
            logger.warning("%s has data files but no %s, so their build did not finish: they are built again", output, MANIFEST_NAME)
        with staging(output) as staged:
            tokenizer = given or _train_tokenizer(config, source, plan, corpus, progress)
            write_synced(staged / TOKENIZER_NAME, tokenizer.content)
            splits = _write_shards(staged, source, plan, tokenizer, corpus, progress)
            manifest = Manifest(
                created_by=f"tools/preprocess_data.py with tokenizers {tokenizers.__version__}",
                request_sha256=request,
                dtype="uint16" if token_dtype(tokenizer.vocab_size).itemsize == 2 else "int32",
                tokenizer=TokenizerEntry(file=TOKENIZER_NAME, sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id),
                source=_source_entry(source, corpus),
                splits=splits,
            )
            write_synced(staged / MANIFEST_NAME, (manifest.model_dump_json(indent=2, exclude_none=True) + "\n").encode())
            # While old and new files are mixed there must be no manifest that vouches for them.
            (output / MANIFEST_NAME).unlink(missing_ok=True)
            publish(staged, output, [*_file_names(), MANIFEST_NAME])
    return BuildResult(output, manifest, reused=False)


def request_sha256(config: DataConfig, given: Tokenizer | None) -> str:
    """Checksum of what was asked for, apart from the texts themselves (the corpus checksum covers those) and from where they lie."""
    tokenizer = {"kind": "file", "sha256": given.sha256} if given else {"kind": "train_bpe", "vocab_size": config.tokenizer.vocab_size}
    return canonical_sha256({"source": config.source.kind, "tokenizer": tokenizer, "validation_share": config.validation_share})


def read_corpus(source: Source, progress: bool) -> Corpus:
    """Reads the source once: the ids for the split, and the checksum that tells this corpus from another."""
    corpus, checksum = Corpus(), hashlib.sha256()
    documents = source.documents(corpus.skipped)
    for document in tqdm(documents, total=len(source.files), desc="reading", unit="file", disable=not progress):
        text = document.text.encode("utf-8")
        checksum.update(_framed(document, text))
        corpus.document_ids.append(document.id)
        corpus.utf8_bytes += len(text)
    corpus.sha256 = checksum.hexdigest()
    return corpus


def _framed(document: Document, text: bytes) -> bytes:
    """Id and text with their lengths, so that no two corpora run together to the same bytes."""
    name = document.id.encode("utf-8")
    return b"%d:%b%d:%b" % (len(name), name, len(text), text)


def _check_vocab_size(config: DataConfig, given: Tokenizer | None) -> None:
    asked = config.tokenizer.vocab_size
    if given is not None and asked is not None and asked != given.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size is {asked}, but the tokenizer has {given.vocab_size} entries: leave it out or say {given.vocab_size}"
        )


def _matching_manifest(output: Path, request: str, corpus: Corpus) -> Manifest:
    manifest = load_manifest(output)
    if manifest.source.sha256 != corpus.sha256 or manifest.request_sha256 != request:
        what = "another corpus" if manifest.source.sha256 != corpus.sha256 else "the same corpus with another tokenizer or validation share"
        raise ConfigError(f"{output} holds data of {what}: choose another folder, or pass --fresh to replace it")
    verify(output, manifest)
    return manifest


def _train_tokenizer(config: DataConfig, source: Source, plan: SplitPlan, corpus: Corpus, progress: bool) -> Tokenizer:
    assert isinstance(config.tokenizer, TrainBPE)

    def training_texts() -> Iterator[str]:
        with tqdm(total=corpus.utf8_bytes, desc="training the tokenizer", unit="B", unit_scale=True, disable=not progress) as bar:
            for document in source.documents():
                for split, part in plan.assign(document):
                    for piece in cut_before_white_space(part.text):
                        if split == "train":
                            yield piece
                        bar.update(len(piece.encode("utf-8")))

    tokenizer = train_bpe(training_texts(), config.tokenizer.vocab_size)
    if tokenizer.vocab_size < config.tokenizer.vocab_size:
        logger.warning(
            "the corpus gives a vocabulary of %d entries, not %d: it is too small for more", tokenizer.vocab_size, config.tokenizer.vocab_size
        )
    return tokenizer


class _ShardWriter:
    """Encodes documents in batches and sends each to its split's shard, with an end-of-document token after it."""

    def __init__(self, tokenizer: Tokenizer, writers: dict[SplitName, IndexedWriter]) -> None:
        self.tokenizer, self.writers = tokenizer, writers
        self._pieces: list[tuple[SplitName, str, bool]] = []
        self._characters = 0

    def add(self, split: SplitName, text: str) -> None:
        pieces = list(self.tokenizer.pieces(text))
        for number, piece in enumerate(pieces, start=1):
            self._pieces.append((split, piece, number == len(pieces)))
            self._characters += len(piece)
            if self._characters >= BATCH_CHARACTERS:
                self.flush()

    def flush(self) -> None:
        encoded = self.tokenizer.encode([piece for _, piece, _ in self._pieces])
        for (split, _, is_last), tokens in zip(self._pieces, encoded, strict=True):
            self.writers[split].add(tokens)
            if is_last:
                self.writers[split].add(np.array([self.tokenizer.eod_id]))
                self.writers[split].end_document()
        self._pieces, self._characters = [], 0


def _write_shards(staged: Path, source: Source, plan: SplitPlan, tokenizer: Tokenizer, corpus: Corpus, progress: bool) -> dict[SplitName, SplitEntry]:
    utf8_bytes: Counter[SplitName] = Counter()
    checksum = hashlib.sha256()
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = {split: stack.enter_context(IndexedWriter(staged / split, dtype)) for split in SPLITS}
        shards = _ShardWriter(tokenizer, writers)
        bar = stack.enter_context(tqdm(total=corpus.utf8_bytes, desc="encoding", unit="B", unit_scale=True, disable=not progress))
        for document in source.documents():
            checksum.update(_framed(document, document.text.encode("utf-8")))
            for split, part in plan.assign(document):
                size = len(part.text.encode("utf-8"))
                utf8_bytes[split] += size
                shards.add(split, part.text)
                bar.update(size)
        shards.flush()
        if checksum.hexdigest() != corpus.sha256:
            raise DataError("the source files changed while they were read: run the same command again once they are at rest")
        written = {split: writer.finish() for split, writer in writers.items()}
    return {
        split: SplitEntry(
            documents=shard.documents, tokens=shard.tokens, utf8_bytes=utf8_bytes[split], shards=[ShardEntry(prefix=split, **asdict(shard))]
        )
        for split, shard in written.items()
    }


def _source_entry(source: Source, corpus: Corpus) -> SourceEntry:
    return SourceEntry(
        kind=source.kind,
        python_version=platform.python_version() if isinstance(source, PythonStdlib) else None,
        patterns=source.patterns if isinstance(source, TextFiles) else None,
        sha256=corpus.sha256,
        documents=len(corpus.document_ids),
        skipped=dict(sorted(corpus.skipped.items())),
    )


def _file_names() -> list[str]:
    return [TOKENIZER_NAME, *(split + suffix for split in SPLITS for suffix in (".bin", ".idx"))]
