"""Trains with one step that is skipped: what it leaves behind, and what is reported about it.

A case has "name", "overrides", "zero", "place", "rank", "micro_batch", and optionally
"without_skipped": a second engine then takes only the steps that count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.engine.engine import Engine
from pretrain.guards.locate import find_non_finite
from tests.support.fault_injection import Injection
from tests.support.rank_worker import make_engine
from tests.support.workers.training_steps import synthetic_step

# A scale of 256 that one overflow halves: both are seen within five steps.
FP16 = {"fp16": {"enabled": "auto", "initial_scale_power": 8, "hysteresis": 1}}


def engine_of(case: dict[str, Any]) -> tuple[Recipe, Engine]:
    recipe = load_recipe("debug", ["logging.tensorboard=false", *case["overrides"]])
    return recipe, make_engine(recipe, case["zero"], FP16)[0]


def tensors_of(engine: Engine) -> Iterator[torch.Tensor]:
    """Everything that a step may move: weights, master weights, buffers, moments and step counts,
    tables and theirs.
    """
    for parameter in engine.model.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
    yield from (
        buffer for name, buffer in engine.model.named_buffers() if not name.endswith("usage_E")
    )  # choices count, applied or not
    optimizer = engine.deepspeed.basic_optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            state = optimizer.state.get(parameter, {})
            yield from (torch.as_tensor(state[key]) for key in sorted(state))
    for table in (
        engine.sparse_optimizer.tables.values() if engine.sparse_optimizer is not None else ()
    ):
        yield table.weight
    for row_state in (
        engine.sparse_optimizer.states.values() if engine.sparse_optimizer is not None else ()
    ):
        yield from (row_state.steps, *row_state.moments.values())


def digest(engine: Engine) -> str:
    """SHA-256 of everything, of all ranks."""
    own = hashlib.sha256()
    for tensor in tensors_of(engine):
        own.update(
            tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if tensor.numel()
            else b""
        )
    return hashlib.sha256("".join(engine.topology.all_gather(own.hexdigest())).encode()).hexdigest()


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    recipe, engine = engine_of(case)
    injection = Injection(engine, case["rank"], case["micro_batch"], case["place"])
    rate = 0.01 if getattr(recipe.model.moe, "bias_balancing", None) else 0.0

    def batches(step: int) -> list[Any]:
        return synthetic_step(recipe, step, engine.topology.dp_rank, engine.topology.dp_size)

    def step(number: int, **options: Any) -> dict[str, Any]:
        result = engine.train_step(batches(number), 1.0, rate, **options)
        return {
            "applied": result.applied,
            "refused": result.refused,
            "norm": result.grad_norm,
            "digest": digest(engine),
            "scale": engine.loss_scale.value(),
        }

    asked: list[tuple[float, float]] = []

    def refuse(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return True

    found: dict[str, Any] = {"name": case["name"], "weight": injection.weight, "steps": [step(0)]}
    # The judge looks and lets pass: bitwise the step without a judge, which the second engine
    # takes.
    found["steps"].append(step(1, should_skip=lambda loss, norm: False))
    found["steps"].append(step(2, should_skip=refuse))
    injection.armed = True
    found["steps"].append(step(3))
    found["found"] = [asdict(entry) for entry in find_non_finite(engine, batches(3))]
    found["after_search"] = {
        "digest": digest(engine),
        "scale": engine.loss_scale.value(),
        "steps": engine.deepspeed.global_steps,
    }
    injection.armed = False
    found["found_in_a_clean_step"] = [
        asdict(entry) for entry in find_non_finite(engine, batches(4))
    ]
    found["steps"].append(step(4))
    found["asked"] = engine.topology.all_gather(asked)
    if case.get("without_skipped"):
        _, other = engine_of(case)
        for number in (0, 1, 4):
            other.train_step(batches(number), 1.0, rate)
        found["without_skipped"] = digest(other)
    return found
