"""Comet.

COMET_API_KEY, COMET_WORKSPACE and COMET_START_ONLINE (``0`` needs no network) come from the
environment.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.callbacks.base import Summary
from pretrain.callbacks.events import Events
from pretrain.callbacks.expert_usage import HEAT_MAP, HISTOGRAM, UsageFigures
from pretrain.callbacks.references import CheckpointReference
from pretrain.callbacks.tracking import Status, TrackedRun, Tracker

if TYPE_CHECKING:
    from comet_ml import CometExperiment

OFFLINE = "comet"


class CometTracker(Tracker):
    """Online, or offline into archives in ``comet/`` of the run's folder.

    Each start makes one archive; ``comet upload`` joins them. Each start also has its own folder:
    Comet distinguishes archives by letters from ``random``, whose state a resumed run restores from
    its checkpoint, so that the letters would repeat.
    """

    kind = "comet"
    _experiment: CometExperiment

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Begin an experiment, or continue the one with this key."""
        import comet_ml

        # To log.txt, as the records of every library, and not to the terminal.
        comet_logger = logging.getLogger("comet_ml")
        comet_logger.handlers = []
        comet_logger.propagate = True
        # uuid4 reads the system's randomness, not the generators that a resume restores.
        folder = run.folder / OFFLINE / uuid.uuid4().hex[:8]
        folder.mkdir(parents=True)
        self._experiment = comet_ml.start(
            project_name=run.project,
            experiment_key=run_id,
            mode="get_or_create",
            experiment_config=comet_ml.ExperimentConfig(
                name=run.name,
                tags=[*run.tags, *([run.group] if run.group else [])],
                offline_directory=str(folder),
                # environment.json has all this, without what may be private.
                log_code=False,
                log_graph=False,
                parse_args=False,
                log_git_metadata=False,
                log_git_patch=False,
                log_env_details=False,
                auto_output_logging="",
                auto_param_logging=False,
                auto_metric_logging=False,
                auto_log_co2=False,
                display_summary_level=0,
            ),
        )
        self._experiment.log_parameters(run.config)
        return str(self._experiment.get_key())

    def log(self, events: Events, step: int) -> None:
        """Send the values of one step."""
        self._experiment.log_metrics(dict(events), step=step)

    def log_usage(self, figures: UsageFigures) -> None:
        """Send the histogram and the heat map."""
        from comet_ml.data_structure import Histogram
        from PIL import Image

        histogram = Histogram()
        # Comet bins by itself: each of our bins counts at its middle.
        middles = (figures.edges[:-1] + figures.edges[1:]) / 2
        histogram.add(middles, figures.counts)
        self._experiment.log_histogram_3d(histogram, name=HISTOGRAM, step=figures.step)
        self._experiment.log_image(
            Image.fromarray(figures.heat_map), name=HEAT_MAP, step=figures.step
        )

    def log_checkpoint(self, checkpoint: CheckpointReference) -> None:
        """Log the folder's address and the manifest's hash; nothing is uploaded."""
        self._experiment.log_remote_asset(
            checkpoint.uri,
            remote_file_name=f"checkpoints/{checkpoint.path.name}",
            asset_type="checkpoint",
            step=checkpoint.step,
            metadata={**checkpoint.facts(), "names": ", ".join(checkpoint.names)},
        )

    def finish(self, status: Status, summary: Summary, files: Sequence[Path]) -> None:
        """Send summary and files, and end."""
        self._experiment.log_others({**summary, "status": status})
        for path in files:
            if path.suffix == ".png":
                self._experiment.log_image(str(path), name=path.stem)
            else:
                self._experiment.log_asset(str(path), overwrite=True)
        self._experiment.end()
