"""Makes a data folder of shards of other programs, and checks that they are whole.

Finished shards survive a killed run, and the same command resumes. Files take their names at the
end, the manifest last: a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.convert_shard import ImportJob, ImportRecord, import_shard
from data_pipeline.preprocess.coordinator import BuildResult
from data_pipeline.preprocess.manifest_writer import tokenizer_entry
from data_pipeline.preprocess.megatron_split import parse_split, split_shard
from data_pipeline.preprocess.workspace import (
    Output,
    Workspace,
    begin_staging,
    finish_publishing,
    interruption_is_reported,
    no_space_is_told,
    publish,
    read_json,
    remove_unused,
)
from data_pipeline.shards.foreign import ForeignShard, open_foreign
from data_pipeline.shards.indexed import token_dtype
from data_pipeline.shards.manifest import (
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    canonical_sha256,
    load_manifest,
    verify,
)
from data_pipeline.shards.split import SPLITS, SplitName
from data_pipeline.tokenizer.config import ExistingTokenizer
from data_pipeline.tokenizer.configured import load_configured
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import ConfigError, DataError
from pretrain.core.files import only_writer, write_synced
from pretrain.core.progress import Stage

SOURCE = "all"
MANIFEST_TYPES: dict[np.dtype[Any], Literal["uint16", "int32"]] = {
    np.dtype("<u2"): "uint16",
    np.dtype("<i4"): "int32",
}


@dataclass(frozen=True)
class ImportResult(BuildResult):
    """A data folder of imported shards.

    Attributes:
        how: how many shards were linked, copied and converted.
        largest_id: of all tokens; None if the folder existed already.
        notes: what a user should know of, one sentence each.
    """

    how: dict[str, int] | None = None
    largest_id: int | None = None
    notes: tuple[str, ...] = ()


def import_shards(
    prefixes: Sequence[str],
    validation: Sequence[str],
    config: DataConfig,
    output: Output,
    fresh: bool = False,
    progress: bool = False,
    workers: int | None = None,
    split: str | None = None,
) -> ImportResult:
    """Make a data folder of existing shards, or find it complete.

    Args:
        prefixes, validation: shards of the training and of the validation split, see
            :func:`data_pipeline.shards.foreign.open_foreign`.
        config: ``tokenizer``, an existing one, and ``validation_share``: of the documents in
            ``prefixes``, by a hash of their token ids.
        fresh, progress: as of :func:`data_pipeline.preprocess.coordinator.build`.
        workers: shards that are read at the same time.
        split: Megatron's split of each shard, see
            :func:`data_pipeline.preprocess.megatron_split.parse_split`.

    Raises:
        ConfigError: for options that do not go together, and if the folder holds other data and
            ``fresh`` is false.
        DataError: for a shard that is damaged, of an unknown form, or not of this tokenizer.
        StorageError: if the disk is full.
    """
    tokenizer = _tokenizer_of(config, bool(validation))
    shares = _shares_of(split, bool(validation or config.validation_share))
    shards: dict[SplitName, list[ForeignShard]] = {
        "train": [open_foreign(prefix) for prefix in prefixes],
        "validation": [open_foreign(prefix) for prefix in validation],
    }
    _check_files(shards, output)
    is_new = not output.folder.exists()
    request = _request(tokenizer, config.validation_share, shares)
    identity = {"request_sha256": request, "inputs_sha256": _stamp(shards)}
    with (
        only_writer(output.folder, "choose another --output"),
        no_space_is_told(output.folder),
        ExitStack() as stack,
    ):
        stack.callback(remove_unused, output, is_new)
        stack.enter_context(interruption_is_reported(output))
        begin_staging(output.staging, request)
        # A run that was killed while it moved the files to their names has to do only that.
        if read_json(output.staging / "identity.json") == identity and finish_publishing(
            output.staging, output
        ):
            return ImportResult(output, load_manifest(output.path), reused=False)
        if output.manifest.exists() and not fresh:
            return ImportResult(output, _existing_manifest(output, identity), reused=True)
        workspace = Workspace(output.staging, identity)
        parts = shards if shares is None else _split(shards["train"], shares, tokenizer.eod_id)
        jobs = _jobs(parts, config.validation_share, tokenizer, output, workspace.folder / "shards")
        records = _run(jobs, min(workers or 4, len(jobs)), progress)
        if _stamp(shards) != identity["inputs_sha256"]:
            raise DataError(
                "the shards changed while they were read: run the same command again once they are"
                " at rest"
            )
        return _Import(jobs, records, tokenizer, output).publish(workspace, identity)


def _request(tokenizer: Tokenizer, share: float, shares: tuple[float, ...] | None) -> str:
    """The hash of what is asked for, apart from the shards."""
    return canonical_sha256(
        {
            "import": 1,
            "tokenizer": tokenizer.sha256,
            "special": [tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id],
            "share": share,
        }
        # Folders from before it are known without it.
        | ({} if shares is None else {"split": list(shares)})
    )


def _shares_of(split: str | None, holds_out: bool) -> tuple[float, ...] | None:
    if split is not None and holds_out:
        raise ConfigError(
            "--import-split says what is held out, and so do --import-validation and"
            " --validation-share: give one of them"
        )
    return None if split is None else parse_split(split)


def _split(
    shards: list[ForeignShard], shares: Sequence[float], eod_id: int | None
) -> dict[SplitName, list[ForeignShard]]:
    found = [split_shard(shard, shares, eod_id) for shard in shards]
    return {split: [part[split] for part in found if split in part] for split in SPLITS}


def _tokenizer_of(config: DataConfig, has_validation: bool) -> Tokenizer:
    if not isinstance(config.tokenizer, ExistingTokenizer):
        raise ConfigError(
            "--import-shards needs the tokenizer that the shards were made with: name it with"
            " --tokenizer PATH"
        )
    if has_validation and config.validation_share:
        raise ConfigError(
            "--validation-share and --import-validation both say what is held out: give one of them"
        )
    # Whether documents end with the end-of-document token is measured on the shards, so a
    # tokenizer without such a token must load as well.
    policy = {"append_eod": False, "prepend_bos": False}
    return load_configured(config.tokenizer.model_copy(update=policy))


def _existing_manifest(output: Output, identity: dict[str, str]) -> Manifest:
    manifest = load_manifest(output.path)
    found = {
        "request_sha256": manifest.request_sha256,
        "inputs_sha256": manifest.inputs_sha256,
    }
    if found != identity:
        raise ConfigError(
            f"{output.path} holds other data: choose another folder, or pass --fresh to replace it"
        )
    verify(manifest)
    return manifest


def _check_files(shards: dict[SplitName, list[ForeignShard]], output: Output) -> None:
    files = Counter(shard.path.resolve() for group in shards.values() for shard in group)
    if twice := next((path for path, count in files.items() if count > 1), None):
        raise ConfigError(
            f"{twice} is named twice: each shard is imported once; data.mixture can repeat a source"
        )
    if inside := next((path for path in files if path.parent == output.folder.resolve()), None):
        raise ConfigError(
            f"{inside} is in the folder that is to be written: choose another --output, so that"
            " nothing of yours is replaced"
        )
    if not sum(shard.num_tokens for shard in shards["train"]):
        raise DataError("the shards of --import-shards hold no token: name others")


def _stamp(shards: dict[SplitName, list[ForeignShard]]) -> str:
    """Return a checksum of the files' paths, sizes and times, as a change of any would show."""
    return canonical_sha256(
        {
            split: [
                [str(path.resolve()), (found := path.stat()).st_size, found.st_mtime_ns]
                for shard in group
                for path in shard.files
            ]
            for split, group in shards.items()
        }
    )


