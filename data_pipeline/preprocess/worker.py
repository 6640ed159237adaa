"""The work of a worker process on a unit: sample it for a tokenizer, or encode it."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_pipeline.cleaning.config import Cleaning
from data_pipeline.cleaning.near_duplicates import minhash_bands_batch, num_bands
from data_pipeline.preprocess.batch import Batch
from data_pipeline.preprocess.reader import Reader, Task
from data_pipeline.preprocess.unit_record import SplitCounts, UnitRecord
from data_pipeline.preprocess.workspace import RECORD, attempt, no_space_is_told
from data_pipeline.shards.indexed import IndexedWriter, token_dtype
from data_pipeline.shards.split import SPLITS, SplitName, text_digest
from data_pipeline.sources.interface import Unit
from data_pipeline.tokenizer.config import TokenPolicy
from data_pipeline.tokenizer.engine_choice import CheckedEncoder, choose_engine
from data_pipeline.tokenizer.engines import EngineUnavailableError
from data_pipeline.tokenizer.fill_in_the_middle import open_transform
from data_pipeline.tokenizer.patterns import PIECE_CHARACTERS
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core import faults
from pretrain.core.errors import ConfigError, DataError

# Texts and ids of a batch stay in a core's cache on their way from JSON to the file.
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1 << 14
MINHASH_CHARACTERS = 1 << 22
CHECK_EVERY = 1000
LEFT_OUT = "left_out.jsonl"
SAMPLE = "sample.jsonl"
DIGESTS = "digests.npy"
BANDS = "bands.npy"
MARKS = "marks.npy"
# In the staging folder, of either kind.
TOKENIZER = "tokenizer"
SIDES = "sides.npy"
TEXT_BYTES = "text_bytes.npy"
NAMES = "names.jsonl"

Job = tuple[Task, int, Unit]


def unit_folder(workspace: str | Path, stage: str, number: int) -> Path:
    """Return the folder of a unit: ``stage`` is samples or units."""
    return Path(workspace) / stage / f"{number:07}"


def scan_unit(job: Job) -> UnitRecord:
    """Read a unit as :func:`encode_unit` would, for its checksum alone."""
    task, number, unit = job
    reader = Reader(task, number, unit, None)
    for _ in reader.documents_with_split():
        pass
    return reader.record()


def sample_unit(job: Job) -> UnitRecord:
    """Write the documents that the tokenizer is trained on, with their place in the split."""
    task, number, unit = job
    place = unit_folder(task.workspace, "samples", number)
    share = task.sample_shares[unit.source]
    with no_space_is_told(place), attempt(Path(task.workspace), place) as folder:
        reader = Reader(task, number, unit, None)
        limit = task.sample_limits.get(unit.source)
        with (folder / SAMPLE).open("wb") as stream:
            for document, digest, where in reader.documents_with_split():
                if (digest & 0xFFFFFFFF) / 2**32 < share:
                    stream.write(orjson.dumps([where, document.text]) + b"\n")
                # A stream is not read to its end for a sample.
                if limit is not None and stream.tell() >= limit:
                    break
        return finish_unit(folder, job, reader.record())


def encode_unit(job: Job) -> UnitRecord:
    """Write a unit's part of each split, the keys for deduplication, and the unit's record."""
    task, number, unit = job
    place = unit_folder(task.workspace, "units", number)
    with (
        no_space_is_told(place),
        attempt(Path(task.workspace), place) as folder,
        ExitStack() as stack,
    ):
        faults.reached("preprocess.unit")
        report = stack.enter_context((folder / LEFT_OUT).open("w", encoding="utf-8"))
        reader = Reader(task, number, unit, report)
        part = stack.enter_context(PartWriter(task, folder, unit.source))
        split = task.split
        wanted = task.held_out_only
        for document, digest, where in reader.documents_with_split():
            if split.cut:
                for side, text in enumerate(split.parts(document.text)):
                    # The two parts are no duplicates of each other.
                    if side or wanted is None:
                        part.add(document.id, text, text_digest(text), side)
            elif (side := split.side(where)) or wanted is None:
                part.add(document.id, document.text, digest, side)
            # Of a stream only the held-out documents are written, and no more of them than asked
            # for.
            if wanted is not None and part.documents[1] >= wanted:
                break
        splits, checksums = part.finish()
        # The record says that the unit is complete, so the report must be on its way before.
        report.flush()
        return finish_unit(
            folder, job, replace(reader.record(), splits=splits, checksums=checksums)
        )


def encode_ahead(job: Job) -> None:
    """Encodes a unit while its engine is still being tried.

    Errors are reported when the unit is encoded again with the chosen engine.
    """
    with suppress(ConfigError, DataError):
        encode_unit(job)


def choose(job: tuple[Task, list[str]]) -> str:
    """The engine for the tokenizer of a task, by a sample of the corpus.

    That of the task stays open, for the units to come.
    """
    task, sample = job
    with suppress(EngineUnavailableError):
        return choose_engine(_tokenizer(task), sample, {task.engine: _encoder(task).engine}).name
    return choose_engine(_tokenizer(task), sample).name


def finish_unit(folder: Path, job: Job, record: UnitRecord) -> UnitRecord:
    """Complete a unit's record, and write it."""
    # Merging trusts a part as it is, unless the machine has been restarted since: see is_usable.
    record = replace(record, plan=unit_plan(job[0]), boot=boot_id())
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")
    return record


