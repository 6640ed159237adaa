"""Makes the self-test of an engine, and takes two steps after it.

A case has "name", "overrides", "zero", and optionally "sabotage" (see ``training_steps``) and
"without" (no self-test).
"""

from __future__ import annotations

from typing import Any

from pretrain.config.load import load_recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import GuardError
from pretrain.engine.step import reduce_steps
from pretrain.verification.self_test import self_test
from tests.support.rank_worker import make_engine
from tests.support.workers.training_steps import sabotage, synthetic_step


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe("debug", ["logging.tensorboard=false", *case["overrides"]])
    engine, _ = make_engine(recipe, case["zero"])
    topology, timeline = engine.topology, Timeline(recipe)
    if "sabotage" in case:
        sabotage(engine, case["sabotage"])
    fault = ""
    if "without" not in case:
        try:
            self_test(engine, timeline, None)
        except GuardError as error:
            fault = str(error)
    engine.enter(timeline.at(0))
    results = [
        engine.train_step(synthetic_step(recipe, step, topology.dp_rank, topology.dp_size), 1.0)
        for step in range(2)
    ]
    losses, _ = reduce_steps(results, topology)
    return {
        "name": case["name"],
        "fault": fault,
        "losses": [loss.total for loss in losses],
        "norms": [result.grad_norm for result in results],
        "counts": dict(engine.counts()),
        "usage": engine.usage.take().tolist(),
    }
