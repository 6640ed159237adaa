"""Starts an engine twice, as it starts and the plain way, and compares what their optimizers train.

A case has "name", "overrides", "zero", and optionally "zero_optimization" (more of that section of
the ds_config) and "sabotage" (one bit of one weight is changed in the plain start).
"""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

import torch

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.engine import engine as engine_module
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import fragments
from tests.support.plain_start import plain_model
from tests.support.rank_worker import make_engine
from tests.support.workers.training_steps import synthetic_step

STEPS = 2


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe("debug", case["overrides"])
    found = observe(recipe, case)
    with mock.patch.object(engine_module, "build_model", plain_start(case.get("sabotage", False))):
        wanted = observe(recipe, case)
    return {"name": case["name"], "found": found, "wanted": wanted}


def plain_start(sabotage: bool) -> Any:
    def build(*arguments: Any) -> torch.nn.Module:
        model = plain_model(*arguments)
        if sabotage:
            weight = model.final_norm.weight.data
            weight[-1] = torch.nextafter(weight[-1].bfloat16(), torch.tensor(2.0).bfloat16())
        return model

    return build


def observe(recipe: Recipe, case: dict[str, Any]) -> dict[str, Any]:
    """Hashes of all that the ranks hold, in the order of the ranks, and the first losses."""
    zero_section = {"stage": case["zero"], **case.get("zero_optimization", {})}
    engine, _ = make_engine(recipe, case["zero"], {"zero_optimization": zero_section})
    states = engine.topology.all_gather(state_of(engine))
    losses = []
    for step in range(STEPS):
        batches = synthetic_step(recipe, step, engine.topology.rank, engine.topology.world_size)
        losses.append(engine.train_step(batches, 1.0).losses)
    total = engine.topology.all_reduce_sum(torch.stack([one.packed() for one in losses]))
    return {"states": states, "losses": [float.hex(value) for value in total.flatten().tolist()]}


def state_of(engine: Engine) -> dict[str, str]:
    """A hash of the bits of each weight, master weight, table and buffer of this rank."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    state = {}
    for part in fragments(engine.optimizer, engine.zero_stage, engine.precision):
        state[f"master of {names[id(part.parameter)]} from {part.start}"] = bits(part.master)
    for name, parameter in engine.model.named_parameters():
        state[name] = bits(getattr(parameter, "ds_tensor", parameter)) + str(parameter.dtype)
    for name, buffer in engine.model.named_buffers():
        state[name] = bits(buffer) + str(buffer.dtype)
    if engine.sparse_optimizer is not None:
        for name, table in engine.sparse_optimizer.tables.items():
            state[name] = bits(table.weight)
    return state


def bits(tensor: torch.Tensor) -> str:
    whole = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(bytes(whole.tolist())).hexdigest()[:16]
