"""Training on sources as they are read: only tokenizer and validation split are built before.

Sample i of the run is the next window of the source that the mixture chooses. Reading, cleaning and
encoding happen in a background thread, ahead of their use.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

from data_pipeline.config import DataConfig, Weights
from data_pipeline.loading.batch import Batch, Origin, to_batch
from data_pipeline.loading.interface import Consumed
from data_pipeline.loading.interleaving import Interleaving
from data_pipeline.loading.mixture import check_names, exact_weights
from data_pipeline.loading.plan import LoaderPlan, check_micro_batches
from data_pipeline.loading.prefetch import PrefetchWait
from data_pipeline.loading.saved import read_saved
from data_pipeline.loading.source_stream import Place, SourceStream
from data_pipeline.shards.datasets import Datasets
from pretrain.core import faults
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject
from pretrain.core.saved_types import Count

STEPS_AHEAD = 16


class Window(NamedTuple):
    """A sequence of a step: its source, its first token and the token after its last one."""

    source: str
    first: Place
    end: Place


class Step(NamedTuple):
    """One step of the stream.

    Attributes:
        batches: this rank's.
        places: of each source after the step.
        windows: all ranks' sequences.
    """

    batches: list[Batch]
    places: dict[str, Place]
    windows: list[Window]


@dataclass(frozen=True)
class SavedSource:
    """A source in a checkpoint: the fingerprint of its files, and the place it has reached."""

    fingerprint: str
    place: Annotated[list[Count], Field(min_length=4, max_length=4)]


@dataclass(frozen=True)
class StreamState:
    """The state of a streamed run in a checkpoint.

    Attributes:
        start_sample: from which on the mixture holds.
        weights: of the mixture.
        sources: including those that the run no longer uses.
    """

    start_sample: Count
    weights: dict[str, float]
    sources: dict[str, SavedSource]
    samples_passed_over: Count = 0


class StreamLoader:
    """One rank's training batches from sources that are read during training.

    Every rank reads and encodes the whole stream and keeps its own micro batches, so the batches do
    not depend on the number of ranks; the price is that each rank does the work of all. A
    checkpoint stores the place of each source to the token. To resume, each source reads its unit
    again up to there.

    Raises:
        ConfigError: if the micro batches do not divide evenly among the ranks, or the mixture names
            other sources.
        DataError: if a source has nothing to read.
    """

    def __init__(
        self, data: DataConfig, datasets: Datasets, plan: LoaderPlan, dp_rank: int, dp_size: int
    ) -> None:
        names = list(data.named_sources)
        # Phases of a streamed run have the same batch sizes, sequence length and mixture.
        phase = plan.phases[0]
        check_micro_batches(phase.global_batch_size, phase.micro_batch_size, dp_size)
        check_names(data.mixture, names)
        self.global_batch_size = phase.global_batch_size
        self.micro_batch_size = phase.micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self._steps_kept = STEPS_AHEAD + plan.origin_steps
        mixture = data.mixture
        given = mixture.weights if isinstance(mixture, Weights) else dict.fromkeys(names, 1.0)
        self.weights = {name: given[name] for name in names}
        self.sources = {
            name: SourceStream(data, name, datasets, plan.sequence_length) for name in names
        }
        self._interleaving = Interleaving(exact_weights([self.weights[name] for name in names]))
        self._start_sample = 0
        self._retired: dict[str, SavedSource] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream-loader")
        self._ahead: deque[Future[Step]] = deque()
        self._windows: dict[int, list[Window]] = {}
        self.prefetch_wait = PrefetchWait()
        self.samples_passed_over = 0
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
        self._windows = dict([*self._windows.items(), (step, read.windows)][-self._steps_kept :])
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
        """Origin of each sequence of a recent step, over all ranks; empty for an older step."""
        return [
            Origin(window.source, self.sources[window.source].documents(window.first, window.end))
            for window in self._windows.get(step, [])
        ]

    def require(self, num_steps: int) -> None:
        """Accept any number of steps: a stream begins again when it ends."""

    def epochs(self, step: int) -> None:
        """None: how much a stream holds is unknown."""

    def state(self, step: int) -> JsonObject:
        """The places after ``step`` steps, which must be the last ones asked for.

        Raises:
            ValueError: for another step.
        """
        if step != self._step:
            raise ValueError(
                f"the state after {step} steps of a stream that is at step {self._step}"
            )
        sources = {
            name: SavedSource(source.fingerprint, list(self._places[name]))
            for name, source in self.sources.items()
        }
        return asdict(
            StreamState(
                self._start_sample, self.weights, self._retired | sources, self.samples_passed_over
            )
        )

    def resume(self, state: JsonObject, step: int) -> None:
        """Continue after ``step`` steps; changed weights or sources apply from here on.

        Raises:
            CheckpointError: if ``state`` is none.
            DataError: if the files of a source are not what they were.
        """
        saved = read_saved(StreamState, state)
        self._drop_read_ahead()
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
            source.go_to(Place() if before is None else Place(*before.place))
        self._retired = {
            name: source for name, source in saved.sources.items() if name not in self.sources
        }
        # Compared as lists: the order of the sources decides which one gets a sample.
        has_same_mixture = list(saved.weights.items()) == list(self.weights.items())
        self._start_sample = saved.start_sample if has_same_mixture else self.position(step)
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._step = step
        self._places = {name: source.place for name, source in self.sources.items()}
        self._windows.clear()

    def _drop_read_ahead(self) -> None:
        """Stop reading in the background, so that the sources can move to other places."""
        for future in self._ahead:
            future.cancel()
        # A running read cannot be cancelled, and it moves the sources: wait until it is over.
        wait(self._ahead)
        self._ahead.clear()

    def _read(self, step: int) -> Step:
        """The batches of a step; the steps must come in order, since the sources advance."""
        faults.reached("data.read")
        size = self.micro_batch_size
        named = list(self.sources.items())
        owners, _ = self._interleaving.slots(
            self.position(step) - self._start_sample, self.global_batch_size
        )
        samples = []
        windows = []
        for name, source in (named[owner] for owner in owners.tolist()):
            self.prefetch_wait.reading = f"the source '{name}'"
            before = source.place
            samples.append(source.next_window())
            windows.append(Window(name, before, source.place))
        # The ranks take micro batches alternately, so a step has the same samples on any number of
        # ranks.
        firsts = range(self.dp_rank * size, self.global_batch_size, self.dp_size * size)
        batches = [to_batch(samples[first : first + size]) for first in firsts]
        return Step(batches, {name: source.place for name, source in self.sources.items()}, windows)
