"""The training command in which chosen ranks pause at chosen places: what a launcher starts in
place of launchers/pretrain.py.

PAUSES is a JSON list of {"rank", "place", "seconds"}, with "finished", a number of steps, for a
callback, a forward pass or data.
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


def pause_after(
    trainer: Trainer, function: Callable[..., Any], finished: int, seconds: float
) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        if trainer.progress.step == finished and not done:
            done.append(finished)
            stuck_here(seconds)
        return function(*given, **named)

    done: list[int] = []
    return slow


def stuck_here(seconds: float) -> None:
    time.sleep(seconds)


def build_slow(*given: Any) -> Trainer:
    trainer = make_trainer(*given)
    for pause in PAUSES:
        place, seconds, finished = pause["place"], pause["seconds"], pause.get("finished", 0)
        if place == "callback":
            trainer.callbacks.on_step = pause_after(
                trainer, trainer.callbacks.on_step, finished, seconds
            )
        elif place == "forward":
            model = trainer.engine.model
            model.forward = pause_after(trainer, model.forward, finished, seconds)
        elif place == "data":
            trainer.loader.step_batches = pause_after(
                trainer, trainer.loader.step_batches, finished, seconds
            )
        elif place == "validation":
            trainer.engine._forward = sleep_in_validation(trainer, seconds)
    return trainer


def sleep_in_validation(trainer: Trainer, seconds: float) -> Callable[..., Any]:
    forward = trainer.engine._forward
    slept: list[float] = []

    def slow(*given: Any) -> Any:
        # The run's end reads the whole split, in too many batches to sleep before each.
        if not trainer.engine.model.training and len(slept) < 4:
            slept.append(seconds)
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
        build.prepare_files = sleep_before(build.prepare_files, entry["seconds"])

if __name__ == "__main__":
    run_command(pretrain.train.main)
