"""MLflow beside real runs, in a folder of packages of its own: where it is installed, DeepSpeed
imports it at every start, for seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.core.files import file_sha256
from pretrain.engine.topology import free_port
from tests.support.package_environment import environment_with
from tests.support.paths import ROOT
from tests.support.tiny_run import Tiny, curve

pytestmark = pytest.mark.full
READ_BACK = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient("sqlite:///" + sys.argv[1])
(run,) = client.search_runs([client.get_experiment_by_name("project-of-tests").experiment_id])
history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "at_a_glance/1_loss")}
perplexity = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "validation/perplexity")}
files = [entry.path for entry in client.list_artifacts(run.info.run_id)]
pictures = [entry.path for entry in client.list_artifacts(run.info.run_id, "usage/load_by_layer")]
found = {"pictures": pictures, "id": run.info.run_id, "status": run.info.status, "params": run.data.params, "tags": run.data.tags, "loss": history, "perplexity": perplexity, "files": files}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def with_mlflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds MLflow."""
    environment = environment_with(
        ["mlflow-skinny>=3.17,<4", "sqlalchemy", "alembic"], tmp_path_factory.mktemp("site")
    )
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}


def train(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_mlflow_goes_on_in_the_same_run_with_every_row(
    tiny: Tiny, tmp_path: Path, with_mlflow: dict[str, str]
) -> None:
    run, tracked = (
        tmp_path / "run",
        "trackers={kinds: [mlflow], project: project-of-tests, group: a-group, tags: [first-tag]}",
    )
    every = "logging.usage_interval_steps=2"
    for steps in (2, 4):
        arguments = tiny.arguments(run, tracked, every, "parallel.ep_size=1", steps=steps)
        done = train(arguments, with_mlflow)
        assert done.returncode == 0, done.stderr
    read = subprocess.run(
        [sys.executable, "-c", READ_BACK, str(run / "mlflow.db")],
        env=with_mlflow,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(read.stdout.splitlines()[-1])
    assert (
        found["id"] == json.loads((run / "trackers.json").read_text())["mlflow"]
        and found["status"] == "FINISHED"
    )
    assert (
        found["params"]["model.moe.num_experts"] == "4"
        and found["tags"]["group"] == "a-group"
        and found["tags"]["first-tag"] == "true"
    )
    assert {int(step): value for step, value in found["loss"].items()} == {
        row["step"]: row["loss"] for row in curve(run) if row["kind"] == "train"
    }
    assert {int(step): value for step, value in found["perplexity"].items()} == {
        row["step"]: row["validation_perplexity"]
        for row in curve(run)
        if row["kind"] == "validation"
    }
    assert {"training_curves.png", "summary.json", "README.md"} <= set(found["files"])
    assert found["pictures"] == [f"usage/load_by_layer/step_00000{step}.png" for step in (2, 4)]
    checkpoint = run / "checkpoints" / "step_4"
    facts = json.loads(found["tags"]["checkpoint.step_4"])
    assert facts["uri"] == checkpoint.as_uri() and facts["step"] == 4
    assert facts["manifest_sha256"] == file_sha256(checkpoint / "manifest.json")
    assert json.loads(found["tags"]["checkpoint.latest"]) == facts


def test_a_server_that_does_not_answer_is_told_once_without_its_password(
    tiny: Tiny, tmp_path: Path, with_mlflow: dict[str, str]
) -> None:
    run = tmp_path / "run"
    nowhere = {
        "MLFLOW_TRACKING_URI": f"http://somebody:pa55word@127.0.0.1:{free_port()}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    done = train(
        tiny.arguments(run, "trackers={kinds: [mlflow]}", "parallel.ep_size=1", steps=2),
        with_mlflow | nowhere,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("warning: the tracker mlflow failed")
        == done.stderr.count("the tracker mlflow")
        == 1
    )
    assert "pa55word" not in done.stdout + done.stderr + (run / "log.txt").read_text()
    assert [row["step"] for row in curve(run) if row["kind"] == "train"] == [1, 2]
