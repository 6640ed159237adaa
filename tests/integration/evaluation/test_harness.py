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
import torch

from pretrain.config.load import load_recipe
from pretrain.core.errors import BAD_DATA, USAGE, ConfigError
from pretrain.evaluation.generation.generators import open_generator
from pretrain.evaluation.tasks.harness import check_tasks, run_tasks
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


PUBLISHED_TASKS = ["hellaswag", "mmlu", "truthfulqa", "gsm8k", "humaneval"]
RUNS_CODE = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
unsafe_code: true
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "5"
generation_kwargs: {{until: ["\n"], max_gen_toks: 2}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""


def test_a_task_that_runs_the_models_code_needs_permission_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_recipe("peer_mla_16b").evaluation is not None
    assert load_recipe("peer_mla_16b").evaluation.tasks == PUBLISHED_TASKS
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    check_tasks(PUBLISHED_TASKS)
    for task in ("one", "two"):
        (tmp_path / f"{task}.yaml").write_text(RUNS_CODE.format(task=task, folder=tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 3 ="}\n')
    check_tasks(["one"], tmp_path)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    with pytest.raises(ConfigError, match="one runs the code that the model writes: set HF_ALLOW"):
        check_tasks(["one"], tmp_path)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_task_inside_of_a_group_needs_the_permission_too(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    (tmp_path / "one.yaml").write_text(RUNS_CODE.format(task="one", folder=tmp_path))
    (tmp_path / "group.yaml").write_text("group: both\ntask: [one]\nmetadata: {version: 1}\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 3 ="}\n')
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", str(int(allowed)))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    opened = open_generator(trained.checkpoint, torch.device("cpu"))
    if allowed:
        assert "one" in run_tasks(opened, ["both"], tmp_path)
        return
    with pytest.raises(ConfigError, match="one runs the code that the model writes"):
        run_tasks(opened, ["both"], tmp_path)
