"""DeepSpeed's monitor (the sections tensorboard, csv_monitor, wandb and comet of a ds_config), in a form that cannot stop a training.

DeepSpeed's own MonitorMaster is made inside its engine and raises there, and in every step, what a service without a network raises.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import Monitor as Backend
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor
from tqdm import tqdm

from pretrain.core.credentials import redact

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


def ask_nothing() -> None:
    """Makes ``wandb.init`` fail where it would ask for a key on the terminal, below the progress bar, with every rank waiting for the answer."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))


def wandb_without_questions(section: Any) -> Backend:
    ask_nothing()
    return WandbMonitor(section)


BACKENDS: dict[str, Callable[[Any], Backend]] = {
    "tensorboard": TensorBoardMonitor,
    "csv_monitor": csvMonitor,
    "wandb": wandb_without_questions,
    "comet": CometMonitor,
}
# DeepSpeed's engine counts samples. W&B refuses a step below an earlier one, so rows of ours must count the same there.
COUNT_SAMPLES = ("wandb", "comet")
# In TensorBoard the engine's values are a run of their own below ours: steps that are taken again are forgotten for a whole run.
ROWS, SAMPLES = "tensorboard", "samples"


def without_monitors(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The ds_config that DeepSpeed's engine is made from."""
    return {name: section for name, section in ds_config.items() if name not in BACKENDS}


class Monitor:
    """Takes the place of ``DeepSpeedEngine.monitor``; a backend that fails is told of once and gets no more.

    Args:
        writes: whether this process is rank 0; others have no backends.
        samples: how many samples the engine has seen.
    """

    def __init__(self, ds_config: dict[str, Any], writes: bool, samples: Callable[[], int]) -> None:
        self._samples = samples
        self._backends: dict[str, Backend] = {}
        if not writes:
            return
        config = get_monitor_config(ds_config)
        for name in BACKENDS:
            if (section := getattr(config, name)).enabled:
                self._try(name, lambda name=name, section=section: self._open(name, section))  # type: ignore[misc]

    @property
    def enabled(self) -> bool:
        return bool(self._backends)

    @property
    def summary_writer(self) -> SummaryWriter | None:
        """TensorBoard's, for what is no scalar."""
        return self._writer(ROWS)

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        """What DeepSpeed's engine calls: (tag, value, samples)."""
        for name, backend in self._others(ROWS):
            self._try(name, lambda backend=backend: backend.write_events(events))  # type: ignore[misc]

    def write_row(self, events: Sequence[tuple[str, float]], step: int) -> None:
        """Values of one step: by step where that is possible, else by samples."""
        for name, backend in self._others(SAMPLES):
            x = self._samples() if name in COUNT_SAMPLES else step
            placed = [(tag, value, x) for tag, value in events]
            self._try(name, lambda backend=backend, placed=placed: backend.write_events(placed))  # type: ignore[misc]

    def begin_after(self, step: int) -> None:
        """What TensorBoard was told of later steps is shown no more: they are taken again. The others keep both."""
        for name, x in ((ROWS, step), (SAMPLES, self._samples())):
            if (writer := self._writer(name)) is not None:
                self._try(name, lambda writer=writer, x=x: _begin_session(writer, x + 1))  # type: ignore[misc]

    def _open(self, name: str, section: Any) -> None:
        self._backends[name] = BACKENDS[name](section)
        if name == ROWS:
            self._backends[SAMPLES] = TensorBoardMonitor(
                section.model_copy(update={"job_name": f"{section.job_name}/{SAMPLES}"})
            )

    def _writer(self, name: str) -> SummaryWriter | None:
        backend = self._backends.get(name)
        return None if backend is None else backend.summary_writer

    def _others(self, than: str) -> list[tuple[str, Backend]]:
        return [(name, backend) for name, backend in self._backends.items() if name != than]

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of any service, of any kind
            self._backends.pop(name, None)
            reason = redact(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            logger.warning("the ds_config's '%s' failed: %s", name, reason)
            tqdm.write(
                f"warning: the ds_config's '{name}' failed ({reason}) and gets nothing more; training goes on",
                file=sys.stderr,
            )


def _begin_session(writer: SummaryWriter, first: int) -> None:
    """TensorBoard's mark for a process that goes on at the step ``first``: what the folder has from there on is no longer shown."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer._get_file_writer().add_event(
        Event(session_log=SessionLog(status=SessionLog.START)), first
    )
