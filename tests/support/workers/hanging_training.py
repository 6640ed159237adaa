"""The training command in which chosen ranks pause at chosen places: what a launcher starts in
place of launchers/pretrain.py.

PAUSES is a JSON list of {"rank", "place", "seconds"}, with a "step" (from 1) for a callback or a
forward pass.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pretrain.train
from pretrain.checkpoint.store import CheckpointStore
from pretrain.core.errors import run_command
from pretrain.run import build
from pretrain.training.trainer import Trainer


def sleep_before(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return function(*given, **named)

    return slow


def pause_at_step(trainer: Trainer, function: Callable[..., Any], step: int, seconds: float) -> Any:
    def slow(*given: Any, **named: Any) -> Any:
        # During a step the progress still counts the one before.
        if trainer.progress.step in (step, step - 1) and step not in done:
            done.add(step)
            stuck_here(seconds)
        return function(*given, **named)

    done: set[int] = set()
    return slow


def stuck_here(seconds: float) -> None:
    time.sleep(seconds)


def build_slow(*given: Any) -> Trainer:
    trainer = make_trainer(*given)
    for pause in PAUSES:
        place, seconds, step = pause["place"], pause["seconds"], pause.get("step", 0)
        if place == "callback":
            trainer.callbacks.on_step = pause_at_step(
                trainer, trainer.callbacks.on_step, step, seconds
            )
        elif place == "forward":
            model = trainer.engine.model
            model.forward = pause_at_step(trainer, model.forward, step, seconds)
        elif place == "data":
            trainer.loader.step_batches = pause_at_step(
                trainer, trainer.loader.step_batches, step, seconds
            )
        elif place == "validation":
            trainer.engine._forward = sleep_in_validation(trainer, seconds)
    return trainer


def sleep_in_validation(trainer: Trainer, seconds: float) -> Callable[..., Any]:
    forward = trainer.engine._forward

    def slow(*given: Any) -> Any:
        if not trainer.engine.model.training:
            time.sleep(seconds)
        return forward(*given)

    return slow


PAUSES = [
    pause
    for pause in json.loads(os.environ["PAUSES"])
    if pause["rank"] == int(os.environ.get("RANK", "0"))
]
make_trainer = build.build_trainer
build.build_trainer = build_slow
for entry in PAUSES:
    if entry["place"] == "save":
        CheckpointStore._write = sleep_before(CheckpointStore._write, entry["seconds"])
    elif entry["place"] == "packing":
        build.prepare_packing = sleep_before(build.prepare_packing, entry["seconds"])

if __name__ == "__main__":
    run_command(pretrain.train.main)
