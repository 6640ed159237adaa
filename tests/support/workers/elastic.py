"""Trains, saves and continues on any topology, and says what the whole model's state is.

A case has "name", "folder", "overrides", "zero", "steps", and optionally "load" (a checkpoint) or
"save" (whether to save after the steps, and then take "after" more).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.checkpoint.state_hashes import state_hashes
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.engine.engine import Engine
from pretrain.engine.step import reduce_steps
from tests.support.rank_worker import make_engine
from tests.support.workers.training_steps import synthetic_step


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    recipe, folder = load_recipe("debug", case["overrides"]), Path(case["folder"])
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer = folder / "tokenizer.json"
    engine, ds_config = make_engine(recipe, case["zero"])
    topology = engine.topology
    if topology.is_main:
        tokenizer.write_text("{}")
    store = CheckpointStore(folder / "checkpoints", engine, ds_config, tokenizer)
    step = 0
    if "load" in case:
        step = store.load(Path(case["load"])).state["step"]
    # Saved at once: the state has been through the engine, and no step has changed it.
    result: dict[str, Any] = {"name": case["name"]}
    if "load" in case:
        folder_again = store.save(step, {"step": step})
        result["hashes"] = state_hashes(folder_again) if topology.is_main else {}
    losses, norms = _train(engine, recipe, step, case["steps"])
    if case.get("save"):
        step += case["steps"]
        saved = store.save(step, {"step": step}, background=case.get("background", False))
        # Training continues at once: what is written must be the state of before.
        losses, norms = _train(engine, recipe, step, case["after"])
        store.finish()
        result |= {"saved": str(saved), "hashes": state_hashes(saved) if topology.is_main else {}}
    topology.barrier()
    return result | {"losses": losses, "norms": norms}


def _train(
    engine: Engine, recipe: Recipe, first_step: int, steps: int
) -> tuple[list[float], list[float]]:
    """Each step's loss with router losses, over all ranks, and its gradient norm."""
    moe = recipe.model.moe
    rate = moe.bias_balancing.update_rate if getattr(moe, "bias_balancing", None) else 0.0
    topology = engine.topology
    results = []
    for number in range(first_step, first_step + steps):
        batches = synthetic_step(recipe, number, topology.dp_rank, topology.dp_size)
        results.append(engine.train_step(batches, 1.0, rate))
    losses, _ = reduce_steps(results, topology)
    return [loss.total for loss in losses], [result.grad_norm for result in results]