def _token_type(shards: list[ForeignShard], vocab_size: int) -> np.dtype[Any]:
    """Return the type that training reads and that most of the input already has.

    It must hold every id of the vocabulary; the less has to be converted, the better.
    """
    short, long = MANIFEST_TYPES
    sizes = {short: 0, long: 0}
    for shard in shards:
        same = long if shard.dtype == np.dtype("<u4") else shard.dtype
        if same in sizes:
            sizes[same] += shard.num_tokens * same.itemsize
    fits = (
        [short, long]
        if vocab_size <= 1 << 16 or all(shard.dtype.itemsize <= 2 for shard in shards)
        else [long]
    )
    best = max(fits, key=lambda dtype: sizes[dtype])
    return best if sizes[best] else token_dtype(vocab_size)


def _jobs(
    given: dict[SplitName, list[ForeignShard]],
    share: float,
    tokenizer: Tokenizer,
    output: Output,
    folder: Path,
) -> list[ImportJob]:
    dtype = _token_type(
        [shard for shards in given.values() for shard in shards], tokenizer.vocab_size
    )
    jobs: list[ImportJob] = []
    for split, shards in given.items():
        sides: list[SplitName] = list(SPLITS) if share else [split]
        for number, shard in enumerate(shards):
            names = {side: output.shard(side, SOURCE, number, len(shards), True) for side in sides}
            jobs.append(ImportJob(len(jobs), shard, names, share, tokenizer, dtype, folder))
    return jobs


