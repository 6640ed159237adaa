"""Builds a data folder from sources.

Its phases: sample, tokenizer, encode every unit, remove duplicates, merge into shards, manifest.

All work is done on units, in any order and by any number of workers, and put together in the order
of the input: the same bytes come out. Finished units survive a killed run, and the same command
continues from them. Files take their names at the end, the manifest last: a folder with a manifest
is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.config import DataConfig
from data_pipeline.preprocess import manifest_writer
from data_pipeline.preprocess.bad_share import BadShares
from data_pipeline.preprocess.duplicates import UnitKeys, mark_duplicates
from data_pipeline.preprocess.engine import fit_engine
from data_pipeline.preprocess.exact_split import STAGE, check_exact_split, exact_split, place_unit
from data_pipeline.preprocess.incremental_merge import GrowingShards
from data_pipeline.preprocess.merge import ShardCutter, ShardPlan, ShardRecord, write_shard
from data_pipeline.preprocess.plan import (
    BuildPlan,
    open_sources,
    plan_build,
    plugins_sha256,
    request_sha256,
)
from data_pipeline.preprocess.pool import Pool, default_workers, local_pool
from data_pipeline.preprocess.reader import Task
from data_pipeline.preprocess.reuse import matching_manifest
from data_pipeline.preprocess.tokenizer_sample import sample_shares, stream_sample, train_tokenizer
from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.preprocess.units import collect, followed, is_usable, judged
from data_pipeline.preprocess.worker import (
    BANDS,
    DIGESTS,
    MARKS,
    TOKENIZER,
    Job,
    encode_unit,
    looks_for_duplicates,
    sample_unit,
    unit_folder,
)
from data_pipeline.preprocess.workspace import (
    RECORD,
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
from data_pipeline.shards.indexed import token_dtype
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.split import SPLITS, SplitPlan, plan_split
from data_pipeline.tokenizer.config import ExistingTokenizer, TrainedTokenizer
from data_pipeline.tokenizer.configured import check_kind, load_configured
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import DataError
from pretrain.core.files import only_writer, write_synced
from pretrain.core.progress import Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """A complete data folder; ``reused`` where it was there already, else encoded by ``engine``."""

    output: Output
    manifest: Manifest
    reused: bool
    engine: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of all files."""
        return self.output.folder


def build(
    config: DataConfig,
    output: Output,
    fresh: bool = False,
    progress: bool = False,
    workers: int | None = None,
    pool: Pool | None = None,
    engine: str | None = None,
) -> BuildResult:
    """Builds the data of ``config``, or finds it there.

    Args:
        config: sources, tokenizer, cleaning, split; ``path`` and what training does with the shards
            do not change the files.
        fresh: build even if there is data, and replace it once the new data is complete.
        progress: show progress bars on standard error.
        workers: processes; by default every core, or only this process if the input is small.
        pool: workers that are there already, such as the ranks of an MPI job.
        engine: the tokenizer library that encodes; by default the first, in the order of usual
            speed, whose ids are right on a sample.

    Raises:
        ConfigError: if other data is there and ``fresh`` is false, and for a kind of a plugin that
            does not do what its family asks for.
        DataError: for a source or a tokenizer that cannot be used, and for too many bad records.
        StorageError: if the disk is full.
        PeerLostError: if a worker was killed.
    """
    check_kind(config.tokenizer)
    given = None
    if isinstance(config.tokenizer, ExistingTokenizer):
        with Stage("loading the tokenizer", progress):
            given = load_configured(config.tokenizer)
    # Made for its checks: what is wrong with the section is reported before any work.
    Cleaner(config.cleaning)
    is_new = not output.folder.exists()
    with (
        only_writer(output.folder, "choose another --output"),
        no_space_is_told(output.folder),
        ExitStack() as stack,
    ):
        stack.callback(remove_unused, output, is_new)
        stack.enter_context(interruption_is_reported(output))
        begin_staging(output.staging, request_sha256(config, given))
        with Stage("listing the input", progress):
            plan = plan_build(config, given, open_sources(config, output.staging))
        identity = {"request_sha256": plan.request_sha256, "inputs_sha256": plan.inputs_sha256}
        # Only here, not in the request: finished data is reused whatever its plugins have become.
        if (code := plugins_sha256(config)) is not None:
            identity["plugins_sha256"] = code
        if read_json(output.staging / "identity.json") == identity and finish_publishing(
            output.staging, output
        ):
            return BuildResult(output, load_manifest(output.path), reused=False)
        if pool is None:
            pool = stack.enter_context(local_pool(workers or default_workers(plan.input_bytes)))
        if output.manifest.exists() and not fresh:
            return BuildResult(output, matching_manifest(output, plan, pool, progress), reused=True)
        workspace = Workspace(output.staging, identity)
        return Build(plan, output, workspace.folder, pool, progress).run(given, engine)


