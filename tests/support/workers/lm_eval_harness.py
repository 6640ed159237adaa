"""Runs lm-evaluation-harness for its tests, in a process of its own because importing it takes half
a minute.

``FOLDER CHECKPOINT EXPORT``: the same tasks on both. ``FOLDER CHECKPOINT``: options and errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.tool_runs import run_here

TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
    "local_until": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{sum}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}, {"metric": "chrf"}],
    },
}


def write_tasks(folder: Path) -> None:
    """Three tasks about sums, one of each type, and their data: files beside each other."""
    rows = []
    for first in range(5):
        for second in (3, 17):
            total = first + second
            choices = [f" {total + offset}" for offset in (-1, 0, 10)]
            text = "".join(
                f"{first} + {other} = {first + other}\n" for other in range(second, second + 40)
            )
            rows.append(
                {
                    "question": f"{first} + {second} =",
                    "choices": choices,
                    "answer": 1,
                    "sum": f" {total}",
                    "text": text,
                }
            )
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(
            json.dumps(common | task | {"metadata": {"version": 1}})
        )


def run(model: Path, folder: Path, *options: str) -> dict[str, Any]:
    output = folder / "result.json"
    arguments = [
        "--tasks",
        ",".join(TASKS),
        "--include-path",
        str(folder),
        "--batch-size",
        "7",
        *options,
    ]
    done = run_here(
        "evaluate.py",
        "--checkpoint",
        model,
        *arguments,
        "--json",
        output,
        "--markdown",
        folder / "report.md",
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(output.read_text())["tasks"])


def compare(folder: Path, checkpoint: Path, exported: Path) -> dict[str, Any]:
    results = {
        "native": run(checkpoint, folder),
        "report": (folder / "report.md").read_text(),
        "exported": run(exported, folder),
    }
    from pretrain.evaluation.tasks.harness_model import NativeHarnessModel

    NativeHarnessModel.prefix_token_id = property(lambda self: 5)
    return results | {"other prefix": run(checkpoint, folder)}


def refuse(folder: Path, checkpoint: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        "whole": run(checkpoint, folder),
        "limited": run(checkpoint, folder, "--limit", "3", "--num-fewshot", "1"),
    }
    options = ("--include-path", folder, "--tasks")
    unknown = run_here("evaluate.py", "--checkpoint", checkpoint, *options, "local_choise")
    (folder / "sums.jsonl").unlink()
    gone = run_here("evaluate.py", "--checkpoint", checkpoint, *options, "local_choice")
    return results | {
        "unknown": [unknown.returncode, unknown.stderr],
        "data gone": [gone.returncode, gone.stderr],
    }


def main() -> None:
    folder, *models = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    write_tasks(folder)
    results = compare(folder, *models) if len(models) == 2 else refuse(folder, *models)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
