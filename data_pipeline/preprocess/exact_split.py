"""A split with an exact number of held-out documents (``data.validation_documents``).

Documents are held out by their places, as by a share; the input is read once before to find the
place below which as many documents are as were asked for. So which ones they are depends on the
documents alone, not on their order or on the workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.reader import Reader
from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.preprocess.worker import Job, finish_unit, unit_folder
from data_pipeline.preprocess.workspace import attempt, no_space_is_told
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.split import SplitPlan
from pretrain.core.errors import DataError

STAGE = "places"
PLACES = "places.npy"


def place_unit(job: Job) -> UnitRecord:
    """Write the lowest places of a unit's documents, as many as may be held out and one more."""
    task, number, unit = job
    config = task.config
    assert config.validation_documents is not None
    place = unit_folder(task.workspace, STAGE, number)
    with no_space_is_told(place), attempt(Path(task.workspace), place) as folder:
        reader = Reader(task, number, unit, None)
        hashed = reader.fixed_place is None
        found = [where for _, _, where in reader.documents_with_split() if hashed]
        lowest = lowest_places(
            [np.array(found)], config.validation_documents, config.cleaning.exact_duplicates
        )
        np.save(folder / PLACES, lowest)
        return finish_unit(folder, job, reader.record())


def lowest_places(parts: Sequence[np.ndarray], wanted: int, distinct: bool) -> np.ndarray:
    """Return the ``wanted`` + 1 lowest places in order, and all that equal the last of them.

    Args:
        parts: places [n] of some documents each.
        distinct: of equal documents only one stays.
    """
    places = np.concatenate([np.zeros(0), *parts])
    places = np.unique(places) if distinct else np.sort(places)
    if len(places) <= wanted:
        return places
    return places[: int(np.searchsorted(places, places[wanted], side="right"))]


def exact_split(workspace: Path, numbers: Sequence[int], config: DataConfig) -> SplitPlan:
    """Return the split that holds out exactly ``config.validation_documents`` documents.

    Args:
        workspace: with the places of all units.
        numbers: of the units.

    Raises:
        DataError: if there are not more documents than that, or equal ones would have to be on both
            sides.
    """
    wanted = config.validation_documents
    assert wanted is not None
    distinct = config.cleaning.exact_duplicates
    places = np.zeros(0)
    for number in numbers:
        mine = np.load(unit_folder(workspace, STAGE, number) / PLACES)
        places = lowest_places([places, mine], wanted, distinct)
    if len(places) <= wanted:
        raise DataError(
            f"data.validation_documents is {wanted:,}, and there are {len(places):,} documents to "
            "choose from, of which one at least has to be trained on: lower it, or give more data"
        )
    # The first document that is trained on. What equals it is on its side.
    border = places[wanted]
    below = int(np.searchsorted(places, border, side="left"))
    if below < wanted:
        by = "text" if config.split_by == "content" else config.split_by
        above = int(np.searchsorted(places, border, side="right"))
        raise DataError(
            f"data.validation_documents is {wanted:,}, but {above - below:,} documents have one "
            f"{by} and are held out together or not at all: hold out {below:,} or "
            f"{above:,}, or remove equal texts with data.cleaning.exact_duplicates"
        )
    return SplitPlan(float(border))


def check_exact_split(config: DataConfig, manifest: Manifest) -> None:
    """Check the number of held-out documents in a finished build.

    Raises:
        DataError: if duplicates that were removed have changed it.
    """
    wanted = config.validation_documents
    held_out = manifest.splits.get("validation")
    found = 0 if held_out is None else held_out.documents
    if wanted is not None and found != wanted:
        raise DataError(
            f"{found:,} documents are held out and not {wanted:,}, because equal texts of a source"
            " of split: train were removed from them: put that source last, or leave"
            " data.cleaning.exact_duplicates out"
        )
