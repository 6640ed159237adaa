"""A plugin that writes down which documents each step of a streamed run is of.

``RECORDED_DOCUMENTS`` names a file, to which every rank appends a line for each of its steps.
"""

from __future__ import annotations

import json
import os

from data_pipeline.loading.batch import Batch
from data_pipeline.loading.stream_loader import StreamLoader

_step_batches = StreamLoader.step_batches


def _recorded(loader: StreamLoader, step: int) -> list[Batch]:
    batches = _step_batches(loader, step)
    origins = [
        [origin.source, *map(list, origin.documents)] if origin.documents else None
        for origin in loader.origins(step)
    ]
    row = {"step": step, "rank": loader.dp_rank, "lanes": loader.lanes, "origins": origins}
    # One write of a whole line: several ranks append.
    with open(os.environ["RECORDED_DOCUMENTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return batches


StreamLoader.step_batches = _recorded  # type: ignore[method-assign]
