"""The training command with wrong numbers in it: what a launcher starts in place of
launchers/pretrain.py.

FAULTS is a JSON list of {"rank", "micro_batch", "place", "factor", "batches"}.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pretrain.train
from pretrain.core.errors import run_command
from pretrain.run import build
from pretrain.training.trainer import Trainer
from tests.support.fault_injection import Injection, poison_batches


def build_faulty(*given: Any) -> Trainer:
    trainer = make_trainer(*given)
    for fault in json.loads(os.environ["FAULTS"]):
        injection = Injection(
            trainer.engine,
            fault["rank"],
            fault["micro_batch"],
            fault["place"],
            float(fault["factor"]),
        )
        poison_batches(trainer, injection, set(fault["batches"]))
    return trainer


make_trainer = build.build_trainer
build.build_trainer = build_faulty

if __name__ == "__main__":
    run_command(pretrain.train.main)
