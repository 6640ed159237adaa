"""Trains a few steps of one configuration, and returns each step's losses and gradient norm.

A case has "name", "overrides", "zero", "steps", and optionally "changes" (report how every weight
moved in the first step), "expert_gain" (a factor for the experts' gradients), "starved" (the step
from which on one expert and half of each query matrix get no gradient), "all_copies" (gradients are
copied as DeepSpeed alone does it), "zero_optimization" (more of that section of the ds_config),
"sections" (others of it),
"gathered" (at ZeRO 3 also small tensors are gathered for each use) and "sabotage" (a deliberate
fault that the equality tests must notice).
"""

from __future__ import annotations

import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import distributed

from data_pipeline.loading.batch import Batch
from pretrain.checkpoint.weights import is_expert
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.engine import build
from pretrain.engine.engine import Engine
from pretrain.engine.step import reduce_steps
from pretrain.model.moe.base import MoELayer
from pretrain.model.moe.tables.products import Factors
from tests.support.rank_worker import make_engine


def synthetic_step(recipe: Recipe, step: int, rank: int, world_size: int) -> list[Batch]:
    """Random tokens with structure, a pure function of the step, spread over ranks as the loader
    spreads them.
    """
    train, vocab_size = recipe.train, recipe.model.vocab_size
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(
        0, vocab_size, (train.global_batch_size, train.sequence_length + 1), generator=generator
    )
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % vocab_size
    inputs, labels, documents = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None
    if recipe.data.document_mask:
        ends = (
            inputs % 11 == 0
        )  # unevenly many a micro batch, so that their losses weigh differently
        labels, documents = labels.masked_fill(ends, -100), ends.cumsum(1) - ends.long()
    parts = [
        value.split(train.micro_batch_size) if value is not None else None
        for value in (inputs, labels, documents)
    ]
    mine = range(rank, len(parts[0]), world_size)
    return [Batch(*(part[index] if part is not None else None for part in parts)) for index in mine]


def scale_expert_gradients(engine: Engine, gain: float, only_first: bool = False) -> None:
    experts = [parameter for parameter in engine.model.parameters() if is_expert(parameter)]
    for parameter in experts[:1] if only_first else experts:
        parameter.register_hook(lambda gradient: gradient * gain)
    for table in (
        engine.sparse_optimizer.tables.values() if engine.sparse_optimizer is not None else ()
    ):
        table.take_gradient = functools.partial(scaled_factors, table.take_gradient, gain)


def scaled_factors(
    take_gradient: Callable[..., Any], gain: float, factors: Factors, *rest: Any
) -> Any:
    return take_gradient(factors._replace(c_P=factors.c_P * gain), *rest)


