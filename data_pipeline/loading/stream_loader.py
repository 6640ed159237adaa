"""Training on sources as they are read: nothing is built before but the tokenizer and the validation split.

Each source is one stream of tokens: its documents in their order, without those that are held out, cleaned and encoded, again and again. Sample i
of the run is the next window of the source that the mixture says. All of this happens in a background thread, ahead of its use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.config import Weights
from data_pipeline.loading.batch import NO_LOSS, Batch, Documents, Origin, Sample, to_batch
from data_pipeline.loading.interleaving import Interleaving
from data_pipeline.loading.mixture import check_names, exact_weights
from data_pipeline.loading.prefetch import Waiting
from data_pipeline.loading.shard_loader import Consumed, check_micro_batches
from data_pipeline.preprocess.bad_share import BadShares
from data_pipeline.preprocess.reader import Reader, Task
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.manifest import canonical_sha256
from data_pipeline.shards.split import SplitPlan
from data_pipeline.sources import ReadContext, Unit, open_source
from data_pipeline.tokenizer.engine_choice import CheckedEncoder, choose_engine
from data_pipeline.tokenizer.fill_in_the_middle import FillInTheMiddleTransform
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.config.recipe import Recipe
from pretrain.core.errors import DataError

# What a resumed run reads again of each source, at most.
UNIT_BYTES = 16 << 20
STEPS_AHEAD = 16
LAST_DOCUMENT = -1  # of a unit, whose number is not known
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20

# Choosing an engine takes seconds: once a process for each tokenizer, by its checksum.
_chosen: dict[str, str] = {}


class Place(NamedTuple):
    """A token of a source's endless stream: pass through the source, unit, document of the unit, and token of the document, each from 0."""

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
        return Encoded(self.place._replace(token=self.place.token + count), self.tokens[count:])