def unit_plan(task: Task) -> list[object]:
    """Return the split's plan and the engine, as JSON: units of another one are encoded again."""
    return [
        task.split.validation_share,
        task.split.moved,
        task.split.cut,
        task.held_out_only,
        task.engine,
    ]


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Return an id that changes when the machine is restarted.

    It is empty if the system has none, which counts as no restart.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class PartWriter:
    """Encodes documents in batches and appends each to the part of its split.

    If duplicates are looked for, it also keeps a row for each document: digest, bands,
    split, bytes of text, name.
    """

    def __init__(self, task: Task, folder: Path, source: str) -> None:
        config = task.config
        self.folder = folder
        self.tokenizer = _tokenizer(task)
        self.encoder = _encoder(task)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.transform = open_transform(config.fill_in_the_middle, source, self.tokenizer)
        self.keys = (
            DuplicateKeys(folder, config.cleaning)
            if looks_for_duplicates(config.cleaning)
            else None
        )
        self.documents = [0, 0]
        self.text_bytes = [0, 0]
        self._before = (
            [self.tokenizer.bos_id]
            if self.tokenizer.prepend_bos and self.tokenizer.bos_id is not None
            else []
        )
        self._after = (
            [self.tokenizer.eod_id]
            if self.tokenizer.append_eod and self.tokenizer.eod_id is not None
            else []
        )
        self._batch, self._bytes = self._new_batch(), 0
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        self.writers = [
            # Not durable: an fsync for each unit would cost more than encoding a unit again after a
            # power cut.
            self._stack.enter_context(IndexedWriter(self.folder / split, self.dtype, durable=False))
            for split in SPLITS
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, name: str, text: str, digest: int, side: int) -> None:
        """Add a document to the part of its split.

        Args:
            name: what errors and reports call it.
            digest: of the text.
            side: index of the split in ``SPLITS``.
        """
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        self.documents[side] += 1
        self.text_bytes[side] += size
        if self.keys is not None:
            self.keys.add(name, text, digest, side, size)
        batch = self._batch
        if self.transform is None and size <= PIECE_CHARACTERS:
            batch.add(name, digest, side, text)
        else:
            batch.add(name, digest, side, self._segments(text, digest, side))
        self._bytes += size
        if self._bytes >= BATCH_BYTES or len(batch.sides) >= BATCH_DOCUMENTS:
            self.flush()

    def _segments(self, text: str, digest: int, side: int) -> list[str | int]:
        """A document in pieces, with what its transform puts between them."""
        parts = (
            self.transform.split(text, digest, 0)
            if self.transform is not None and side == 0
            else None
        )
        segments: list[str | int] = []
        for part in parts or (text,):
            segments += [part] if isinstance(part, int) else self.tokenizer.pieces(part)
        return segments

    def _new_batch(self) -> Batch:
        return Batch(self._before, self._after)

    def flush(self) -> None:
        """Encodes the batch and appends it to the parts."""
        batch = self._batch
        self._batch = self._new_batch()
        self._bytes = 0
        if not batch.sides:
            return
        tokens, lengths = batch.encode(self.encoder, self.dtype)
        sides = np.array(batch.sides)
        for side, writer in enumerate(self.writers):
            mine = sides == side
            if mine.all():
                writer.add(tokens, lengths)
            elif mine.any():
                writer.add(tokens[np.repeat(mine, lengths)], lengths[mine])

    def finish(self) -> tuple[dict[SplitName, SplitCounts], dict[str, str]]:
        """Complete the parts; return the counts by split, and the checksums by file name."""
        self.flush()
        if self.keys is not None:
            self.keys.finish()
        written = [writer.finish() for writer in self.writers]
        counts = {
            split: SplitCounts(part.documents, part.tokens, size)
            for split, part, size in zip(SPLITS, written, self.text_bytes, strict=True)
        }
        checksums = {
            f"{split}.bin": part.bin_checksum for split, part in zip(SPLITS, written, strict=True)
        }
        return counts, checksums