def starve(engine: Engine) -> None:
    for name, parameter in engine.model.named_parameters():
        if is_expert(parameter):
            parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), 0.0))
        elif name.endswith("q_proj.weight"):
            parameter.register_hook(
                lambda gradient: gradient.index_fill(0, torch.arange(len(gradient) // 2), 0.0)
            )


def sabotage(engine: Engine, kind: str) -> None:
    """Breaks one thing on purpose."""
    if kind == "expert_gradient_scaled":
        scale_expert_gradients(engine, 1.01, only_first=True)
    elif kind == "rank_norm_dropped":
        # each rank then clips by the norm of its own experts only
        engine._stage0.group_of = lambda name: None
    elif kind == "table_norm_dropped":
        reduce = engine.sparse_optimizer.reduce
        engine.sparse_optimizer.reduce = lambda scale: (
            reduce(scale) * 0
        )  # clipping then looks at dense weights alone
    elif kind == "matrices_turned":  # Muon then takes [A, B] for [B, A]
        for shards in engine.optimizer.optimizer.shards.values():
            for matrices in (of_rank for by_owner in shards.rounds for of_rank in by_owner):
                matrices[:] = [
                    matrix._replace(rows=matrix.columns, columns=matrix.rows) for matrix in matrices
                ]
    elif kind == "router_means_left_out":  # balancing then looks at a rank's part of a sequence
        for module in engine.model.modules():
            if isinstance(module, MoELayer):
                module.token_parts = None
    elif kind == "marks_kept":  # Muon then looks only at this rank's part of a gradient
        muon = engine.optimizer.optimizer
        muon._marked_update = lambda gradient, momentum: torch.cat(
            (
                muon._update(gradient, momentum) * gradient.any(),
                gradient.any()[None].to(gradient.dtype),
            )
        )
    else:
        raise ValueError(kind)


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The fp32 weights of this rank, stacked experts apart and named by their global number."""
    first = engine.expert_part * engine.recipe.model.moe.total_experts // engine.expert_parts
    weights: dict[str, torch.Tensor] = {}
    for name, table in (
        engine.sparse_optimizer.tables.items() if engine.sparse_optimizer is not None else ()
    ):
        weights |= {
            f"{name}.{first + local}": rows for local, rows in enumerate(table.weight.clone())
        }
    for name, parameter in engine.model.named_parameters():
        weight = engine.masters.whole(parameter).float().cpu().clone()
        if is_expert(parameter) and weight.dim() == 3:
            weights |= {f"{name}.{first + local}": matrix for local, matrix in enumerate(weight)}
        elif is_expert(parameter):
            prefix, local, rest = re.match(r"(.*deepspeed_experts)\.(\d+)\.(.*)", name).groups()
            weights[f"{prefix}.{first + int(local)}.{rest}"] = weight
        else:
            weights[name] = weight
    return weights


def describe_changes(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, list[float]]:
    """How each weight moved: the length of its change, and the change's product with a fixed random
    direction of its own.
    """
    described = {}
    for name, weight in after.items():
        change = (weight - before[name]).double().flatten()
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        direction = torch.randn(change.numel(), generator=generator, dtype=torch.float64)
        described[name] = [change.norm().item(), (change @ direction).item()]
    return described


COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """How often rows of tokens, counts of them or weights travel between ranks inside the block."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        @functools.wraps(originals[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    originals = {name: getattr(distributed, name) for name in COLLECTIVES}
    try:
        for name in COLLECTIVES:
            setattr(distributed, name, counted(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe("debug", ["logging.tensorboard=false", *case["overrides"]])
    zero = {"stage": case["zero"], **case.get("zero_optimization", {})}
    sections = {"zero_optimization": zero, **case.get("sections", {})}
    if case.get("gathered") and case["zero"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    spare = (lambda *_: None) if case.get("all_copies") else build.spare_gradient_copies
    with mock.patch.object(build, "spare_gradient_copies", spare):
        engine, _ = make_engine(recipe, case["zero"], sections)
    topology = engine.topology
    if "expert_gain" in case:
        scale_expert_gradients(engine, case["expert_gain"])
    if "sabotage" in case:
        sabotage(engine, case["sabotage"])
    results, changes = [], {}
    for step in range(case["steps"]):
        if step == case.get("starved"):
            starve(engine)
        before = whole_weights(engine) if step == 0 and "changes" in case else None
        balancing = getattr(recipe.model.moe, "bias_balancing", None)
        rate = balancing.update_rate if balancing is not None else 0.0
        batches = synthetic_step(recipe, step, topology.dp_rank, topology.dp_size)
        with counted_collectives() as collectives:
            results.append(engine.train_step(batches, 1.0, rate))
        if before is not None:
            for part in topology.all_gather(describe_changes(before, whole_weights(engine))):
                changes |= part
    losses, _ = reduce_steps(results, topology)
    nll, tokens = engine.evaluate(synthetic_step(recipe, 77, topology.dp_rank, topology.dp_size))
    return {
        "name": case["name"],
        "nll": [loss.cross_entropy for loss in losses],
        "loss": [loss.total for loss in losses],
        "grad_norm": [result.grad_norm for result in results],
        "applied": [result.applied for result in results],
        "validation": nll / tokens,
        "changes": changes,
        "collectives": collectives,
        "balance_bias": [
            bias.tolist()
            for name, bias in engine.model.named_buffers()
            if name.endswith("balance_bias")
        ],
    }