class SourceStream:
    """Windows of one source's documents.

    Args:
        recipe: whose data section says how documents are read, cleaned and encoded.
        name: of the source in it.
        corpora: the data folder that the tokenizer lies in.

    Attributes:
        fingerprint: of the list of its units and of how they are read; it changes when a file does.
        place: of the next window's first token.

    Raises:
        DataError: where the source has nothing to read.
    """

    def __init__(self, recipe: Recipe, name: str, datasets: Datasets) -> None:
        data = recipe.data
        self.name, self.length, self.document_mask = (
            name,
            recipe.train.sequence_length,
            data.document_mask,
        )
        self.tokenizer = load_tokenizer(datasets.tokenizer_path, data.tokenizer)
        self._encoder: CheckedEncoder | None = None
        self._task = Task(data, str(datasets.first.folder), SplitPlan(data.validation_share))
        self._units: list[Unit] = open_source(
            data.named_sources[name], ReadContext.of(data, name)
        ).units(UNIT_BYTES)
        files = [[list(unit.files), unit.start, unit.end, unit.stamp] for unit in self._units]
        fields = {
            "cleaning",
            "fill_in_the_middle",
            "validation_share",
            "split_by",
            "split_root",
            "max_record_bytes",
        }
        reading = data.model_dump(mode="json", include=fields)
        self.fingerprint = canonical_sha256(
            {"units": files, "source": data.named_sources[name].model_dump(mode="json"), **reading}
        )
        middle = data.fill_in_the_middle
        applies = middle is not None and (middle.sources is None or name in middle.sources)
        self._transform = (
            FillInTheMiddleTransform(middle, self.tokenizer.token_id)
            if middle and applies
            else None
        )
        self.go_to(Place())

    def go_to(self, place: Place) -> None:
        """Goes on from there: the unit is read again up to its document."""
        self.place = place
        self._documents = self._encoded(place)
        self._buffer: deque[Encoded] = deque()

    def documents(self, first: Place, last: Place) -> list[Documents]:
        """The documents from the one of ``first`` to that of ``last``, a line for each unit."""
        ends = [first.unit, last.unit] if first[:2] != last[:2] else [first.unit]
        places = [", ".join(self._units[unit].files) for unit in ends]
        if len(places) == 1:
            return [Documents(places[0], first.document, last.document)]
        return [
            Documents(places[0], first.document, LAST_DOCUMENT),
            Documents(places[1], 0, last.document),
        ]

    def next_window(self) -> Sample:
        """The next S inputs with one target each."""
        length, held = self.length, sum(len(document.tokens) for document in self._buffer)
        while held <= length:
            self._buffer.append(next(self._documents))
            held += len(self._buffer[-1].tokens)
        # Of a document that is longer than a window, only what the window needs is copied.
        tokens = np.concatenate([document.tokens[: length + 1] for document in self._buffer])[
            : length + 1
        ]
        ends = np.cumsum([len(document.tokens) for document in self._buffer])
        inputs, labels, documents = tokens[:-1], tokens[1:].copy(), None
        if self.document_mask:
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
                    yield (
                        encoded.after(start.token)
                        if encoded.place == start._replace(token=0)
                        else encoded
                    )
                batch, characters = [], 0

    def _encode(self, batch: list[Text]) -> Iterator[Encoded]:
        tokenizer = self.tokenizer
        if self._encoder is None:
            if tokenizer.sha256 not in _chosen:
                _chosen[tokenizer.sha256] = choose_engine(
                    tokenizer, [text.content for text in batch]
                ).name
            self._encoder = CheckedEncoder(tokenizer, _chosen[tokenizer.sha256])
        before = (
            [tokenizer.bos_id] if tokenizer.prepend_bos and tokenizer.bos_id is not None else []
        )
        after = [tokenizer.eod_id] if tokenizer.append_eod else []
        # Texts are cut where the tokenizer allows it, so that a long one is encoded on all cores.
        documents: list[list[str | int]] = []
        for text in batch:
            parts = (
                self._transform.split(text.content, text.digest, 0) if self._transform else None
            ) or [text.content]
            cut = [[part] if isinstance(part, int) else tokenizer.pieces(part) for part in parts]
            documents.append([*before, *(piece for pieces in cut for piece in pieces), *after])
        pieces = [
            (piece, text)
            for text, document in zip(batch, documents, strict=True)
            for piece in document
            if isinstance(piece, str)
        ]
        ids, offsets = self._encoder.encode_flat(
            [piece for piece, _ in pieces],
            [text.digest for _, text in pieces],
            [f"{self.name} {text.place}" for _, text in pieces],
        )
        encoded = iter(np.split(ids.astype(np.int64), offsets[1:-1]))
        for text, document in zip(batch, documents, strict=True):
            tokens = np.concatenate(
                [
                    next(encoded) if isinstance(piece, str) else np.array([piece])
                    for piece in document
                ]
            )
            if len(tokens):
                yield Encoded(text.place, tokens)

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
                    if where >= self._task.split.validation_share and (unit, number) >= (
                        place.unit,
                        place.document,
                    ):
                        found = True
                        yield Text(Place(place.epoch, unit, number), document.text, digest)
                shares.add(reader.record())
            if (
                not place.unit
            ):  # a pass that a resumed run began in the middle says nothing about the whole
                shares.check()
            if not found:
                raise DataError(
                    f"the source '{self.name}' has no document to train on: give it more, or lower data.validation_share"
                )
            place = Place(place.epoch + 1)


class Step(NamedTuple):
    """What a step takes: this rank's batches, the places after it, and of all ranks' sequences the source with its first token and the one after."""

    batches: list[Batch]
    places: dict[str, Place]
    windows: list[tuple[str, Place, Place]]


@dataclass(frozen=True)
class StreamState:
    """What a checkpoint carries of a streamed run: the mixture since ``start_sample``, and each source's fingerprint and place."""

    start_sample: int
    weights: dict[str, float]
    sources: dict[str, dict[str, Any]]  # those too that the run no longer uses
    samples_passed_over: int = 0


