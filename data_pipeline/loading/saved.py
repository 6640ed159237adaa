"""Reads what a loader keeps in a checkpoint: the file may be anybody's."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject
from pretrain.core.saved_types import first_fault

Saved = TypeVar("Saved")


def read_saved(kind: type[Saved], content: JsonObject) -> Saved:
    """The dataclass ``kind`` of an object of ``state.json``, with every type checked.

    Raises:
        CheckpointError: naming the first field that is missing or of a wrong type.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        # As JSON, where a list may be a tuple; strict, so that true and "12" are no numbers.
        return adapter.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise CheckpointError(
            f"the checkpoint's position in the data has {first_fault(error)}; the checkpoint is"
            " damaged, choose another step_N folder"
        ) from None