class Build:
    """One build, phase by phase."""

    def __init__(
        self, plan: BuildPlan, output: Output, workspace: Path, pool: Pool, progress: bool
    ) -> None:
        self.plan = plan
        self.output = output
        self.workspace = workspace
        self.pool = pool
        self.progress = progress
        self.config = plan.config
        self.task = Task(plan.config, str(workspace), SplitPlan(plan.config.validation_share))

    def run(self, given: Tokenizer | None, engine: str | None) -> BuildResult:
        """Run all phases and publish; without a tokenizer or an engine, train or choose one."""
        if self.config.validation_documents is not None:
            self.task = replace(self.task, split=self._exact_split())
        tokenizer = given or self._trained_tokenizer()
        write_synced(self.workspace / TOKENIZER, tokenizer.content)
        self.task = replace(
            self.task, tokenizer_sha256=tokenizer.sha256, engine=tokenizer.reference.engine
        )
        with Stage("choosing the engine", self.progress and engine is None, counts_documents=True):
            engine = engine or fit_engine(self.plan, self.task, self.pool)
        self.task = replace(self.task, engine=engine)
        dtype = token_dtype(tokenizer.vocab_size)
        limit = (
            None
            if self.config.max_shard_bytes is None
            else self.config.max_shard_bytes // dtype.itemsize
        )
        with GrowingShards(self.workspace, dtype, limit) as growing:
            records = self._encode(growing)
            self._check_at_rest()
            if looks_for_duplicates(self.config.cleaning):
                self._mark_duplicates(records)
            shards = self._merge(records, growing)
        manifest, names = manifest_writer.describe(
            self.plan, self.output, self.workspace, records, shards, tokenizer
        )
        check_exact_split(self.config, manifest)
        name = self.output.tokenizer(tokenizer.content)
        write_synced(self.workspace / "shards" / name, tokenizer.content)
        content = (manifest.model_dump_json(indent=2, exclude_none=True) + "\n").encode()
        publish(self.workspace, self.output, [name, *names], content)
        return BuildResult(
            self.output, manifest.at(self.output.folder), reused=False, engine=self.task.engine
        )

    def _trained_tokenizer(self) -> Tokenizer:
        """Sample the training split and train on it, or find what an earlier run has trained."""
        config = self.config.tokenizer
        assert isinstance(config, TrainedTokenizer)
        if self.config.streaming:
            shares, limits, numbers = stream_sample(self.plan, config)
            task = replace(self.task, sample_shares=shares, sample_limits=limits)
        else:
            shares, numbers = sample_shares(self.plan, config)
            task = replace(self.task, sample_shares=shares)
        records = self._run(sample_unit, "samples", task, numbers, "sampling")
        if len(numbers) == len(self.plan.units) and not self.config.streaming:
            self.task = replace(self.task, split=self._split_plan(records))
        trained = self.workspace / "trained"
        if not trained.exists():
            tokenizer = train_tokenizer(
                config, self.workspace, numbers, self.task.split, progress=self.progress
            )
            write_synced(trained, tokenizer.content)
        # Also just after the training: the recipe says how documents begin and end, as it does for
        # the workers and for a run that continues from here.
        return Tokenizer(trained.read_bytes(), "the trained tokenizer", config)

    def _encode(self, growing: GrowingShards) -> list[UnitRecord]:
        """Encode all units so that no split is empty, and return their records."""
        numbers = list(range(len(self.plan.units)))
        if self.config.streaming:
            return self._encode_held_out(numbers)
        # What is a duplicate is known when all units are. Over nodes, one may not see at once what
        # another has renamed. And if merging had begun, what it has finished stays.
        has_merged = any((self.workspace / "shards").glob("*.json"))
        follow = (
            growing.add
            if self.pool.is_local
            and not looks_for_duplicates(self.config.cleaning)
            and not has_merged
            else None
        )
        records = self._run(encode_unit, "units", self.task, numbers, "encoding", follow)
        split = self._split_plan(records)
        if split != self.task.split:
            growing.discard()
            self.task = replace(self.task, split=split)
            records = self._run(encode_unit, "units", self.task, numbers, "encoding")
        if sum(record.documents for record in records) == 0:
            reasons = (
                manifest_writer.total(record.bad for record in records)
                | manifest_writer.total(record.left_out for record in records)
                | manifest_writer.total(record.dropped for record in records)
            )
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            why = f": {counts}" if reasons else ""
            raise DataError(
                f"the source holds no document that is not empty{why}: give files with text in them"
            )
        return records

    def _encode_held_out(self, numbers: list[int]) -> list[UnitRecord]:
        """Encode units of each source until enough of its documents are held out."""
        records = []
        shares = BadShares(self.config.max_bad_share, self.plan.bytes_of_sources(numbers))
        chosen = self.config.held_out_sources
        for name in chosen:
            wanted = -(-self.config.streaming_validation_documents // len(chosen))
            for number in (it for it in numbers if self.plan.units[it].source == name):
                task = replace(self.task, held_out_only=wanted)
                [record] = self._run(
                    encode_unit, "units", task, [number], "reading the stream", shares=shares
                )
                records.append(record)
                wanted -= record.splits["validation"].documents
                if wanted <= 0:
                    break
        shares.check()
        if not sum(record.splits["validation"].documents for record in records):
            raise DataError(
                "no document of the stream is held out for validation: raise data.validation_share"
            )
        return records

    def _check_at_rest(self) -> None:
        """Raise if an input file has changed since the start.

        Units of the old and of the new content would not fit together.
        """
        if (
            plan_build(self.config, None, open_sources(self.config, self.workspace)).inputs_sha256
            != self.plan.inputs_sha256
        ):
            raise DataError(
                "the source files changed while they were read: run the same command again once"
                " they are at rest"
            )

    def _exact_split(self) -> SplitPlan:
        """Read the input for the places of its documents, and return the split of so many."""
        numbers = list(range(len(self.plan.units)))
        self._run(place_unit, STAGE, self.task, numbers, "counting documents")
        return exact_split(self.workspace, numbers, self.config)

    def _split_plan(self, records: list[UnitRecord]) -> SplitPlan:
        config = self.config
        if config.validation_documents is not None:
            return self.task.split
        hashed = sum(record.hashed for record in records)
        places = (
            place
            for record in records
            for place in (record.lowest, record.highest)
            if place is not None
        )
        fixed = any(source.split == "validation" for source in config.named_sources.values())
        split = (
            SplitPlan(config.validation_share)
            if fixed
            else plan_split(config.validation_share, config.split_by, hashed, places)
        )
        notice = split.notice(config.split_by)
        # If the plans are equal, the sample has shown the notice already.
        if notice is not None and split != self.task.split:
            logger.warning("%s", notice)
        return split

    def _run(
        self,
        function: Callable[[Job], UnitRecord],
        stage: str,
        task: Task,
        numbers: list[int],
        title: str,
        follow: Callable[[UnitRecord], None] | None = None,
        shares: BadShares | None = None,
    ) -> list[UnitRecord]:
        """Run a phase over units, except those that an earlier run has finished alike.

        ``follow`` is called with the record of each unit as soon as those of all units before it
        are there, unless all were there already. ``shares`` of a stage in several calls are checked
        by the caller.

        Raises:
            DataError: if more of a source is bad than allowed.
        """
        counted = shares or BadShares(
            self.config.max_bad_share, self.plan.bytes_of_sources(numbers)
        )
        records: dict[int, UnitRecord] = {}
        for number in numbers:
            folder = unit_folder(self.workspace, stage, number)
            found = UnitRecord.read(folder / RECORD)
            if found is not None and is_usable(found, folder, task):
                records[number] = found
            else:
                shutil.rmtree(folder, ignore_errors=True)
        if records:
            logger.info("%s: %d of %d units are there already", title, len(records), len(numbers))
        jobs = [
            (task, number, self.plan.units[number]) for number in numbers if number not in records
        ]
        for record in records.values():
            counted.add(record)
        results = judged(self.pool.run(function, jobs), counted)
        if follow is not None and jobs:
            results = followed(results, numbers, dict(records), follow)
        for record in collect(results, self.plan, title, self.progress, list(records.values())):
            records[record.unit] = record
        if shares is None:
            counted.check()
        return [records[number] for number in numbers]

    def _mark_duplicates(self, records: list[UnitRecord]) -> None:
        cleaning = self.config.cleaning
        near = cleaning.near_duplicates is not None
        keys = []
        for record in records:
            folder = unit_folder(self.workspace, "units", record.unit)
            keys.append(
                UnitKeys(folder / DIGESTS, folder / BANDS if near else None, folder / MARKS)
            )
        scratch = self.workspace / "attempts"
        with Stage("finding duplicates", self.progress, unit="step") as stage:

            def advance(done: int, total: int) -> None:
                stage.total = total
                stage.advance(done - stage.done)

            mark_duplicates(keys, scratch, cleaning.exact_duplicates, near, progress=advance)

    def _merge(self, records: list[UnitRecord], growing: GrowingShards) -> list[ShardRecord]:
        """Write all shards that are not written yet, and return the records of all in order."""
        names = list(self.config.named_sources)
        plans = []
        taken = {}
        for split in SPLITS:
            for name in names:
                cutter = ShardCutter(self.workspace, split, growing.max_tokens)
                for record in records:
                    if record.source == name:
                        cutter.add(record.unit, record.splits[split].tokens)
                for number, pieces in enumerate(cutter.shards):
                    shard = self.output.shard(
                        split, name, number, len(cutter.shards), len(names) == 1
                    )
                    plans.append(
                        ShardPlan(
                            shard, split, name, pieces, growing.dtype.name, str(self.workspace)
                        )
                    )
                    if number == 0 and not growing.is_empty:
                        taken[shard] = growing.take(plans[-1])
        written: dict[str, ShardRecord] = {}
        with Stage("merging", self.progress, len(plans), "shard") as stage:

            def write(missing: list[ShardPlan]) -> None:
                for record in self.pool.run(write_shard, missing):
                    written[record.entry.prefix] = record
                    stage.advance(1)

            # Meanwhile the thread completes the shards that it has written.
            write([plan for plan in plans if plan.name not in taken])
            for name, grown in taken.items():
                if (result := grown.result()) is not None:
                    written[name] = result
                    stage.advance(1)
            write([plan for plan in plans if plan.name not in written])
        return [written[plan.name] for plan in plans]
