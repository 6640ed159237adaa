"""One lane of a source as an endless stream of windows, cleaned and encoded while it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data_pipeline.loading.batch import NO_LOSS, Documents, Sample
from data_pipeline.loading.document_encoder import DocumentEncoder
from data_pipeline.loading.document_groups import (
    GroupsAhead,
    LaneDocuments,
    Origin,
    Start,
    StreamedSource,
    Text,
)
from pretrain.core.errors import CheckpointError

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20


class Place(NamedTuple):
    """A token of a lane's endless stream, each part of the position from 0.

    Attributes:
        epoch, unit, record: where the group begins that the token is in, see
            :class:`~data_pipeline.loading.document_groups.Start`.
        document: of the group, in the order of training.
        token: of the document.
    """

    epoch: int = 0
    unit: int = 0
    record: int = 0
    document: int = 0
    token: int = 0

    @property
    def start(self) -> Start:
        """The beginning of the token's group."""
        return Start(self.epoch, self.unit, self.record)


class Encoded(NamedTuple):
    """A document's tokens from ``place`` on."""

    place: Place
    origin: Origin
    tokens: np.ndarray

    def after(self, count: int) -> Encoded:
        """The same without its first ``count`` tokens."""
        place = self.place._replace(token=self.place.token + count)
        return Encoded(place, self.origin, self.tokens[count:])


class Window(NamedTuple):
    """A sequence, and the documents that its tokens are of."""

    sample: Sample
    origins: list[Origin]


class SourceStream:
    """Windows of one lane of a source.

    Args:
        lane: its documents.
        encoder: of the source, for the thread that asks for windows.
        sequence_length: tokens of a window.
        document_mask: no loss is taken on the first token of a document.
        pool: threads that read ahead.

    Attributes:
        place: of the next window's first token.
    """

    def __init__(
        self,
        lane: LaneDocuments,
        encoder: DocumentEncoder,
        sequence_length: int,
        document_mask: bool,
        pool: Executor,
    ) -> None:
        self.lane = lane
        self.encoder = encoder
        self.length = sequence_length
        self.document_mask = document_mask
        self._pool = pool
        self._set(Place())

    def go_to(self, place: Place) -> None:
        """Continue from ``place``: its group is read again, when the next window is asked for.

        Raises:
            CheckpointError: if the lane has no such unit.
        """
        self.close()
        if place.unit and place.unit >= len(self.lane.units(place.epoch)):
            raise self._no_such_place(place)
        self._set(place)

    def _set(self, place: Place) -> None:
        self.place = place
        self._ahead = GroupsAhead(self.lane.groups(place.start), self._pool)
        self._documents = self._encoded(self._ahead, place)
        self._buffer: deque[Encoded] = deque()

    def begin(self) -> None:
        """Begin to read in the background."""
        self._ahead.begin()

    def close(self) -> None:
        """Stop reading in the background."""
        self._ahead.close()

    def next_window(self) -> Window:
        """The next S inputs with one target each."""
        length = self.length
        held = sum(len(document.tokens) for document in self._buffer)
        # One token more than the window: the target of its last input.
        while held <= length:
            self._buffer.append(next(self._documents))
            held += len(self._buffer[-1].tokens)
        # Of a document that is longer than a window, only what the window needs is copied.
        heads = [document.tokens[: length + 1] for document in self._buffer]
        tokens = np.concatenate(heads)[: length + 1]
        ends = np.cumsum([len(document.tokens) for document in self._buffer])
        inputs = tokens[:-1]
        # A copy, because inputs and labels are views of one array and the mask writes to the
        # labels.
        labels = tokens[1:].copy()
        documents = None
        if self.document_mask:
            # The input before an end has the next document's first token as its target.
            labels[ends[ends <= length] - 1] = NO_LOSS
            documents = np.searchsorted(ends, np.arange(length), side="right")
        origins = [document.origin for document in self._buffer]
        self._advance(length)
        return Window(Sample(inputs, labels, documents), origins)

    def _advance(self, count: int) -> None:
        while count >= len(self._buffer[0].tokens):
            count -= len(self._buffer.popleft().tokens)
        self._buffer[0] = self._buffer[0].after(count)
        self.place = self._buffer[0].place

    def _encoded(self, groups: GroupsAhead, start: Place) -> Iterator[Encoded]:
        """The documents' tokens from a place on, without end."""
        is_first = start != Place()
        while True:
            group = groups.take()
            skipped = 0
            if is_first:
                skipped = start.document
                if group.start != start.start or skipped >= len(group.texts):
                    raise self._no_such_place(start)
            numbered = list(enumerate(group.texts))[skipped:]
            for batch in _batches(numbered):
                encoded = self.encoder.encode([text for _, text in batch])
                for (number, text), tokens in zip(batch, encoded, strict=True):
                    document = Encoded(Place(*group.start, number), text.origin, tokens)
                    if is_first:
                        is_first = False
                        if start.token and start.token >= len(tokens):
                            raise self._no_such_place(start)
                        document = document.after(start.token)
                    if len(document.tokens):
                        yield document

    def _no_such_place(self, place: Place) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint's position in the source '{self.lane.source.name}' is not one "
            f"({', '.join(f'{name} {value}' for name, value in place._asdict().items())}); the "
            "checkpoint is damaged, choose another step_N folder"
        )


def _batches(texts: list[tuple[int, Text]]) -> Iterator[list[tuple[int, Text]]]:
    """Cut documents into batches that are encoded at once."""
    batch: list[tuple[int, Text]] = []
    characters = 0
    for numbered in texts:
        batch.append(numbered)
        characters += len(numbered[1].content)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def documents_of(source: StreamedSource, origins: list[Origin]) -> list[Documents]:
    """Where a window's documents are, neighbours of one unit together."""
    cuts = [
        number
        for number, (one, other) in enumerate(pairwise(origins), 1)
        if other != one._replace(record=one.record + 1)
    ]
    found = []
    for first, end in pairwise([0, *cuts, len(origins)]):
        unit = source.units[origins[first].unit]
        found.append(
            Documents(", ".join(unit.files), origins[first].record, origins[end - 1].record)
        )
    return found
