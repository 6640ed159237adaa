"""Tasks of lm-evaluation-harness from local files: our checkpoint gets the numbers that the harness's own class gives its export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.errors import BAD_DATA, USAGE
from tests.export.tiny_checkpoint import Trained

WORKER = Path(__file__).with_name("harness_worker.py")


@pytest.fixture(scope="module")
def results(trained: Trained, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(folder), str(trained.checkpoint), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | offline, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((folder / "results.json").read_text()))


def test_a_checkpoint_has_the_results_of_its_export_and_not_those_of_another_prefix(results: dict[str, Any]) -> None:
    native, exported = results["native"], results["exported"]
    assert native.keys() == exported.keys() == {"local_choice", "local_rolling", "local_until"}
    for task, metrics in native.items():
        assert metrics.keys() == exported[task].keys() and len(metrics) > 2
        for name, value in metrics.items():
            assert value == (exported[task][name] if value is None else pytest.approx(exported[task][name], abs=5e-5)), (task, name)
    assert 0.3 < native["local_choice"]["acc,none"] and native["local_until"]["exact_match,none"] > 0
    assert results["other prefix"]["local_rolling"]["bits_per_byte,none"] != pytest.approx(native["local_rolling"]["bits_per_byte,none"], abs=5e-5)
    assert results["limited"]["local_rolling"]["bits_per_byte,none"] != native["local_rolling"]["bits_per_byte,none"]
    assert "| local_choice | acc,none | " in results["report"]


def test_a_task_that_is_not_there_and_data_that_is_gone_are_sentences(results: dict[str, Any]) -> None:
    code, said = results["unknown"]
    assert code == USAGE and "there is no task 'local_choise': there are local_choice" in said and "Traceback" not in said
    code, said = results["data gone"]
    assert code == BAD_DATA and "local_choice cannot be loaded" in said and "Traceback" not in said