class StreamLoader:
    """One rank's training batches from sources that are read while training goes on.

    Every rank reads and encodes the whole stream and keeps its own micro batches, so the batches do not depend on the number of ranks; that
    costs each rank the work of all. A checkpoint carries the place of each source to the token. To resume, each reads its unit again up to there.

    Raises:
        ConfigError: where the micro batches do not divide evenly among the ranks, or the mixture names other sources.
        DataError: where a source has nothing to read.
    """

    def __init__(self, recipe: Recipe, datasets: Datasets, dp_rank: int, dp_size: int) -> None:
        train, names = recipe.train, list(recipe.data.named_sources)
        check_micro_batches(train.global_batch_size, train.micro_batch_size, dp_size)
        check_names(recipe.data.mixture, names)
        self.global_batch_size, self.micro_batch_size = (
            train.global_batch_size,
            train.micro_batch_size,
        )
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._steps_kept = STEPS_AHEAD + recipe.logging.interval_steps
        mixture = recipe.data.mixture
        given = mixture.weights if isinstance(mixture, Weights) else dict.fromkeys(names, 1.0)
        self.weights = {name: given[name] for name in names}
        self.sources = {name: SourceStream(recipe, name, datasets) for name in names}
        self._interleaving = Interleaving(exact_weights([self.weights[name] for name in names]))
        self._start_sample = 0
        self._retired: dict[str, dict[str, Any]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream-loader")
        self._ahead: deque[Future[Step]] = deque()
        self._windows: dict[int, list[tuple[str, Place, Place]]] = {}
        self.waiting = Waiting()
        self.samples_passed_over = 0
        self._begin(0)

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0). The steps have to be asked for one after the other.

        Raises:
            ValueError: for another step than the next one.
        """
        if step != self._step:
            raise ValueError(f"step {step} of a stream that is at step {self._step}")
        while len(self._ahead) < STEPS_AHEAD:
            self._ahead.append(self._reader.submit(self._read, step + len(self._ahead)))
        read = self.waiting.result(self._ahead.popleft())
        self._places = read.places
        self._windows = dict([*self._windows.items(), (step, read.windows)][-self._steps_kept :])
        self._step += 1
        return read.batches

    def position(self, step: int) -> int:
        return step * self.global_batch_size + self.samples_passed_over

    def consumed(self, step: int) -> Consumed:
        return Consumed(self.position(step), {})

    def pass_over(self, step: int, consumed: Consumed) -> None:
        """Reads as many steps as it takes and throws them away: call it right after :meth:`resume`."""
        self._drop_what_is_ahead()
        while self.position(step) < consumed.samples:
            self._places = self._read(step).places
            self.samples_passed_over += self.global_batch_size

    def origins(self, step: int) -> list[Origin]:
        """Where each sequence of one of the last steps comes from, over all ranks; empty for an older one."""
        return [
            Origin(name, self.sources[name].documents(first, last))
            for name, first, last in self._windows.get(step, [])
        ]

    def require(self, num_steps: int) -> None:
        """A stream begins again when it ends: it is never too short."""

    def epochs(self, step: int) -> None:
        """How much a stream holds is not known."""

    def state(self, step: int) -> dict[str, Any]:
        """The places after ``step`` steps, which have to be those that were asked for."""
        if step != self._step:
            raise ValueError(
                f"the state after {step} steps of a stream that is at step {self._step}"
            )
        sources = {
            name: {"fingerprint": source.fingerprint, "place": list(self._places[name])}
            for name, source in self.sources.items()
        }
        return asdict(
            StreamState(
                self._start_sample, self.weights, self._retired | sources, self.samples_passed_over
            )
        )

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Goes on after ``step`` steps. Where the weights or the sources have changed, the new ones hold from here on.

        Raises:
            DataError: where the files of a source are not what they were.
        """
        saved = StreamState(**state)
        self._drop_what_is_ahead()
        self.samples_passed_over = saved.samples_passed_over
        for name, source in self.sources.items():
            before = saved.sources.get(name)
            if before is not None and before["fingerprint"] != source.fingerprint:
                raise DataError(
                    f"the run holds other data: the files of its source '{name}', or how they are read, are not what they were when training began; "
                    "put them back, give the new ones another name, choose another folder with --set run_path=FOLDER, "
                    "or start over with --fresh --overwrite"
                )
            source.go_to(Place(*before["place"]) if before is not None else Place())
        self._retired = {
            name: source for name, source in saved.sources.items() if name not in self.sources
        }
        same = list(saved.weights.items()) == list(self.weights.items())
        self._start_sample = saved.start_sample if same else self.position(step)
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._step = step
        self._places = {name: source.place for name, source in self.sources.items()}
        self._windows.clear()

    def _drop_what_is_ahead(self) -> None:
        """Nothing is read in the background any more: the sources can go elsewhere."""
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)
        self._ahead.clear()

    def _read(self, step: int) -> Step:
        """Called for one step after the other."""
        size, named = self.micro_batch_size, list(self.sources.items())
        owners, _ = self._interleaving.slots(
            self.position(step) - self._start_sample, self.global_batch_size
        )
        samples, windows = [], []
        for name, source in (named[owner] for owner in owners.tolist()):
            self.waiting.reading = f"the source '{name}'"
            before = source.place
            samples.append(source.next_window())
            windows.append((name, before, source.place))
        firsts = range(self.dp_rank * size, self.global_batch_size, self.dp_size * size)
        batches = [to_batch(samples[first : first + size]) for first in firsts]
        return Step(batches, {name: source.place for name, source in self.sources.items()}, windows)
