"""The records of units as workers return them: ordered, counted, and reused by a later run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash

from data_pipeline.preprocess.bad_share import BadShares
from data_pipeline.preprocess.plan import BuildPlan
from data_pipeline.preprocess.reader import Task
from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.preprocess.worker import boot_id, unit_plan
from pretrain.core.progress import Stage


def followed(
    results: Iterator[UnitRecord],
    numbers: list[int],
    known: dict[int, UnitRecord],
    follow: Callable[[UnitRecord], None],
) -> Iterator[UnitRecord]:
    """Pass results on as they come, and call ``follow`` with all records in order.

    The order is that of ``numbers``; ``known`` has the records that are not among the results.
    """
    waiting = iter(numbers)
    number = next(waiting, None)
    for result in itertools.chain([None], results):
        if result is not None:
            known[result.unit] = result
            yield result
        while number in known:
            follow(known[number])
            number = next(waiting, None)


def collect(
    results: Iterator[UnitRecord],
    plan: BuildPlan,
    title: str,
    progress: bool,
    earlier: Sequence[UnitRecord] = (),
) -> list[UnitRecord]:
    """The records of units as they come, with a progress bar."""
    records: list[UnitRecord] = []
    done = sum(plan.units[record.unit].size for record in earlier)
    with Stage(title, progress, plan.input_bytes, "B", done, counts_documents=True) as stage:
        for number, record in enumerate(itertools.chain(earlier, results)):
            records.append(record)
            if number >= len(earlier):
                stage.advance(plan.units[record.unit].size)
    return records


def judged(results: Iterator[UnitRecord], shares: BadShares) -> Iterator[UnitRecord]:
    """Passes results on as they come.

    Raises:
        DataError: as soon as more of a source is lost than allowed.
    """
    for record in results:
        shares.add(record)
        yield record


def is_usable(record: UnitRecord, folder: Path, task: Task) -> bool:
    """Whether a unit that an earlier run has finished can stay.

    It must be encoded for the same plan, and surely be on disk.
    """
    if record.plan != unit_plan(task):
        return False
    if record.boot == boot_id():
        return True
    # What a process has written survives its end, but not a power cut: after a restart of the
    # machine the parts are read.
    return all(
        (folder / name).is_file() and _fast_checksum(folder / name) == checksum
        for name, checksum in record.checksums.items()
    )


def _fast_checksum(path: Path) -> str:
    """XXH3 of a file, as scratch shards carry it."""
    checksum = xxhash.xxh3_128()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 22), b""):
            checksum.update(block)
    return checksum.hexdigest()
