"""One source as an endless stream of windows, cleaned and encoded while it is read.

The documents come in their order, without those that are held out, again and again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.loading.batch import NO_LOSS, Documents, Sample
from data_pipeline.preprocess.bad_share import BadShares
from data_pipeline.preprocess.reader import Reader, Task
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.manifest import canonical_sha256
from data_pipeline.shards.split import SplitPlan
from data_pipeline.sources.interface import ReadContext, Unit, open_source
from data_pipeline.tokenizer.engine_choice import CheckedEncoder, choose_engine
from data_pipeline.tokenizer.fill_in_the_middle import FillInTheMiddleTransform
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.core.errors import DataError

# What a resumed run reads again of each source, at most.
UNIT_BYTES = 16 << 20
# The last document of a unit: its number is unknown until the unit is read to its end.
LAST_DOCUMENT = -1
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
FINGERPRINTED_FIELDS = {
    "cleaning",
    "fill_in_the_middle",
    "validation_share",
    "split_by",
    "split_root",
    "max_record_bytes",
}

# Choosing an engine takes seconds: once a process for each tokenizer, by its checksum and policy.
_chosen: dict[tuple[str, bool], str] = {}


class Place(NamedTuple):
    """A token of a source's endless stream, each part of the position from 0.

    Attributes:
        epoch: pass through the source.
        unit: of the source.
        document: of the unit.
        token: of the document.
    """

    epoch: int = 0
    unit: int = 0
    document: int = 0
    token: int = 0


class Text(NamedTuple):
    """A document before it is encoded, and the digest of its text."""

    place: Place
    content: str
    digest: int


class Encoded(NamedTuple):
    """A document's tokens from ``place`` on."""

    place: Place
    tokens: np.ndarray

    def after(self, count: int) -> Encoded:
        """The same without its first ``count`` tokens."""
        return Encoded(self.place._replace(token=self.place.token + count), self.tokens[count:])