def looks_for_duplicates(cleaning: Cleaning) -> bool:
    """Whether any kind of deduplication is on."""
    return cleaning.exact_duplicates or cleaning.near_duplicates is not None


class DuplicateKeys:
    """The keys that find duplicates, one row a document, in files that can be memory-mapped.

    Rows go to disk in batches: memory stays flat.
    """

    def __init__(self, folder: Path, cleaning: Cleaning) -> None:
        self.folder = folder
        self.near = cleaning.near_duplicates
        self.columns: dict[str, np.dtype[Any]] = {
            DIGESTS: np.dtype("u8"),
            SIDES: np.dtype("u1"),
            TEXT_BYTES: np.dtype("i8"),
        }
        if self.near is not None:
            self.columns[BANDS] = np.dtype("u8")
        self.widths = {DIGESTS: 2, BANDS: num_bands(self.near) if self.near is not None else 0}
        self.rows = 0
        self._waiting: list[tuple[str, str, int, int, int]] = []
        self._characters = 0

    def add(self, name: str, text: str, digest: int, side: int, size: int) -> None:
        """Add a document's row; ``size`` is that of its text in bytes."""
        self._waiting.append((name, text if self.near is not None else "", digest, side, size))
        self._characters += len(text)
        if self._characters >= MINHASH_CHARACTERS or len(self._waiting) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Appends the waiting rows to one raw file a column."""
        names, texts, digests, sides, sizes = (
            zip(*self._waiting, strict=True) if self._waiting else ((),) * 5
        )
        values: dict[str, Any] = {
            # numpy has no integers of 128 bits: the digest is stored as its upper and lower half.
            DIGESTS: [(digest >> 64, digest & (2**64 - 1)) for digest in digests],
            SIDES: sides,
            TEXT_BYTES: sizes,
        }
        if self.near is not None and texts:
            values[BANDS] = minhash_bands_batch(texts, self.near)
        for column, rows in values.items():
            with self._raw(column).open("ab") as stream:
                stream.write(np.array(rows, dtype=self.columns[column]).tobytes())
        with (self.folder / NAMES).open("ab") as stream:
            stream.write(b"".join(orjson.dumps(name) + b"\n" for name in names))
        self.rows += len(self._waiting)
        self._waiting, self._characters = [], 0

    def finish(self) -> None:
        """Gives every column its header."""
        self.flush()
        for column, dtype in self.columns.items():
            shape = (self.rows, self.widths[column]) if column in self.widths else (self.rows,)
            raw = self._raw(column)
            # numpy cannot append to a .npy file, so the header is written at the end, when the
            # shape is known.
            np.save(
                self.folder / column,
                np.memmap(raw, dtype, "r", shape=shape) if self.rows else np.zeros(shape, dtype),
            )
            raw.unlink(missing_ok=True)

    def _raw(self, column: str) -> Path:
        return self.folder / f"{column}.raw"


def _tokenizer(task: Task) -> Tokenizer:
    return _cached_tokenizer(
        task.workspace,
        task.tokenizer_sha256,
        task.config.tokenizer.model_dump_json(include=set(TokenPolicy.model_fields)),
    )


def _encoder(task: Task) -> CheckedEncoder:
    return _cached_encoder(_tokenizer(task), task.engine)


@lru_cache(maxsize=1)
def _cached_tokenizer(workspace: str, sha256: str, policy: str) -> Tokenizer:
    content = (Path(workspace) / TOKENIZER).read_bytes()
    return Tokenizer(
        content, "the tokenizer of this build", TokenPolicy.model_validate_json(policy)
    )


@lru_cache(maxsize=1)
def _cached_encoder(tokenizer: Tokenizer, engine: str) -> CheckedEncoder:
    return CheckedEncoder(tokenizer, engine, CHECK_EVERY)
