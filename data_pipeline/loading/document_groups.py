"""The documents of one lane of a source: cleaned, and shuffled in groups.

A group is a number of documents that follow each other in the lane. Its order is a function of the
seed and of where it begins, so a position needs no texts and no state of a random generator: to
continue inside a group, it is read again, and nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, wait
from threading import Lock
from typing import NamedTuple

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.loading.lanes import units_of_lane
from data_pipeline.loading.shuffle import permute
from data_pipeline.preprocess.bad_share import BadShares
from data_pipeline.preprocess.reader import Reader, Task
from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.manifest import canonical_sha256
from data_pipeline.shards.split import SplitPlan
from data_pipeline.sources.interface import ReadContext, Unit, open_source
from pretrain.core.errors import DataError
from pretrain.core.seeds import derived_seed

# A unit of files on this machine.
UNIT_BYTES = 16 << 20
# Documents of a group that is not shuffled.
PLAIN_DOCUMENTS = 256
# Characters of the groups of all lanes together, after which groups end early.
GROUP_CHARACTERS = 64 << 20
FINGERPRINTED_FIELDS = {
    "cleaning",
    "fill_in_the_middle",
    "validation_share",
    "split_by",
    "split_root",
    "max_record_bytes",
    "streaming_lanes",
    "shuffle_buffer_documents",
}

# A place in a document is a token, so what makes its tokens belongs to it.
POLICY_FIELDS = {"append_eod", "prepend_bos", "parse_special_tokens", "eod_token", "bos_token"}


class Origin(NamedTuple):
    """Where a document came from: the number of its unit, and of its record in that, from 0."""

    unit: int
    record: int


class Text(NamedTuple):
    """A document before it is encoded, and the digest of its text."""

    origin: Origin
    content: str
    digest: int


class Start(NamedTuple):
    """Where a group begins.

    Attributes:
        epoch: pass through the source.
        unit: number among the lane's units in the epoch's order.
        record: of the unit, of the group's first document.
    """

    epoch: int
    unit: int
    record: int


class Group(NamedTuple):
    """Documents in the order of training."""

    start: Start
    texts: list[Text]


class StreamedSource:
    """What all lanes of a source share: its units, and how they are read.

    Args:
        data: how documents are read and cleaned.
        name: of the source.
        datasets: the data folder that holds the tokenizer.
        seed: of the run.

    Attributes:
        units: in the source's order.
        fingerprint: of the list of units and of how they are read; it changes when a file does.
        group_documents: of all lanes together that are shuffled at a time.

    Raises:
        DataError: if the source has nothing to read.
    """

    def __init__(self, data: DataConfig, name: str, datasets: Datasets, seed: int) -> None:
        self.name = name
        self.task = Task(data, str(datasets.first.folder), SplitPlan(data.validation_share))
        # Beside sources that are held out as a whole nothing else is.
        self.held_out_share = data.validation_share if name in data.held_out_sources else 0.0
        self.group_documents = data.shuffle_buffer_documents
        self.seed = f"{seed} {name}" if self.group_documents else None
        section = data.named_sources[name]
        # One object for all lanes: a hub's list of files is asked for once.
        self.source = open_source(section, ReadContext.of(data, name))
        self.units: list[Unit] = self.source.units(UNIT_BYTES)
        self.fingerprint = canonical_sha256(
            {
                "units": [
                    [list(unit.files), unit.start, unit.end, unit.stamp] for unit in self.units
                ],
                "source": section.model_dump(mode="json", exclude=set(section.fetching)),
                "policy": data.tokenizer.model_dump(mode="json", include=POLICY_FIELDS),
                **data.model_dump(mode="json", include=FINGERPRINTED_FIELDS),
            }
        )

    def size(self, units: list[int], parts: int) -> int:
        """About the bytes of parts of units, by their numbers among all parts."""
        count = len(self.units)
        return sum(self.units[unit % count].size for unit in units) // parts


class PassShares:
    """Limits how much of a source's passes is bad, over all lanes of a rank.

    A pass that a lane began in the middle says nothing about the whole source, and is not judged
    at its end.

    Args:
        own: the lanes of this rank.
        lanes: of all ranks.
        parts: of each unit.
    """

    def __init__(self, source: StreamedSource, own: list[int], lanes: int, parts: int) -> None:
        self._source = source
        self._own = own
        self._lanes = lanes
        self._parts = parts
        self._lock = Lock()
        self._passes: dict[int, BadShares] = {}
        self._ended: dict[int, int] = {}

    def add(self, epoch: int, record: UnitRecord) -> None:
        """Count what was read of a unit.

        Raises:
            DataError: if more of the source is bad than allowed.
        """
        with self._lock:
            self._pass(epoch).add(record)

    def _pass(self, epoch: int) -> BadShares:
        if epoch not in self._passes:
            source, allowed = self._source, self._source.task.config.max_bad_share
            units = len(source.units) * self._parts
            size = sum(
                source.size(
                    units_of_lane(units, lane, self._lanes, epoch, source.seed), self._parts
                )
                for lane in self._own
            )
            # One damaged file among the few of this rank is not yet a bad source: the share is of
            # as many files as one of them may be damaged of.
            average = sum(unit.size for unit in source.units) / len(source.units)
            size = max(size, int(average / allowed) + 1 if allowed else 0)
            self._passes[epoch] = BadShares(allowed, {source.name: size})
        return self._passes[epoch]

    def end(self, epoch: int, is_whole: bool) -> None:
        """Note that a lane has ended a pass.

        Raises:
            DataError: if all lanes have, and more of the source is bad than allowed.
        """
        with self._lock:
            self._ended[epoch] = self._ended.get(epoch, 0) + is_whole
            if self._ended[epoch] == len(self._own) and epoch in self._passes:
                self._passes.pop(epoch).check()


class LaneDocuments:
    """The training documents of one lane, without end, in groups.

    Args:
        source: shared by all lanes.
        lane: from 0.
        lanes: their number.
        parts: of each unit, see :func:`data_pipeline.loading.lanes.choose_parts`.
        shares: shared by the lanes of this rank.
    """

    def __init__(
        self, source: StreamedSource, lane: int, lanes: int, parts: int, shares: PassShares
    ) -> None:
        self.source = source
        self.lane = lane
        self.lanes = lanes
        self.parts = parts
        self.shares = shares
        self.reading = "nothing yet"
        self._limit = -(-source.group_documents // lanes) or PLAIN_DOCUMENTS
        self._characters = max(GROUP_CHARACTERS // lanes, 1 << 20)

    def units(self, epoch: int) -> list[int]:
        """Numbers of the lane's units in an epoch, among all parts of all units."""
        source = self.source
        return units_of_lane(
            len(source.units) * self.parts, self.lane, self.lanes, epoch, source.seed
        )

    def groups(self, start: Start) -> Iterator[Group]:
        """The groups from one that begins at ``start`` on, without end.

        Raises:
            DataError: if there is no document at all, or more of the source is bad than allowed.
        """
        empty_passes = 0
        while True:
            found = False
            for group in self._pass(start):
                found = True
                yield group
            # Other passes have other units, so a pass without a document may be an accident.
            empty_passes = 0 if found else empty_passes + 1
            if empty_passes >= self.lanes:
                raise DataError(
                    f"the source '{self.source.name}' has no document to train on: give it more, "
                    "or lower data.validation_share"
                )
            start = Start(start.epoch + 1, 0, 0)

    def _pass(self, start: Start) -> Iterator[Group]:
        """The groups of an epoch; none of them reaches into the next one."""
        source, epoch, units = self.source, start.epoch, self.units(start.epoch)
        first = start.record
        texts: list[Text] = []
        characters = 0
        begin = start
        for number in range(start.unit, len(units)):
            part, unit = divmod(units[number], len(source.units))
            self.reading = source.units[unit].files[0]
            reader = Reader(
                source.task,
                unit,
                source.units[unit],
                None,
                first=first,
                part=(part, self.parts),
                source=source.source,
            )
            for document, digest, place in reader.documents_with_split():
                if place < source.held_out_share:
                    continue
                if len(texts) == self._limit or characters >= self._characters:
                    yield self._shuffled(begin, texts)
                    texts, characters = [], 0
                if not texts:
                    begin = Start(epoch, number, reader.record_number)
                texts.append(Text(Origin(unit, reader.record_number), document.text, digest))
                characters += len(document.text)
            self.shares.add(epoch, reader.record())
            first = 0
        if texts:
            yield self._shuffled(begin, texts)
        self.shares.end(epoch, is_whole=start[1:] == (0, 0))

    def _shuffled(self, start: Start, texts: list[Text]) -> Group:
        if self.source.seed is None:
            return Group(start, texts)
        seed = derived_seed(f"{self.source.seed} lane {self.lane} {start.unit} {start.record}")
        order = permute(np.arange(len(texts)), len(texts), seed, start.epoch)
        return Group(start, [texts[number] for number in order.tolist()])


class GroupsAhead:
    """A lane's groups, each read in the background while the one before it is in use."""

    def __init__(self, groups: Iterator[Group], pool: Executor) -> None:
        self._groups = groups
        self._pool = pool
        self._next: Future[Group] | None = None

    def begin(self) -> None:
        """Begin to read the next group, if that is not being done."""
        if self._next is None:
            self._next = self._pool.submit(next, self._groups)

    def take(self) -> Group:
        """The next group, waiting for it."""
        self.begin()
        assert self._next is not None
        group = self._next.result()
        self._next = None
        self.begin()
        return group

    def close(self) -> None:
        """Stop reading."""
        if self._next is not None and not self._next.cancel():
            wait([self._next])