def _run(jobs: list[ImportJob], workers: int, progress: bool) -> list[ImportRecord]:
    """The records of all jobs, in their order.

    Threads suffice: reading, checksums and numpy leave the interpreter's lock.
    """
    ended = threading.Event()
    total = sum(job.shard.num_tokens for job in jobs)
    with Stage("importing", progress, total, "token") as stage, ThreadPoolExecutor(workers) as pool:

        def advance(tokens: int) -> None:
            if ended.is_set():
                # Another shard has failed, or the user has had enough.
                raise InterruptedError
            stage.advance(tokens)

        futures = [pool.submit(import_shard, job, advance) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            # A thread cannot be cancelled: it stops at its next call of advance.
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class _Import:
    """Finished jobs with their records, of which the data folder is made."""

    def __init__(
        self,
        jobs: list[ImportJob],
        records: list[ImportRecord],
        tokenizer: Tokenizer,
        output: Output,
    ) -> None:
        self.jobs = jobs
        self.records = records
        self.tokenizer = tokenizer
        self.output = output
        self.splits = {split: entry for split in SPLITS if (entry := self._split_entry(split))}
        self.documents = sum(split.documents for split in self.splits.values())
        self.with_eod = sum(record.end_with_eod for record in records)
        self.with_bos = sum(record.begin_with_bos for record in records)

    def publish(self, workspace: Workspace, identity: dict[str, str]) -> ImportResult:
        """Write the manifest and move all files to their names."""
        manifest = self._manifest(identity)
        name = self.output.tokenizer(self.tokenizer.content)
        write_synced(workspace.folder / "shards" / name, self.tokenizer.content)
        names = [
            f"{entry.prefix}{ending}"
            for split in self.splits.values()
            for entry in split.shards
            for ending in (".bin", ".idx")
        ]
        publish(
            workspace.folder,
            self.output,
            [name, *names],
            (manifest.model_dump_json(indent=2, exclude_none=True) + "\n").encode(),
        )
        return ImportResult(
            self.output,
            manifest.at(self.output.folder),
            reused=False,
            how=dict(Counter(record.how for record in self.records)),
            largest_id=max(record.largest_id for record in self.records),
            notes=tuple(self._notes()),
        )

    def _split_entry(self, split: SplitName) -> SplitEntry | None:
        written = [
            ShardEntry.of(record.shards[split], job.names[split], SOURCE)
            for job, record in zip(self.jobs, self.records, strict=True)
            if split in record.shards
        ]
        entries = [entry for entry in written if entry.tokens]
        if written and not entries:
            raise DataError(
                f"no document falls into the {split} split: give another --validation-share, or"
                " name its shards with --import-validation"
            )
        if not entries:
            return None
        return SplitEntry(
            documents=sum(entry.documents for entry in entries),
            tokens=sum(entry.tokens for entry in entries),
            utf8_bytes=sum(record.utf8_bytes.get(split, 0) for record in self.records),
            shards=entries,
        )

    def _manifest(self, identity: dict[str, str]) -> Manifest:
        around = {
            "append_eod": self.with_eod == self.documents and self.tokenizer.eod_id is not None,
            "prepend_bos": self.with_bos == self.documents and self.tokenizer.bos_id is not None,
        }
        return Manifest(
            created_by="tools/preprocess_data.py --import-shards",
            **identity,
            dtype=MANIFEST_TYPES[self.jobs[0].dtype],
            tokenizer=tokenizer_entry(self.tokenizer, self.output).model_copy(update=around),
            sources={SOURCE: _source(self.splits, sum(record.empty for record in self.records))},
            splits=self.splits,
        )

    def _notes(self) -> Iterator[str]:
        """Yield what a user should know about the import, one sentence each."""
        for job in self.jobs:
            yield from job.shard.notes
        for job, record in zip(self.jobs, self.records, strict=True):
            if job.shard.ends is None:
                count = sum(shard.documents for shard in record.shards.values())
                yield (
                    f"{job.shard.prefix} has no index: it is taken as {job.shard.form}'s,"
                    f" {count:,} documents, cut at the token {self.tokenizer.eod_id}"
                )
        if empty := sum(record.empty for record in self.records):
            yield (
                f"{empty:,} documents without a token are left out: Megatron counts them, so that"
                " data.order=megatron gives another order than its own"
            )
        if self.tokenizer.eod_id is None:
            yield (
                "the tokenizer has no token that ends a document: each runs into the next one in"
                " training, unless data.document_mask is on"
            )
        elif self.with_eod != self.documents:
            yield (
                f"{self.with_eod:,} of {self.documents:,} documents end with the end-of-document"
                f" token {self.tokenizer.eod_id}: the others run into the next one in training,"
                " unless data.document_mask is on"
            )


def _source(splits: dict[SplitName, SplitEntry], empty: int) -> SourceEntry:
    """All imported shards as one source: what is known of them without their texts."""
    shards = [shard for split in splits.values() for shard in split.shards]
    documents = sum(shard.documents for shard in shards)
    return SourceEntry(
        kind="shards",
        sha256=hashlib.sha256(
            "".join(shard.bin_sha256 + shard.idx_sha256 for shard in shards).encode("ascii")
        ).hexdigest(),
        records=documents + empty,
        documents=documents,
        tokens=sum(shard.tokens for shard in shards),
        utf8_bytes=sum(split.utf8_bytes for split in splits.values()),
        share=1.0,
        left_out={"empty": empty} if empty else {},
    )
