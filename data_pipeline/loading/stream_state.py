"""The position of a streamed run, as its checkpoints keep it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from pydantic import Field

from data_pipeline.loading.saved import read_saved
from pretrain.core.errors import CheckpointError, DataError
from pretrain.core.files import JsonObject
from pretrain.core.saved_types import Count

SavedPlace = Annotated[list[Count], Field(min_length=5, max_length=5)]


@dataclass(frozen=True)
class SavedSource:
    """A source in a checkpoint.

    Attributes:
        fingerprint: of its files, and of how they are read.
        places: that each lane has reached, see
            :class:`~data_pipeline.loading.source_stream.Place`; None for lanes of other ranks.
    """

    fingerprint: str
    places: list[SavedPlace | None]


@dataclass(frozen=True)
class StreamState:
    """The state of a streamed run in a checkpoint.

    Attributes:
        start_sample: from which on the mixture holds.
        weights: of the mixture.
        lanes: number of them; it stays the same over the run.
        sources: including those that the run no longer uses.
    """

    start_sample: Count
    weights: dict[str, float]
    lanes: Annotated[Count, Field(ge=1, le=1 << 20)]
    sources: dict[str, SavedSource]
    samples_passed_over: Count = 0

    def to_dict(self) -> JsonObject:
        """The state as JSON."""
        return asdict(self)


def merged(states: Sequence[JsonObject]) -> StreamState:
    """The whole state, of the parts that the ranks have.

    Raises:
        ValueError: if no rank has some lane.
    """
    parts = [read_saved(StreamState, state) for state in states]
    sources = {}
    for name, source in parts[0].sources.items():
        columns = zip(*(part.sources[name].places for part in parts), strict=True)
        places = [next((place for place in known if place), None) for known in columns]
        if None in places:
            raise ValueError(f"no rank gave the place of lane {places.index(None)} of '{name}'")
        sources[name] = replace(source, places=places)
    return replace(parts[0], sources=sources)


def read_state(content: JsonObject, global_batch_size: int) -> StreamState:
    """The state that :meth:`StreamState.to_dict` gave.

    Raises:
        CheckpointError: if it is none.
        DataError: if an earlier version wrote it, which read a stream in another order.
    """
    if "lanes" not in content and any(
        isinstance(source, dict) and "place" in source
        for source in dict(content.get("sources") or {}).values()
    ):
        raise DataError(
            "an earlier version of this program, which read streams in another order, wrote the "
            "checkpoint: what it has read is not known here; resume with that version, or start a "
            "new run from its weights with initial_weights"
        )
    saved = read_saved(StreamState, content)
    if global_batch_size % saved.lanes or any(
        len(source.places) != saved.lanes or None in source.places
        for source in saved.sources.values()
    ):
        raise CheckpointError(
            f"the checkpoint's position in the data has a wrong number of lanes ({saved.lanes}); "
            "the checkpoint is damaged, choose another step_N folder"
        )
    return saved
