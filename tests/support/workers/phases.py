"""Trains a recipe with phases, and returns losses, norms and what moved in each phase.

A case has "name", "overrides" and "zero", and optionally "sabotage": a deliberate fault that the
tests must notice.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from data_pipeline.loading.batch import Batch
from pretrain.config.load import load_recipe
from pretrain.config.timeline import Phase, Timeline
from pretrain.engine.engine import Engine
from pretrain.engine.phases import FrozenParameters
from pretrain.engine.step import reduce_steps
from pretrain.model.config import ModelConfig
from pretrain.optim.frozen import frozen_parameters, part_of
from tests.support.rank_worker import make_engine
from tests.support.workers.training_steps import synthetic_step, whole_weights


def moved_parts(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], model: ModelConfig
) -> dict[str, list[int]]:
    """Of each part of the model: how many of its tensors have changed, and how many it has."""
    found: dict[str, list[int]] = {}
    for name, weight in after.items():
        counts = found.setdefault(part_of(name, model) or "none", [0, 0])
        counts[0] += not torch.equal(weight, before[name])
        counts[1] += 1
    return found


def plain_norm(engine: Engine, stage: Phase, batches: list[Batch]) -> float:
    """The norm over all parameters that the phase trains, by autograd alone: for one process at
    ZeRO stage 0.
    """
    train, model = stage.recipe.train, engine.model.train()
    parameters = dict(model.named_parameters())
    trained = [
        parameters[name]
        for name in parameters.keys()
        - frozen_parameters(parameters, stage.frozen, stage.recipe.model, "the test")
    ]
    normalizer = float(train.micro_batch_size * train.sequence_length)
    losses = [model(batch.input_ids_BS, batch.labels_BS, normalizer).loss for batch in batches]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), trained)
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe("debug", ["logging.tensorboard=false", *case["overrides"]])
    engine, _ = make_engine(recipe, case["zero"])
    topology, precision = engine.topology, recipe.train.precision
    if case.get("sabotage") == "not_put_back":
        assert engine._frozen is not None
        engine._frozen.masters_of = lambda _: None
    results, moved, validations, norms = [], {}, [], []
    for stage in Timeline(recipe).phases:
        engine.enter(stage)
        if case.get("sabotage") == "gradients_kept":
            assert isinstance(engine._frozen, FrozenParameters)
            for hook in engine._frozen._hooks:
                hook.remove()
        before = whole_weights(engine)
        for step in range(stage.first_step, stage.end_step):
            batches = synthetic_step(stage.recipe, step, topology.dp_rank, topology.dp_size)
            if (
                case["zero"] == 0
                and topology.world_size == 1
                and precision == "fp32"
                and engine.sparse_optimizer is None
            ):
                norms.append(plain_norm(engine, stage, batches))
            results.append(engine.train_step(batches, 1.0))
        parts: dict[str, list[int]] = {}
        for found in topology.all_gather(
            moved_parts(before, whole_weights(engine), engine.model.config)
        ):
            parts = {
                part: [sum(pair) for pair in zip(parts.get(part, [0, 0]), counts, strict=True)]
                for part, counts in found.items()
            }
        moved[stage.name] = parts
        nll, tokens = engine.evaluate(
            synthetic_step(stage.recipe, 77, topology.dp_rank, topology.dp_size)
        )
        validations.append(nll / tokens)
    losses = reduce_losses(results, engine)
    return {
        "name": case["name"],
        "loss": losses,
        "grad_norm": [result.grad_norm for result in results],
        "plain_norm": norms,
        "validation": validations,
        "micro_batches": [result.micro_batches for result in results],
        "moved": moved,
    }


def reduce_losses(results: list[Any], engine: Engine) -> list[float]:
    losses, _ = reduce_steps(results, engine.topology)
    return [loss.cross_entropy for loss in losses]
