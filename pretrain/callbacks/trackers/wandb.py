"""Weights & Biases.

WANDB_API_KEY, WANDB_MODE (``offline`` needs no network), WANDB_ENTITY and the rest come from the
environment.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pretrain.callbacks.base import Summary
from pretrain.callbacks.events import Events
from pretrain.callbacks.expert_usage import HEAT_MAP, HISTOGRAM, UsageFigures
from pretrain.callbacks.references import CheckpointReference
from pretrain.callbacks.tracking import Status, TrackedRun, Tracker
from pretrain.engine.monitor import ask_nothing

if TYPE_CHECKING:
    from wandb import Run

START_SECONDS = 60.0
FAREWELL_SECONDS = 2.0
EXIT_CODES: dict[Status, int] = {"finished": 0, "stopped": 0, "failed": 1}


class WandbTracker(Tracker):
    """Keeps its files in ``wandb/`` of the run's folder.

    It copies no code and no output of the terminal.
    """

    kind = "wandb"
    _run: Run

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Begin a run, or continue the one with this id."""
        import wandb

        ask_nothing()
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            group=run.group,
            tags=list(run.tags),
            config=run.config,
            dir=str(run.folder),
            id=run_id,
            resume="allow",
            # Another run of this process may belong to DeepSpeed's monitor.
            reinit="create_new",
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                init_timeout=START_SECONDS,
            ),
        )
        # W&B's step may not go back, but it must when a run resumes from a checkpoint. So the step
        # is a value like others, and the axis of all.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return self._run.id

    def log(self, events: Events, step: int) -> None:
        """Send the values of one step."""
        self._run.log({"step": step, **dict(events)})

    def log_usage(self, figures: UsageFigures) -> None:
        """Send the histogram and the heat map."""
        import wandb

        histogram = wandb.Histogram(np_histogram=(figures.counts, figures.edges))
        picture = wandb.Image(figures.heat_map, caption=f"step {figures.step}")
        self._run.log({"step": figures.step, HISTOGRAM: histogram, HEAT_MAP: picture})

    def log_checkpoint(self, checkpoint: CheckpointReference) -> None:
        """Log an artifact of references to its files, with its manifest as the only file.

        W&B's own checksums would read the whole checkpoint again: the manifest has the SHA-256 of
        every file, so that another content of the same path is another version.
        """
        import wandb

        artifact = wandb.Artifact(
            f"checkpoints-{self._run.id}", type="model", metadata=checkpoint.facts()
        )
        artifact.add_reference(checkpoint.uri, name="checkpoint", checksum=False)
        artifact.add_file(str(checkpoint.manifest))
        self._run.log_artifact(artifact, aliases=[f"step_{checkpoint.step}", *checkpoint.names])

    def finish(self, status: Status, summary: Summary, files: Sequence[Path]) -> None:
        """Send summary and files, and end."""
        import wandb

        self._run.summary.update({**summary, "status": status})
        for path in files:
            if path.suffix == ".png":
                self._run.log({path.stem: wandb.Image(str(path))})
        artifact = wandb.Artifact(f"run-{self._run.id}", type="run")
        for path in files:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)
        self._run.finish(exit_code=EXIT_CODES[status])

    def abandon(self) -> None:
        """End W&B's process: Python's end would wait for it while it tries to send.

        What it has not sent is in ``wandb/``, for ``wandb sync``.
        """
        # A tear-down here leaves nothing to do for W&B's hook at Python's end.
        farewell = threading.Thread(target=_tear_down, daemon=True)
        farewell.start()
        farewell.join(FAREWELL_SECONDS)
        # The tear-down may hang in the same request; then the process has to be killed.
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("wandb"):
                    child.kill()
                    child.wait(FAREWELL_SECONDS)


def _tear_down() -> None:
    import wandb

    wandb.teardown()
