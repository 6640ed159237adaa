"""Runs the training command, and returns the run's records.

A case has "name",
"arguments" of the command, "run_path", and optionally "resume_at": the run is then cut back to its
checkpoint of that step, and the same command resumes from there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import distributed

from pretrain.checkpoint.layout import complete_checkpoints, step_folder, write_pointer
from pretrain.run.folder import CHECKPOINTS, SUMMARY
from pretrain.train import main as train
from tests.support.rank_worker import forget_expert_groups
from tests.support.tiny_run import curve, own_process


def cut_back(checkpoints: Path, step: int) -> None:
    """As if the run had ended with the checkpoint of ``step``."""
    for checkpoint in complete_checkpoints(checkpoints):
        if checkpoint != step_folder(checkpoints, step):
            shutil.rmtree(checkpoint)
    write_pointer(checkpoints, f"step_{step}")


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 returns is complete; the others wrote no records."""
    forget_expert_groups()
    run = Path(case["run_path"])
    with own_process():
        result: dict[str, Any] = {"name": case["name"], "codes": [train(case["arguments"])]}
        is_main = distributed.get_rank() == 0
        result["curve"] = curve(run) if is_main else []
        if "resume_at" in case:
            distributed.barrier()
            if is_main:
                cut_back(run / CHECKPOINTS, case["resume_at"])
            distributed.barrier()
            result["codes"].append(train(case["arguments"]))
            if is_main:
                result |= {
                    "resumed": curve(run),
                    "resumed_from": json.loads((run / SUMMARY).read_text())["resumed_from_step"],
                }
    return result