class SourceStream:
    """Windows of one source's documents.

    Args:
        data: how documents are read, cleaned and encoded.
        name: of the source.
        datasets: the data folder that holds the tokenizer.
        sequence_length: tokens of a window.

    Attributes:
        fingerprint: of the list of its units and of how they are read; it changes when a file does.
        place: of the next window's first token.

    Raises:
        DataError: if the source has nothing to read.
    """

    def __init__(
        self, data: DataConfig, name: str, datasets: Datasets, sequence_length: int
    ) -> None:
        self.name = name
        self.length = sequence_length
        self.document_mask = data.document_mask
        self.tokenizer = load_tokenizer(datasets.tokenizer_path, data.tokenizer)
        self._encoder: CheckedEncoder | None = None
        self._task = Task(data, str(datasets.first.folder), SplitPlan(data.validation_share))
        section = data.named_sources[name]
        self._units: list[Unit] = open_source(section, ReadContext.of(data, name)).units(UNIT_BYTES)
        self.fingerprint = canonical_sha256(
            {
                "units": [
                    [list(unit.files), unit.start, unit.end, unit.stamp] for unit in self._units
                ],
                "source": section.model_dump(mode="json"),
                **data.model_dump(mode="json", include=FINGERPRINTED_FIELDS),
            }
        )
        self._transform: FillInTheMiddleTransform | None = None
        middle = data.fill_in_the_middle
        if middle is not None and (middle.sources is None or name in middle.sources):
            self._transform = FillInTheMiddleTransform(middle, self.tokenizer.token_id)
        self.go_to(Place())

    def go_to(self, place: Place) -> None:
        """Continue from ``place``: its unit is read again up to its document."""
        self.place = place
        self._documents = self._encoded(place)
        self._buffer: deque[Encoded] = deque()

    def documents(self, first: Place, last: Place) -> list[Documents]:
        """The documents from the one of ``first`` to that of ``last``, an entry for each unit."""
        first_place = ", ".join(self._units[first.unit].files)
        if first[:2] == last[:2]:
            return [Documents(first_place, first.document, last.document)]
        return [
            Documents(first_place, first.document, LAST_DOCUMENT),
            Documents(", ".join(self._units[last.unit].files), 0, last.document),
        ]

    def next_window(self) -> Sample:
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
        self._advance(length)
        return Sample(inputs, labels, documents)

    def _advance(self, count: int) -> None:
        while count >= len(self._buffer[0].tokens):
            count -= len(self._buffer.popleft().tokens)
        self._buffer[0] = self._buffer[0].after(count)
        self.place = self._buffer[0].place

    def _encoded(self, start: Place) -> Iterator[Encoded]:
        """The documents' tokens from a place on, without end."""
        batch: list[Text] = []
        characters = 0
        for text in self._texts(start):
            batch.append(text)
            characters += len(text.content)
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                for encoded in self._encode(batch):
                    is_start = encoded.place == start._replace(token=0)
                    yield encoded.after(start.token) if is_start else encoded
                batch = []
                characters = 0

    def _encode(self, batch: list[Text]) -> Iterator[Encoded]:
        documents = [self._segments(text) for text in batch]
        pieces = [
            (piece, text)
            for text, document in zip(batch, documents, strict=True)
            for piece in document
            if isinstance(piece, str)
        ]
        ids, offsets = self._open_encoder(batch).encode_flat(
            [piece for piece, _ in pieces],
            [text.digest for _, text in pieces],
            [f"{self.name} {text.place}" for _, text in pieces],
        )
        # ``offsets`` begins with 0 and ends with the number of ids, which are no cuts.
        encoded = iter(np.split(ids.astype(np.int64), offsets[1:-1]))
        for text, document in zip(batch, documents, strict=True):
            parts = [
                next(encoded) if isinstance(piece, str) else np.array([piece]) for piece in document
            ]
            tokens = np.concatenate(parts)
            if len(tokens):
                yield Encoded(text.place, tokens)

    def _segments(self, text: Text) -> list[str | int]:
        """A document as texts to encode, and literal token ids around and between them.

        Texts are cut if the tokenizer allows it, so that a long one is encoded on all cores.
        """
        tokenizer = self.tokenizer
        segments: list[str | int] = []
        if tokenizer.prepend_bos and tokenizer.bos_id is not None:
            segments.append(tokenizer.bos_id)
        transformed = (
            self._transform.split(text.content, text.digest, 0) if self._transform else None
        )
        for part in transformed or [text.content]:
            segments += [part] if isinstance(part, int) else tokenizer.pieces(part)
        if tokenizer.append_eod and tokenizer.eod_id is not None:
            segments.append(tokenizer.eod_id)
        return segments

    def _open_encoder(self, batch: list[Text]) -> CheckedEncoder:
        """The encoder, chosen by the first batch: it is a sample of what is to come."""
        if self._encoder is None:
            key = self.tokenizer.sha256, self.tokenizer.parse_special_tokens
            if key not in _chosen:
                sample = [text.content for text in batch]
                _chosen[key] = choose_engine(self.tokenizer, sample).name
            self._encoder = CheckedEncoder(self.tokenizer, _chosen[key])
        return self._encoder

    def _texts(self, start: Place) -> Iterator[Text]:
        """The training documents from a place on, without end.

        Raises:
            DataError: if there is none, or more of the source is bad than allowed.
        """
        place = start._replace(token=0)
        found = start != Place()
        size = sum(unit.size for unit in self._units)
        while True:
            shares = BadShares(self._task.config.max_bad_share, {self.name: size})
            for unit in range(place.unit, len(self._units)):
                reader = Reader(self._task, unit, self._units[unit], None)
                for number, (document, digest, where) in enumerate(reader.documents_with_split()):
                    is_held_out = where < self._task.split.validation_share
                    if is_held_out or (unit, number) < (place.unit, place.document):
                        continue
                    found = True
                    yield Text(Place(place.epoch, unit, number), document.text, digest)
                shares.add(reader.record())
            # A pass that a resumed run began in the middle says nothing about the whole source.
            if not place.unit:
                shares.check()
            if not found:
                raise DataError(
                    f"the source '{self.name}' has no document to train on: give it more, or lower "
                    "data.validation_share"
                )
            place = Place(place.epoch + 1)
