"""Work beside training: a thread, and collectives of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from pretrain.engine.topology import Topology

Value = TypeVar("Value")


class SavingRanks:
    """The ranks as their saving threads see them. Every rank must make it.

    Training's collectives run meanwhile, and two threads must not share a process group. This one
    is of gloo on every device: it carries file names and sizes.
    """

    def __init__(self, topology: Topology) -> None:
        self.rank = topology.rank
        self.world_size = topology.world_size
        self.is_main = topology.is_main
        self._group = distributed.new_group(backend="gloo") if topology.world_size > 1 else None

    def all_gather(self, value: Value) -> list[Value]:
        """Return the value of every rank, on every rank, in rank order."""
        values: list[Value] = [value] * self.world_size
        if self._group is not None:
            distributed.all_gather_object(values, value, group=self._group)
        return values


class SaveThread:
    """At most one piece of work in the background.

    Attributes:
        fault: what ended the work before its end; it is raised by :meth:`finish`.
    """

    def __init__(self) -> None:
        self.fault: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object]) -> None:
        """Begin a piece of work, after the one before has ended without a fault."""
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.fault = error

        # A daemon: a process that ends by an error must not wait for ranks that are gone.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end of the work, and raise what ended it too early."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
