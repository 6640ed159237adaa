"""MLflow.

MLFLOW_TRACKING_URI, user, password and token come from the environment; without a URI it writes
into the run's folder.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.callbacks.base import Summary
from pretrain.callbacks.events import Events
from pretrain.callbacks.expert_usage import HEAT_MAP, HISTOGRAM, UsageFigures
from pretrain.callbacks.references import CheckpointReference
from pretrain.callbacks.tracking import Status, TrackedRun, Tracker
from pretrain.core.files import JsonObject

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow_artifacts"
STATES: dict[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# MLflow's limits: entries of one request, and characters of a parameter's value.
MAX_METRICS = 1000
MAX_PARAMETERS = 100
MAX_CHARACTERS = 6000


class MLflowTracker(Tracker):
    """A project is an experiment of MLflow, a run is a run; files become its artifacts."""

    kind = "mlflow"
    _client: MlflowClient
    _id: str

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Begin a run, or continue the one with this id."""
        from mlflow.tracking import MlflowClient

        # At INFO they report each migration of a new database.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        address = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(address or f"sqlite:///{(run.folder / DATABASE).resolve()}")
        if run_id is None:
            tags = dict.fromkeys(run.tags, "true") | ({"group": run.group} if run.group else {})
            self._id = self._client.create_run(
                self._experiment(run, local=not address), tags=tags, run_name=run.name
            ).info.run_id
        else:
            self._id = run_id
            self._client.update_run(run_id, status="RUNNING")
        self._log_parameters(run.config)
        return self._id

    def _experiment(self, run: TrackedRun, local: bool) -> str:
        found = self._client.get_experiment_by_name(run.project)
        if found is not None:
            return str(found.experiment_id)
        # A server chooses the place of artifacts itself.
        place = (run.folder / ARTIFACTS).resolve().as_uri() if local else None
        return str(self._client.create_experiment(run.project, artifact_location=place))

    def _log_parameters(self, config: JsonObject) -> None:
        """Log the parameters that the run does not have yet.

        MLflow refuses to change a parameter; recipe.yaml has them as they are now.
        """
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        new = [
            Param(name, str(value)[:MAX_CHARACTERS])
            for name, value in _flat(config)
            if name not in known
        ]
        for first in range(0, len(new), MAX_PARAMETERS):
            self._client.log_batch(self._id, params=new[first : first + MAX_PARAMETERS])

    def log(self, events: Events, step: int) -> None:
        """Send the values of one step."""
        from mlflow.entities import Metric

        # MLflow counts milliseconds.
        now = int(time.time() * 1000)
        metrics = [Metric(tag, value, now, step) for tag, value in events]
        for first in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + MAX_METRICS])

    def log_usage(self, figures: UsageFigures) -> None:
        """Send the heat map as a picture, and the histogram as JSON: MLflow has no histograms."""
        from PIL import Image

        place = f"step_{figures.step:06d}"
        self._client.log_image(
            self._id, Image.fromarray(figures.heat_map), f"{HEAT_MAP}/{place}.png"
        )
        histogram = {"counts": figures.counts.tolist(), "edges": figures.edges.tolist()}
        self._client.log_dict(self._id, histogram, f"{HISTOGRAM}/{place}.json")

    def log_checkpoint(self, checkpoint: CheckpointReference) -> None:
        """Set a tag of the checkpoint's step, and one of each name that it has."""
        facts = json.dumps(checkpoint.facts())
        for name in (checkpoint.path.name, *checkpoint.names):
            self._client.set_tag(self._id, f"checkpoint.{name}", facts)

    def finish(self, status: Status, summary: Summary, files: Sequence[Path]) -> None:
        """Send summary and files, and end."""
        if summary:
            self._client.log_dict(self._id, summary, "summary.json")
        for path in files:
            self._client.log_artifact(self._id, str(path))
        self._client.set_terminated(self._id, STATES[status])


def _flat(section: JsonObject, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted names, in the characters that MLflow allows, and values."""
    for key, value in section.items():
        name = "".join(
            letter if letter.isalnum() or letter in "_-./ " else "_" for letter in f"{prefix}{key}"
        )
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
