"""Tasks of lm-evaluation-harness from local files: our checkpoint gets the numbers that the
harness's own class gives its export.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.core.errors import BAD_DATA, USAGE
from tests.support.hf_folders import edit_json
from tests.support.paths import WORKERS
from tests.support.tiny_checkpoint import Trained

WORKER = WORKERS / "lm_eval_harness.py"


def run_worker(folder: Path, *models: Path) -> dict[str, Any]:
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(WORKER), str(folder), *map(str, models)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | offline, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((folder / "results.json").read_text()))


def test_a_checkpoint_has_the_results_of_its_export_and_not_those_of_another_prefix(
    trained: Trained, exported: Path, tmp_path: Path
) -> None:
    # Sampling defaults, such as chat models bring along, are not those of a task.
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    edit_json(
        folder, "generation_config.json", do_sample=True, temperature=0.6, repetition_penalty=3.0
    )
    results = run_worker(tmp_path, trained.checkpoint, folder)
    native, exported_results = results["native"], results["exported"]
    assert (
        native.keys() == exported_results.keys() == {"local_choice", "local_rolling", "local_until"}
    )
    for task, metrics in native.items():
        assert metrics.keys() == exported_results[task].keys() and len(metrics) > 2
        for name, value in metrics.items():
            expected = exported_results[task][name]
            assert value == (expected if expected is None else pytest.approx(expected, abs=5e-5)), (
                task,
                name,
            )
    assert (
        native["local_rolling"]["bits_per_byte,none"] > 0 and native["local_until"]["chrf,none"] > 0
    )
    other = results["other prefix"]["local_rolling"]
    assert other["bits_per_byte,none"] != pytest.approx(
        native["local_rolling"]["bits_per_byte,none"], abs=5e-5
    )
    assert "| local_choice | acc,none | " in results["report"]


@pytest.mark.full
def test_options_count_and_what_cannot_be_run_is_a_sentence(
    trained: Trained, tmp_path: Path
) -> None:
    results = run_worker(tmp_path, trained.checkpoint)
    whole, limited = (
        results[name]["local_rolling"]["bits_per_byte,none"] for name in ("whole", "limited")
    )
    assert limited != pytest.approx(whole, abs=1e-6)
    code, said = results["unknown"]
    assert (
        code == USAGE
        and "there is no task 'local_choise': there are local_choice" in said
        and "Traceback" not in said
    )
    code, said = results["data gone"]
    assert code == BAD_DATA and "local_choice cannot be loaded" in said and "Traceback" not in said
