"""Trains, converts to DeepSpeed's universal format, and resumes in engines of other shapes.

A case has "name", "folder" for the checkpoints and "tokenizer", a file. The result has a record for
each route; "complete" is false if DeepSpeed alone loaded the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.universal import UNIVERSAL_TAG, load_universal
from pretrain.config.load import load_recipe
from pretrain.engine.engine import Engine
from pretrain.engine.step import reduce_steps
from pretrain.export.convert import export_universal
from tests.support.rank_worker import make_engine
from tests.support.workers.training_steps import synthetic_step

SIZES = [
    "model.vocab_size=128", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.sequence_length=32", "train.grad_clip=0.3",
    "model.initializer_range=0.15", "optimizer={kind: adamw, learning_rate: 3.0e-3}",
    "logging.tensorboard=false",
    "model.moe={kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 32, bias_balancing: {update_rate: 0.02}}",
]  # fmt: skip
SAVED_AT, STEPS = 2, 5
DENSE = ["model.layer_pattern.kind=all_dense", "model.intermediate_size=48"]
# ZeRO stage and ep_size of what is saved, and of what resumes; ep_size 0 is a dense model.
ROUTES = [
    ((0, 2), (1, 1)), ((1, 2), (2, 1)), ((1, 2), (3, 2)), ((2, 1), (1, 2)), ((3, 2), (3, 1)),
    ((3, 2), (2, 2)), ((0, 0), (2, 0)),
]  # fmt: skip
# That DeepSpeed alone loads.
INCOMPLETE = [ROUTES[0], ROUTES[4]]


def engine_of(zero: int, ep_size: int, *, universal: bool) -> tuple[Engine, dict[str, Any]]:
    kind = [f"parallel.ep_size={ep_size}"] if ep_size else DENSE
    recipe = load_recipe("debug", [*SIZES, *kind])
    return make_engine(recipe, zero, {"checkpoint": {"load_universal": True}} if universal else {})


def losses(engine: Engine, first: int, last: int) -> list[list[float]]:
    """Cross-entropy, whole loss and gradient norm of each step."""
    topology = engine.topology
    balancing = getattr(engine.recipe.model.moe, "bias_balancing", None)
    rate = 0.0 if balancing is None else balancing.update_rate
    steps = [
        engine.train_step(
            synthetic_step(engine.recipe, step, topology.dp_rank, topology.dp_size), 1.0, rate
        )
        for step in range(first, last)
    ]
    return [
        [mean.cross_entropy, mean.total, step.grad_norm]
        for mean, step in zip(reduce_steps(steps, topology)[0], steps, strict=True)
    ]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    folder, tokenizer = Path(case["folder"]), Path(case["tokenizer"])
    routes: list[dict[str, Any]] = []
    uninterrupted: dict[tuple[int, int], list[list[float]]] = {}
    for before, after, complete in [
        *((*route, True) for route in ROUTES),
        *((*route, False) for route in INCOMPLETE),
    ]:
        universal = folder / f"universal_{before[0]}_{before[1]}"
        if before not in uninterrupted:
            engine, ds_config = engine_of(*before, universal=False)
            losses(engine, 0, SAVED_AT)
            saved = CheckpointStore(
                folder / f"zero{before[0]}_ep{before[1]}", engine, ds_config, tokenizer
            ).save(SAVED_AT, {"step": SAVED_AT})
            if engine.topology.is_main:
                export_universal(saved, universal, overwrite=False)
            engine.topology.barrier()
            uninterrupted[before] = losses(engine, SAVED_AT, STEPS)
        engine, _ = engine_of(*after, universal=True)
        if complete:
            load_universal(engine.deepspeed, universal)
        else:
            engine.deepspeed.load_checkpoint(
                str(universal), tag=UNIVERSAL_TAG, load_lr_scheduler_states=False
            )
        routes.append(
            {
                "before": before,
                "after": after,
                "complete": complete,
                "expected": uninterrupted[before],
                "found": losses(engine, SAVED_AT, STEPS),
            }
        )
    return {"name": case["name"], "routes": routes}
