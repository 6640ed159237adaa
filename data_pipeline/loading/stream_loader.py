"""Training on sources as they are read: only tokenizer and validation split are built before.

Reading, cleaning and encoding happen in background threads, ahead of their use.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from math import gcd
from typing import NamedTuple

from data_pipeline.config import DataConfig, Weights
from data_pipeline.loading.batch import Batch, Origin, Sample, to_batch
from data_pipeline.loading.document_encoder import DocumentEncoder
from data_pipeline.loading.document_groups import LaneDocuments, PassShares, StreamedSource
from data_pipeline.loading.document_groups import Origin as DocumentOrigin
from data_pipeline.loading.interface import Consumed
from data_pipeline.loading.interleaving import Interleaving
from data_pipeline.loading.lanes import choose_lanes, choose_parts, lanes_of_rank, positions
from data_pipeline.loading.mixture import check_names, exact_weights
from data_pipeline.loading.plan import LoaderPlan, check_micro_batches
from data_pipeline.loading.prefetch import PrefetchWait
from data_pipeline.loading.source_stream import Place, SourceStream, documents_of
from data_pipeline.loading.stream_state import SavedSource, StreamState, merged, read_state
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.recorded import check_streamed
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.core import faults
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject

logger = logging.getLogger(__name__)

STEPS_AHEAD = 16
# Lanes that are read at the same time: they wait for a disk or a hub more than they compute.
READERS = 4

# Each lane's place in each source, for the lanes of this rank.
Places = dict[str, dict[int, Place]]


class SampleOrigin(NamedTuple):
    """A sequence of a step: its source, and its documents; None if another rank read it."""

    source: str
    documents: list[DocumentOrigin] | None


class Step(NamedTuple):
    """One step of the stream.

    Attributes:
        batches: this rank's.
        places: of each source after the step.
        origins: of all ranks' sequences.
    """

    batches: list[Batch]
    places: Places
    origins: list[SampleOrigin]


class StreamLoader:
    """One rank's training batches from sources that are read during training.

    The data are cut into lanes (:mod:`data_pipeline.loading.lanes`), and a rank reads those that
    its samples are from. Batches do not depend on the number of ranks. A checkpoint stores the
    place of each lane in each source to the token. To resume, each lane reads the group of
    documents again that it was in.

    Raises:
        ConfigError: if the micro batches do not divide evenly among the ranks, or the mixture names
            other sources.
        DataError: if a source has nothing to read.
        StorageError: if a hub does not deliver.
    """

    def __init__(
        self, data: DataConfig, datasets: Datasets, plan: LoaderPlan, dp_rank: int, dp_size: int
    ) -> None:
        names = list(data.training_sources)
        # Phases of a streamed run have the same batch sizes, sequence length and mixture.
        phase = plan.phases[0]
        check_micro_batches(phase.global_batch_size, phase.micro_batch_size, dp_size)
        check_names(data.mixture, names)
        self.global_batch_size = phase.global_batch_size
        self.micro_batch_size = phase.micro_batch_size
        self.sequence_length = plan.sequence_length
        self.document_mask = data.document_mask
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self._steps_kept = STEPS_AHEAD + plan.origin_steps
        check_streamed(data, datasets)
        mixture = data.mixture
        given = mixture.weights if isinstance(mixture, Weights) else dict.fromkeys(names, 1.0)
        self.weights = {name: given[name] for name in names}
        self.sources = {name: StreamedSource(data, name, datasets, plan.seed) for name in names}
        tokenizer = load_tokenizer(datasets.tokenizer_path, data.tokenizer)
        self._encoders = {name: DocumentEncoder(data, name, tokenizer) for name in names}
        self._interleaving = Interleaving(exact_weights([self.weights[name] for name in names]))
        self._start_sample = 0
        self._retired: dict[str, SavedSource] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream-loader")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="stream-reader")
        self._ahead: deque[Future[Step]] = deque()
        self._origins: dict[int, list[SampleOrigin]] = {}
        self.prefetch_wait = PrefetchWait()
        self.samples_passed_over = 0
        # The source that most samples are from decides; each of its units is read by one lane.
        heaviest = max(names, key=lambda name: self.weights[name])
        chosen = choose_lanes(len(self.sources[heaviest].units), phase.global_batch_size)
        self.lanes = 0
        self._streams: dict[str, dict[int, SourceStream]] = {}
        self._lay_out(data.streaming_lanes or chosen)
        self._begin(0)

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0). Steps must be asked for in order.

        Raises:
            ValueError: for another step than the next one.
        """
        if step != self._step:
            raise ValueError(f"step {step} of a stream that is at step {self._step}")
        while len(self._ahead) < STEPS_AHEAD:
            self._ahead.append(self._reader.submit(self._read, step + len(self._ahead)))
        read = self.prefetch_wait.result(self._ahead.popleft())
        # The sources themselves are steps ahead: only these places belong in a checkpoint.
        self._places = read.places
        self._origins = dict([*self._origins.items(), (step, read.origins)][-self._steps_kept :])
        self._step += 1
        return read.batches

    def position(self, step: int) -> int:
        """Samples of all sources before step ``step``."""
        return step * self.global_batch_size + self.samples_passed_over

    def consumed(self, step: int) -> Consumed:
        """Samples consumed before step ``step``; those of a source are not counted."""
        return Consumed(self.position(step), {})

    def pass_over(self, step: int, consumed: Consumed) -> None:
        """Read and discard as many steps as it takes: call it right after :meth:`resume`."""
        self._drop_read_ahead()
        while self.position(step) < consumed.samples:
            self._places = self._read(step).places
            self.samples_passed_over += self.global_batch_size

    def origins(self, step: int) -> list[Origin]:
        """Origin of each sequence of a recent step, over all ranks; empty for an older step.

        Without documents for a sequence that another rank has read.
        """
        return [
            Origin(
                source,
                [] if documents is None else documents_of(self.sources[source], documents),
            )
            for source, documents in self._origins.get(step, [])
        ]

    def require(self, num_steps: int) -> None:
        """Accept any number of steps: a stream begins again when it ends."""

    def epochs(self, step: int) -> None:
        """None: how much a stream holds is unknown."""

    def state(
        self,
        step: int,
        gather: Callable[[JsonObject], list[JsonObject]] = lambda mine: [mine],
    ) -> JsonObject:
        """The places after ``step`` steps, which must be the last ones asked for.

        Args:
            gather: returns every rank's, in the order of ranks; every rank must call this then.

        Raises:
            ValueError: for another step, or if ``gather`` leaves out lanes of other ranks.
        """
        if step != self._step:
            raise ValueError(
                f"the state after {step} steps of a stream that is at step {self._step}"
            )
        sources = {}
        for name, source in self.sources.items():
            known = self._places[name]
            places = [list(known[lane]) if lane in known else None for lane in range(self.lanes)]
            sources[name] = SavedSource(source.fingerprint, places)
        mine = StreamState(
            self._start_sample,
            self.weights,
            self.lanes,
            self._retired | sources,
            self.samples_passed_over,
        )
        return merged(gather(mine.to_dict())).to_dict()

    def resume(self, state: JsonObject, step: int) -> None:
        """Continue after ``step`` steps; changed weights or sources apply from here on.

        Raises:
            CheckpointError: if ``state`` is none.
            DataError: if the files of a source are not what they were.
        """
        saved = read_state(state, self.global_batch_size)
        self.samples_passed_over = saved.samples_passed_over
        for name, source in self.sources.items():
            before = saved.sources.get(name)
            if before is not None and before.fingerprint != source.fingerprint:
                raise DataError(
                    f"the run holds other data: the files of its source '{name}', or how they are "
                    "read, are not what they were when training began; put them back, give the new "
                    "ones another name, choose another folder with --set run_path=FOLDER, or start "
                    "over with --fresh --overwrite"
                )
        self._lay_out(saved.lanes)
        for name, lanes in self._streams.items():
            before = saved.sources.get(name)
            if before is not None:
                for lane, stream in lanes.items():
                    stream.go_to(Place(*(before.places[lane] or ())))
        self._retired = {
            name: source for name, source in saved.sources.items() if name not in self.sources
        }
        # Compared as lists: the order of the sources decides which one gets a sample.
        has_same_mixture = list(saved.weights.items()) == list(self.weights.items())
        self._start_sample = saved.start_sample if has_same_mixture else self.position(step)
        self._begin(step)

    def close(self) -> None:
        """Stop reading in the background."""
        self._drop_read_ahead()
        for lanes in self._streams.values():
            for stream in lanes.values():
                stream.close()

    def _lay_out(self, lanes: int) -> None:
        """Open this rank's lanes of all sources, at their beginning."""
        self.close()
        is_new = lanes != self.lanes
        self.lanes = lanes
        own = lanes_of_rank(lanes, self.dp_rank, self.dp_size)
        for name, source in self.sources.items():
            parts = choose_parts(len(source.units), lanes)
            if parts > 1 and is_new and self.weights[name]:
                logger.warning(
                    "the source '%s' has %d units for %d lanes: each unit is read by %d lanes, "
                    "which take its records alternately",
                    name,
                    len(source.units),
                    lanes,
                    parts,
                )
            shares = PassShares(source, own, lanes, parts)
            self._streams[name] = {
                lane: SourceStream(
                    LaneDocuments(source, lane, lanes, parts, shares),
                    self._encoders[name],
                    self.sequence_length,
                    self.document_mask,
                    self._readers,
                )
                for lane in own
            }
        self._own = own
        if is_new and gcd(lanes, self.dp_size) < self.dp_size:
            logger.warning(
                "%d ranks share %d lanes of the stream: each reads %d of them and keeps its own "
                "samples; with more files, or data.streaming_lanes, none is read twice",
                self.dp_size,
                lanes,
                len(own),
            )

    def _begin(self, step: int) -> None:
        self._step = step
        self._places = self._reached()
        self._origins.clear()

    def _reached(self) -> Places:
        return {
            name: {lane: stream.place for lane, stream in lanes.items()}
            for name, lanes in self._streams.items()
        }

    def _drop_read_ahead(self) -> None:
        """Stop reading in the background, so that the sources can move to other places."""
        for future in self._ahead:
            future.cancel()
        # A running read cannot be cancelled, and it moves the sources: wait until it is over.
        wait(self._ahead)
        self._ahead.clear()

    def _owners(self, step: int) -> dict[int, deque[str]]:
        """The sources of each own lane's samples in a step, in order.

        Lanes begin at different slots, so that L samples side by side have the mixture's shares.
        """
        names = list(self.sources)
        count = self.global_batch_size // self.lanes
        first = (self.position(step) - self._start_sample) // self.lanes
        return {
            lane: deque(
                names[owner] for owner in self._interleaving.slots(first + lane, count)[0].tolist()
            )
            for lane in self._own
        }

    def _read(self, step: int) -> Step:
        """The batches of a step; the steps must come in order, since the sources advance."""
        faults.reached("data.read")
        owners = self._owners(step)
        for name in {name for lane in owners.values() for name in lane}:
            for stream in self._streams[name].values():
                stream.begin()
        mine: dict[int, list[Sample]] = {}
        origins: list[SampleOrigin] = []
        for micro_batch, lane in positions(
            self.global_batch_size, self.micro_batch_size, self.lanes
        ):
            if lane not in owners:
                origins.append(SampleOrigin("", None))
                continue
            name = owners[lane].popleft()
            stream = self._streams[name][lane]
            self.prefetch_wait.reading = f"{stream.lane.reading} of the source '{name}'"
            window = stream.next_window()
            origins.append(SampleOrigin(name, window.origins))
            # The ranks take micro batches alternately, so a step has the same samples on any
            # number of ranks.
            if micro_batch % self.dp_size == self.dp_rank:
                mine.setdefault(micro_batch, []).append(window.sample)
        batches = [to_batch(samples) for samples in mine.values()]
        return Step(batches, self._reached(), origins)
