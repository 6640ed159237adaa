"""Why a training stops before its last step: a signal, damaged data, or a failed save.

All ranks stop at the same step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from data_pipeline.shards.verification import BackgroundCheck
from pretrain.checkpoint.saving import SaveThread
from pretrain.core.errors import DataError
from pretrain.core.signals import StopRequest
from pretrain.engine.topology import Topology


class Stopping:
    """Makes the ranks agree. Every rank must call each method alike.

    Args:
        request: set by a signal, on any rank.
        data_check: this rank's comparison of the data with its manifest, in the background.
        saving: writes checkpoints in the background.
    """

    def __init__(
        self,
        request: StopRequest,
        data_check: BackgroundCheck,
        saving: SaveThread,
        topology: Topology,
    ) -> None:
        self._request = request
        self._data_check = data_check
        self._saving = saving
        self._data_is_checked = False
        self._topology = topology

    def requested(self) -> bool:
        """Whether any rank was asked to stop; one all-reduce.

        Raises:
            DataError: as :meth:`raise_data_faults`.
            StorageError: if a checkpoint could not be written in the background.
        """
        faulty = self._data_check.fault is not None or self._saving.fault is not None
        # Every step: a signal may reach one rank only, and all must leave the loop together.
        if not self._topology.any_rank(self._request.requested or faulty):
            return False
        self.raise_data_faults()
        # All ranks' saving threads end alike, but some notice a step earlier than others.
        if self._topology.any_rank(self._saving.fault is not None):
            self._saving.finish()
        self._request.note_agreed()
        return True

    def saving(self) -> AbstractContextManager[None]:
        """Return a block in which a checkpoint is written: the next Ctrl-C lets it finish."""
        return self._request.saving()

    def raise_data_faults(self) -> None:
        """End the run on all ranks if any of them has found damaged data so far.

        Raises:
            DataError: naming the first fault.
        """
        # Every rank checks its share of the files, so each one knows other faults.
        found = self._topology.all_gather(self._data_check.fault)
        faults = [fault for fault in found if fault is not None]
        if faults:
            others = f" (and {len(faults) - 1} more by other ranks)" if len(faults) > 1 else ""
            raise DataError(f"{faults[0]}{others}; no checkpoint was written since this start")

    def finish_data_check(self) -> None:
        """Wait for the data check: no checkpoint may hold what was learned from damaged data.

        Raises:
            DataError: as :meth:`raise_data_faults`.
        """
        if self._data_is_checked:
            return
        # A preempted run must save within a minute or two, and cannot wait for all files.
        self._data_check.finish(give_up=self._request.requested)
        self.raise_data_faults()
        self._data_is_checked = True
