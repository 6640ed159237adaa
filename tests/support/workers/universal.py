"""Trains, converts to DeepSpeed's universal format, and goes on in engines of other shapes; writes
each one's next losses as JSON.

Started by a launcher with a folder for checkpoints, a tokenizer, and the file for the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups

from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.universal import UNIVERSAL_TAG, load_universal
from pretrain.config.load import load_recipe
from pretrain.config.rules.sections import check_topology
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.step import reduce_steps
from pretrain.engine.topology import connect, disconnect
from pretrain.export.convert import export_universal
from tests.support.workers.training_steps import synthetic_step

SIZES = [
    "model.vocab_size=128", "train.global_batch_size=8", "train.micro_batch_size=2", "train.sequence_length=32", "train.grad_clip=0.3",
    "model.initializer_range=0.15", "optimizer={kind: adamw, learning_rate: 3.0e-3}", "logging.tensorboard=false",
    "model.moe={kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 32, bias_balancing: {update_rate: 0.02}}",
]  # fmt: skip
SAVED_AT, STEPS = 2, 5
# ZeRO stage and ep_size of what is saved, and of what goes on. Stages 1 and 2 do not load into 3,
# nor the other way.
ROUTES = [((1, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (1, 1)), ((3, 2), (3, 1)), ((3, 1), (3, 2))]


def engine_of(zero: int, ep_size: int, universal: bool) -> tuple[Engine, dict[str, Any]]:
    groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP = {}, {}
    recipe = load_recipe("debug", [*SIZES, f"parallel.ep_size={ep_size}"])
    topology = connect(ep_size)
    ds_config: dict[str, Any] = {"zero_optimization": {"stage": zero}}
    if universal:
        ds_config["checkpoint"] = {"load_universal": True}
    accumulation = check_topology(recipe, topology.world_size, zero)
    ds_config = resolve_ds_config(
        ds_config, "the case", recipe, "fp32", accumulation, topology.world_size
    )
    return Engine(recipe, ds_config, "fp32", topology), ds_config


def losses(engine: Engine, first: int, last: int) -> list[list[float]]:
    """Cross-entropy, whole loss and gradient norm of each step."""
    topology = engine.topology
    steps = [
        engine.train_step(
            synthetic_step(engine.recipe, step, topology.rank, topology.world_size), 1.0, 0.02
        )
        for step in range(first, last)
    ]
    return [
        [mean.cross_entropy, mean.total, step.grad_norm]
        for mean, step in zip(reduce_steps(steps, topology)[0], steps, strict=True)
    ]


def main() -> None:
    folder, tokenizer, output = map(Path, sys.argv[-3:])
    results: list[dict[str, Any]] = []
    uninterrupted: dict[tuple[int, int], list[list[float]]] = {}
    for before, after, mended in [
        *((*route, True) for route in ROUTES),
        (*ROUTES[0], False),
        (*ROUTES[-1], False),
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
        if mended:
            load_universal(engine.deepspeed, universal)
        else:
            engine.deepspeed.load_checkpoint(
                str(universal), tag=UNIVERSAL_TAG, load_lr_scheduler_states=False
            )
        found = losses(engine, SAVED_AT, STEPS)
        results.append(
            {
                "before": before,
                "after": after,
                "mended": mended,
                "expected": uninterrupted[before],
                "found": found,
            }
        )
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(results))
    disconnect()


if __name__ == "__main__":
    main()
