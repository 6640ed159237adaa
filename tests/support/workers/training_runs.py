"""Runs the training command for many recipes in one start of the ranks, and prints each run's rows
as JSON.

Started by a launcher with the file of cases and the file for the results. A case has "name",
"arguments" of the command, "run_path", and optionally "resume_at": the run is then cut back to its
checkpoint of that step, and the same command goes on from there.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from deepspeed.utils import groups
from torch import distributed

from pretrain.checkpoint.layout import complete_checkpoints, step_folder, write_pointer
from pretrain.engine.topology import disconnect
from pretrain.run.folder import CHECKPOINTS, SUMMARY
from pretrain.train import main as train
from tests.support.tiny_run import curve, own_process


def cut_back(checkpoints: Path, step: int) -> None:
    """As if the run had ended with the checkpoint of ``step``."""
    for checkpoint in complete_checkpoints(checkpoints):
        if checkpoint != step_folder(checkpoints, step):
            shutil.rmtree(checkpoint)
    write_pointer(checkpoints, f"step_{step}")


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 returns is complete; the others wrote no rows."""
    groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP = {}, {}
    run = Path(case["run_path"])
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


def main() -> None:
    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with own_process():
        for case in cases:
            print(f"--- {case['name']}", flush=True)
            result = run_case(case)
            if distributed.get_rank() == 0:
                with output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    disconnect()


if __name__ == "__main__":
    main()
