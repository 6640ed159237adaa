"""What a callback gets, and when each of its methods is called."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pretrain.analysis.expert_usage import UsageWindow
from pretrain.config.recipe import Recipe
from pretrain.core.files import JsonObject

logger = logging.getLogger(__name__)

# A line of metrics.jsonl. It is written from a typed record (pretrain/training/records.py), but a
# resumed run also reads lines of earlier versions, in which columns may be missing.
MetricsRecord: TypeAlias = JsonObject
# What summary.json says of a run; an earlier start may have written further keys.
Summary: TypeAlias = JsonObject


@dataclass(frozen=True)
class CallbackRun:
    """What a callback of a recipe's ``callbacks`` is made from, in addition to its own section.

    Attributes:
        folder: of the run; whatever the callback writes belongs there.
        recipe: resolved.
        world_size: ranks of the run.
    """

    folder: Path
    recipe: Recipe
    world_size: int


class Callback:
    """Base of all callbacks, whose methods do nothing.

    Only rank 0 has callbacks, so none of them may communicate with other ranks: a collective that
    one rank alone enters never returns.
    """

    def on_start(self, step: int, num_steps: int) -> None:
        """Training starts after ``step`` finished steps (0, or those of the checkpoint)."""

    def on_step(self, step: int) -> None:
        """Step ``step`` (from 1) is done."""

    def on_record(self, record: MetricsRecord) -> None:
        """A record of metrics was made, after the ``on_step`` of its step.

        Its ``kind`` is "train", "validation", "usage" (of experts, after ``on_usage``) or "timing"
        (goodput, and each rank's own time).
        """

    def on_usage(self, window: UsageWindow) -> None:
        """A window of expert usage is over; it has the counts of all experts."""

    def on_rollback(self, step: int) -> None:
        """Training went back to the checkpoint of step ``step``; later steps are taken again."""

    def on_early_end(self, step: int) -> None:
        """Step ``step``, which is done, is the last one, although more were planned."""

    def on_end(self, summary: Summary) -> None:
        """Training ends: all steps are done, or it was interrupted and has saved.

        A finished run that is killed inside this method calls ``on_start`` and ``on_end`` once more
        when it is started again.

        Args:
            summary: what summary.json says of the run.
        """

    def on_failure(self, error: Exception) -> None:
        """Training ends by an error; no other method is called afterwards."""


class CallbackList(Callback):
    """Passes every call to several callbacks, in their order; empty on every rank except 0."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def __len__(self) -> int:
        return len(self._callbacks)

    def on_start(self, step: int, num_steps: int) -> None:
        """Pass it on."""
        for callback in self._callbacks:
            callback.on_start(step, num_steps)

    def on_step(self, step: int) -> None:
        """Pass it on."""
        for callback in self._callbacks:
            callback.on_step(step)

    def on_record(self, record: MetricsRecord) -> None:
        """Pass a copy to each: some keep it, and a plugin's may change it."""
        for callback in self._callbacks:
            callback.on_record(deepcopy(record))

    def on_usage(self, window: UsageWindow) -> None:
        """Pass it on."""
        for callback in self._callbacks:
            callback.on_usage(window)

    def on_rollback(self, step: int) -> None:
        """Pass it on."""
        for callback in self._callbacks:
            callback.on_rollback(step)

    def on_early_end(self, step: int) -> None:
        """Pass it on."""
        for callback in self._callbacks:
            callback.on_early_end(step)

    def on_end(self, summary: Summary) -> None:
        """Pass it on."""
        for callback in self._callbacks:
            callback.on_end(summary)

    def on_failure(self, error: Exception) -> None:
        """Pass it on; what goes wrong in a callback does not take the error's place."""
        for callback in self._callbacks:
            try:
                callback.on_failure(error)
            except Exception:
                logger.exception("%s failed after the run had", type(callback).__name__)
