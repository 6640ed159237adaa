"""The records of units as workers hand them in: passed on in order, added up for the progress bar, and trusted by a later run or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash
from tqdm import tqdm

from data_pipeline.build import finish
from data_pipeline.build.plan import BuildPlan
from data_pipeline.build.reader import Task
from data_pipeline.build.worker import Record, boot_id, unit_plan
from pretrain.config.errors import DataError

# Records after which a share of bad ones means something.
BAD_SHARE_FROM = 10_000


def followed(results: Iterator[Record], numbers: list[int], known: dict[int, Record], follow: Callable[[Record], None]) -> Iterator[Record]:
    """Passes results on as they come, and calls ``follow`` with the known ones and with them in the order of ``numbers``."""
    waiting = iter(numbers)
    number = next(waiting, None)
    for result in itertools.chain([None], results):
        if result is not None:
            known[result["unit"]] = result
            yield result
        while number in known:
            follow(known[number])
            number = next(waiting, None)


def collect(results: Iterator[Record], plan: BuildPlan, title: str, progress: bool, earlier: Sequence[Record] = ()) -> list[Record]:
    """The records of units as they come, with a progress bar.

    Raises:
        DataError: as soon as too many records are bad; of the first few, before the end, any share is let pass.
    """
    records: list[Record] = []
    read = bad = tokens = 0
    with tqdm(total=plan.input_bytes, desc=title, unit="B", unit_scale=True, unit_divisor=1000, disable=not progress) as bar:
        for number, record in enumerate(itertools.chain(earlier, results)):
            records.append(record)
            read += record["records"]
            bad += sum(record["bad"].values())
            if number >= len(earlier):
                tokens += sum(split["tokens"] for split in record.get("splits", {}).values())
            bar.set_postfix_str(f"{tokens / (bar.format_dict['elapsed'] or 1.0) / 1e6:.2f}M tokens/s" if tokens else "", refresh=False)
            bar.update(plan.units[record["unit"]].size)
            if read >= BAD_SHARE_FROM and bad > plan.config.max_bad_share * read:
                break
    if bad > plan.config.max_bad_share * read:
        reasons = ", ".join(f"{count} {reason}" for reason, count in finish.total(records, "bad").most_common())
        raise DataError(
            f"{bad} of {read} records are bad ({reasons}), more than --max-bad-share {plan.config.max_bad_share:g} allows: "
            "mend the input, or raise the share"
        )
    return records


def is_usable(record: Record, folder: Path, task: Task) -> bool:
    """Whether a unit that an earlier run has finished can stay: encoded with the same split, and surely on disk."""
    if record["plan"] != unit_plan(task):
        return False
    if record["boot"] == boot_id():
        return True
    # What a process has written survives its end, but not a power cut: after a restart of the machine the parts are read.
    return all((folder / name).is_file() and _fast_checksum(folder / name) == checksum for name, checksum in record["checksums"].items())


def _fast_checksum(path: Path) -> str:
    """XXH3 of a file, as scratch shards carry it."""
    checksum = xxhash.xxh3_128()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 22), b""):
            checksum.update(block)
    return checksum.hexdigest()
