"""Trains, saves as DeepSpeed does, and continues from a checkpoint.

A case has "name", "recipe" with "overrides", "zero", and either "saves" (a folder for both kinds of
checkpoint, after ``SAVED_AT`` steps) or "loads" (a checkpoint). The result has the losses of the
steps that follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.load import load_recipe
from tests.support.rank_worker import make_engine
from tests.support.workers.universal import losses

SAVED_AT, STEPS = 3, 6


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe(case["recipe"], case["overrides"])
    engine, ds_config = make_engine(recipe, case["zero"])
    folder = Path(case.get("saves", "unused"))
    store = CheckpointStore(folder / "ours", engine, ds_config, Path(case["tokenizer"]))
    if "saves" in case:
        losses(engine, 0, SAVED_AT)
        store.save(SAVED_AT, {"step": SAVED_AT})
        engine.deepspeed.save_checkpoint(str(folder / "deepspeed"), tag=f"global_step{SAVED_AT}")
    else:
        store.load(Path(case["loads"]))
    return {"name": case["name"], "losses": losses(engine, SAVED_AT, STEPS)}
