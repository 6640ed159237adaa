"""DeepSpeed's monitor: the sections tensorboard, csv_monitor, wandb and comet of a ds_config.

DeepSpeed's own MonitorMaster is created inside its engine and raises there, and in every step, what
a service without a network raises. This one replaces it and cannot stop a training. A backend is
open only if its section is enabled; ours enable TensorBoard alone, if the recipe does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import Monitor as Backend
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor
from tqdm import tqdm

from pretrain.core.credentials import redact
from pretrain.core.files import JsonObject

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


def ask_nothing() -> None:
    """Make ``wandb.init`` fail instead of asking for a key on the terminal.

    Its question would be below the progress bar, with every rank waiting for the reply.
    """
    import wandb

    wandb.setup(wandb.Settings(silent=True))


def wandb_without_questions(section: Any) -> Backend:
    """DeepSpeed's W&B backend, which never waits for a person."""
    ask_nothing()
    return WandbMonitor(section)


BACKENDS: dict[str, Callable[[Any], Backend]] = {
    "tensorboard": TensorBoardMonitor,
    "csv_monitor": csvMonitor,
    "wandb": wandb_without_questions,
    "comet": CometMonitor,
}
# DeepSpeed's engine reports by samples. W&B refuses a step below an earlier one, so our records
# must count samples there too.
COUNT_SAMPLES = ("wandb", "comet")
TENSORBOARD = "tensorboard"
VALIDATION = "validation"
# TensorBoard draws equal tags of several runs into one chart: the validation loss is written to a
# separate run below the training's, under the training loss's tag.
TRAIN_LOSS = "at_a_glance/1_loss"
VALIDATION_LOSS = "at_a_glance/1_loss_validation"


def without_monitors(ds_config: JsonObject) -> JsonObject:
    """The ds_config that DeepSpeed's engine is created with."""
    return {name: section for name, section in ds_config.items() if name not in BACKENDS}


class Monitor:
    """Replaces ``DeepSpeedEngine.monitor``; a backend that fails is reported once and closed.

    Args:
        writes: whether this process is rank 0; others have no backends.
        samples: how many samples the engine has seen.
    """

    def __init__(self, ds_config: JsonObject, writes: bool, samples: Callable[[], int]) -> None:
        self._samples = samples
        self._backends: dict[str, Backend] = {}
        if not writes:
            return
        config = get_monitor_config(ds_config)
        for name in BACKENDS:
            if (section := getattr(config, name)).enabled:
                self._try(name, partial(self._open, name, section))

    @property
    def enabled(self) -> bool:
        """Whether any backend is open."""
        return bool(self._backends)

    @property
    def summary_writer(self) -> SummaryWriter | None:
        """TensorBoard's writer, for images and histograms; None without TensorBoard."""
        return self._writer(TENSORBOARD)

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Write what DeepSpeed's engine reports on its own: (tag, value, samples).

        TensorBoard gets none of it: the learning rate and the loss scale are in our records, by
        step.
        """
        for name, backend in self._but_tensorboard():
            self._try(name, partial(backend.write_events, events))

    def write_record(self, events: Sequence[tuple[str, float]], step: int) -> None:
        """Write the values of one step, by step if the backend can, else by samples."""
        for name, backend in self._but_tensorboard():
            # These backends are shared with DeepSpeed's engine, which writes by samples.
            x = self._samples() if name in COUNT_SAMPLES else step
            placed = [(tag, value, x) for tag, value in events]
            self._try(name, partial(backend.write_events, placed))
        validation = [(TRAIN_LOSS, value, step) for tag, value in events if tag == VALIDATION_LOSS]
        others = [(tag, value, step) for tag, value in events if tag != VALIDATION_LOSS]
        for name, placed in ((TENSORBOARD, others), (VALIDATION, validation)):
            if placed and (backend := self._backends.get(name)) is not None:
                self._try(name, partial(backend.write_events, placed))

    def begin_after(self, step: int) -> None:
        """Hide TensorBoard's events of later steps, which are repeated; the others keep both."""
        for name in (TENSORBOARD, VALIDATION):
            if (writer := self._writer(name)) is not None:
                self._try(name, partial(_begin_session, writer, step + 1))

    def _open(self, name: str, section: Any) -> None:
        self._backends[name] = BACKENDS[name](section)
        if name == TENSORBOARD:
            # The separate run for the validation loss, see TRAIN_LOSS.
            below = section.model_copy(update={"job_name": f"{section.job_name}/{VALIDATION}"})
            self._backends[VALIDATION] = TensorBoardMonitor(below)

    def _writer(self, name: str) -> SummaryWriter | None:
        backend = self._backends.get(name)
        return None if backend is None else backend.summary_writer

    def _but_tensorboard(self) -> list[tuple[str, Backend]]:
        return [
            (name, backend)
            for name, backend in self._backends.items()
            if name not in (TENSORBOARD, VALIDATION)
        ]

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """Run an action of a backend; if it fails, warn once and close the backend."""
        try:
            action()
        # Any service may raise anything, and none of it is worth a training.
        except Exception as error:
            self._backends.pop(name, None)
            reason = redact(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            logger.warning("the ds_config's '%s' failed: %s", name, reason)
            tqdm.write(
                f"warning: the ds_config's '{name}' failed ({reason}) and gets nothing more; "
                "training continues",
                file=sys.stderr,
            )


def _begin_session(writer: SummaryWriter, first: int) -> None:
    """Write TensorBoard's mark of a restart: events from ``first`` on are hidden."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer._get_file_writer().add_event(
        Event(session_log=SessionLog(status=SessionLog.START)), first
    )
