"""Runs many training configurations in one start of the processes and prints each step's loss and gradient norm as JSON.

Started by a launcher; reads a list of cases from the file in argv[1]. A case: {"name", "overrides", "zero", "steps"} and optionally
"sabotage": the name of a deliberate fault that the equality tests must notice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups

from data_pipeline.loader import Batch
from pretrain.config.load import load_recipe
from pretrain.config.rules import check_topology
from pretrain.config.schema import Recipe
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine, reduce_steps
from pretrain.engine.precision import resolve_precision
from pretrain.engine.topology import connect, disconnect


def synthetic_step(recipe: Recipe, step: int, rank: int, world_size: int) -> list[Batch]:
    """Random tokens with structure, a pure function of the step, spread over ranks as the loader spreads them."""
    train, vocab_size = recipe.train, recipe.model.vocab_size
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, vocab_size, (train.global_batch_size, train.sequence_length + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % vocab_size
    micro = tokens.split(train.micro_batch_size)[rank::world_size]
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None) for part in micro]


def sabotage(engine: Engine, kind: str) -> None:
    """Breaks one thing on purpose."""
    if kind == "expert_gradient_scaled":
        parameter = next(p for p in engine.model.parameters() if not getattr(p, "allreduce", True))
        parameter.register_hook(lambda gradient: gradient * 1.01)
    elif kind == "rank_norm_dropped":
        original = engine._clip_at_stage_0

        def without_experts() -> torch.Tensor | None:
            group, engine._expert_group = engine._expert_group, None
            try:
                return original()
            finally:
                engine._expert_group = group

        engine._clip_at_stage_0 = without_experts  # type: ignore[method-assign]
    else:
        raise ValueError(kind)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP = {}, {}
    recipe = load_recipe("debug", ["logging.tensorboard=false", *case["overrides"]])
    topology = connect(recipe.parallel.ep_size)
    accumulation = check_topology(recipe, topology.world_size, case["zero"])
    precision = resolve_precision(recipe.train.precision)
    ds_config = {"zero_optimization": {"stage": case["zero"]}, **case.get("ds_config", {})}
    ds_config = resolve_ds_config(ds_config, "the case", recipe, precision, accumulation, topology.world_size)
    engine = Engine(recipe, ds_config, precision, topology)
    for kind in case.get("sabotage", []):
        sabotage(engine, kind)
    results = [
        engine.train_step(synthetic_step(recipe, step, topology.rank, topology.world_size), 1.0) for step in range(case["steps"])
    ]
    losses, _ = reduce_steps(results, topology)
    nll, tokens = engine.evaluate(synthetic_step(recipe, 77, topology.rank, topology.world_size))
    return {
        "name": case["name"],
        "nll": [loss[0] for loss in losses],
        "loss": [loss[1] for loss in losses],
        "grad_norm": [result.grad_norm for result in results],
        "applied": [result.applied for result in results],
        "validation": nll / tokens,
    }


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    output = Path(sys.argv[2])
    for case in cases:
        result = run_case(case)
        if torch.distributed.get_rank() == 0:
            with output.open("a") as file:
                file.write(json.dumps(result) + "\n")
    disconnect()


if __name__ == "__main__":
    main()
