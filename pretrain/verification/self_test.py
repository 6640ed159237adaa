"""The self-test of a start: one small batch has the same gradients as on a single rank.

DeepSpeed reduces the gradients of dense weights and of experts in other groups of ranks, and scales
each by another number. A wrong scale trains on without an error, only worse. So before a long run
the ranks compute one small batch, and rank 0 computes the same batch by plain autograd, in a model
that holds all experts.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch

from data_pipeline.loading.batch import Batch
from pretrain.checkpoint.random_state import random_state, restore_random_state
from pretrain.config.recipe import Recipe, shared_sizes
from pretrain.config.timeline import Timeline
from pretrain.core.errors import GuardError
from pretrain.engine.build import ExpertShard, WeightLoader, build_model
from pretrain.engine.engine import Engine, forward
from pretrain.engine.precision import DTYPES
from pretrain.engine.step import RouterTotals, add_totals, reduce_steps
from pretrain.model.decoder import DecoderLM
from pretrain.model.sizes import model_size
from pretrain.run.estimate import Hardware, estimate_time
from pretrain.verification.gradients import engine_expert_norms, model_expert_norms

logger = logging.getLogger(__name__)

# Of the batch: enough for each expert to get some, and short enough for the reference.
LONGEST_SEQUENCE = 64
# "auto" tests a run that is expected to take longer.
LONG_RUN_SECONDS = 3600.0
# What a CPU core computes, if nothing is known of the speed; only for the line above.
ASSUMED_CORE_FLOPS = 2e10
# Relative distances: of losses and the whole norm, and of each expert's norm.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (3e-2, 1e-1), "fp16": (3e-2, 1e-1), "fp8": (0.1, 0.3)}
TF32_TOLERANCES = (1e-2, 5e-2)
# An expert's gradient that is smaller than this share of the whole is rounding.
SMALLEST_SHARE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2, "fp8": 1e-1}
# Of weights and gradients of the reference: activations and the allocator need some too.
MEMORY_MARGIN = 1.3


@dataclass(frozen=True)
class Observation:
    """What a batch gives.

    Attributes:
        losses: by name: the whole loss, cross-entropy, and each router loss of each layer.
        norm: of the whole gradient, before clipping.
        experts: norm of each expert's gradient in each of its parameters, by name.
    """

    losses: dict[str, float]
    norm: float
    experts: dict[str, float]


def is_due(recipe: Recipe, world_size: int) -> bool:
    """Whether a run that starts is to be tested.

    Args:
        recipe: resolved.
    """
    wish = recipe.train.self_test
    if wish != "auto":
        return wish == "on"
    # A single rank computes what the reference does.
    return world_size > 1 and expected_seconds(recipe, world_size) > LONG_RUN_SECONDS


def expected_seconds(recipe: Recipe, world_size: int) -> float:
    """Return roughly how long the whole run takes."""
    tokens = Timeline(recipe).num_tokens
    flops = model_size(recipe.model, recipe.train.sequence_length).flops_per_token
    known = estimate_time(
        recipe, Hardware(), world_size=world_size, tokens=tokens, flops_per_token=flops
    ).seconds
    if known is not None:
        return known
    return tokens * flops / (len(os.sched_getaffinity(0)) * ASSUMED_CORE_FLOPS)


def why_not(engine: Engine) -> str:
    """Return why the test cannot be made, in words; empty if it can. Every rank must call it."""
    model = engine.recipe.model
    routing = model.routing
    if engine.sparse_optimizer is not None:
        return "the gradients of expert tables are not formed"
    if any(model.dropout.model_dump().values()):
        return "the model has dropout, which draws other values on other ranks"
    if routing is not None and (
        routing.draws_experts or routing.router.learned_noise or routing.router.jitter
    ):
        return "the router draws other values on other ranks"
    if engine.topology.token_parts > 1 and routing is not None and routing.drops_tokens:
        return "full experts drop tokens by those of a rank, which has a part of each sequence"
    return engine.topology.all_gather(_why_not_here(engine) if engine.topology.is_main else "")[0]


def _why_not_here(engine: Engine) -> str:
    """Return whether rank 0 lacks the memory for the reference, in words."""
    parameters = model_size(engine.recipe.model, 1).parameters_stored
    # fp32 weights while they are filled, then both in the run's format, which is no larger.
    needed = int(parameters * 8 * MEMORY_MARGIN)
    free = psutil.virtual_memory().available
    if engine.topology.device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(engine.topology.device)[0])
    if needed <= free:
        return ""
    return f"the reference on rank 0 needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def small_recipe(recipe: Recipe, dp_size: int) -> Recipe:
    """Return a recipe of one step of ``dp_size`` micro batches, each of one short sequence."""
    parts = recipe.parallel.token_parts
    # A multiple of them, as the recipe's own length is.
    longest = -(-LONGEST_SEQUENCE // parts) * parts
    train = recipe.train.model_copy(
        update={
            "sequence_length": min(recipe.train.sequence_length, longest),
            "micro_batch_size": 1,
            "global_batch_size": dp_size,
        }
    )
    return recipe.model_copy(update={"train": train, "phases": []})


def small_batches(recipe: Recipe) -> list[Batch]:
    """Return the batch of every data-parallel rank: random tokens, the same on all ranks.

    Args:
        recipe: from :func:`small_recipe`.
    """
    assert recipe.model.vocab_size is not None
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = recipe.train.global_batch_size, recipe.train.sequence_length + 1
    tokens = torch.randint(0, recipe.model.vocab_size, shape, generator=generator)
    inputs, labels = (part.contiguous() for part in (tokens[:, :-1], tokens[:, 1:]))
    masks = recipe.data.document_mask
    return [
        Batch(row, label, torch.zeros_like(row) if masks else None)
        for row, label in zip(inputs.split(1), labels.split(1), strict=True)
    ]


def observe_engine(engine: Engine, timeline: Timeline) -> Observation:
    """Compute the batch with the engine, whose state is afterwards as before.

    Every rank must call it, before the first step of a run, and the engine must enter its phase
    again.
    """
    topology = engine.topology
    small = small_recipe(engine.recipe, topology.dp_size)
    batch = small_batches(small)[topology.dp_rank]
    experts: dict[str, float] = {}
    with _kept_state(engine):
        # Number 0 is no phase: nothing is frozen.
        engine.enter(replace(timeline.at(0), number=0, recipe=small))
        engine.before_update = lambda: experts.update(engine_expert_norms(engine))
        try:
            # The update is refused, so nothing moves.
            result = engine.train_step([batch], 0.0, should_skip=lambda loss, norm: True)
        finally:
            engine.before_update = None
    means, router = reduce_steps([result], topology)
    losses = {"loss": means[0].total, "cross-entropy": means[0].cross_entropy}
    return Observation(losses | _router_losses(router), result.grad_norm, experts)


@contextmanager
def _kept_state(engine: Engine) -> Iterator[None]:
    """Put back all that a refused step changes: counts, expert usage and random state."""
    counts, usage, state = engine.counts(), engine.usage.copy(), random_state()
    before = engine.phase_recipe
    try:
        yield
    finally:
        engine.restore_counts(counts)
        engine.usage.restore(usage)
        engine.phase_recipe = before
        restore_random_state(state)


def observe_reference(engine: Engine, load_weights: WeightLoader | None) -> Observation:
    """Compute the batch of all ranks in one model on this rank, by plain autograd.

    Args:
        load_weights: what the run starts from instead of random weights.
    """
    topology, recipe = engine.topology, engine.recipe
    small = small_recipe(recipe, topology.dp_size)
    device = topology.device
    whole = ExpertShard(0, 1)
    state = random_state()
    model = build_model(recipe, engine.precision, whole, device, load_weights)
    restore_random_state(state)
    model = model.to(DTYPES[engine.precision]).to(device).train()
    batches = [batch.to(device) for batch in small_batches(small)]
    fractions_LE = _fractions(model, small, batches)
    normalizer = float(small.train.tokens_per_step // topology.dp_size)
    losses = {"loss": 0.0, "cross-entropy": 0.0}
    router: RouterTotals | None = None
    for batch in batches:
        output = forward(model, batch, normalizer, fractions_LE)
        (output.loss / len(batches)).backward()
        losses["loss"] += output.loss.item() / len(batches)
        losses["cross-entropy"] += output.nll.item() / normalizer / len(batches)
        router = add_totals(router, output.router)
    if router is not None:
        router = router._replace(losses_LJ=router.losses_LJ / len(batches))
    squares = [
        float(parameter.grad.float().norm()) ** 2
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    return Observation(
        losses | _router_losses(router), math.sqrt(sum(squares)), model_expert_norms(model)
    )


@torch.no_grad()
def _fractions(model: DecoderLM, small: Recipe, batches: list[Batch]) -> torch.Tensor | None:
    """Return choices per token over the whole batch, if the recipe's load balance uses them."""
    routing = small.model.routing
    if routing is None or routing.balance_scope == "micro_batch":
        return None
    routers = [forward(model, batch, 1.0, None).router for batch in batches]
    counts = torch.stack([router.counts_LE for router in routers if router is not None])
    return counts.sum(0) / small.train.tokens_per_step


def _router_losses(router: RouterTotals | None) -> dict[str, float]:
    if router is None:
        return {}
    return {
        f"router loss {kind} of MoE layer {layer}": value
        for layer, values in enumerate(router.losses_LJ.tolist())
        for kind, value in enumerate(values)
    }


def differences(
    here: Observation, reference: Observation, precision: str, tf32: bool = False
) -> list[str]:
    """Return in what an observation is wrong, one clause each; empty if in nothing."""
    whole, each = TF32_TOLERANCES if tf32 and precision == "fp32" else TOLERANCES[precision]
    found = []
    for name, value in reference.losses.items():
        found += _apart(name, here.losses.get(name, math.nan), value, whole, 1e-6)
    if missing := reference.experts.keys() ^ here.experts.keys():
        found.append(f"{len(missing)} gradients of experts have no counterpart, as {min(missing)}")
    smallest = SMALLEST_SHARE[precision] * reference.norm
    for name in sorted(reference.experts.keys() & here.experts.keys()):
        what = f"gradient norm of {name}"
        found += _apart(what, here.experts[name], reference.experts[name], each, smallest)
    # Last: what follows from the others says least.
    return found + _apart("gradient norm", here.norm, reference.norm, whole, 0.0)


def _apart(what: str, here: float, there: float, relative: float, absolute: float) -> list[str]:
    # Negated, so that NaN is a difference.
    if not abs(here - there) <= relative * abs(there) + absolute:
        return [f"{what} is {here:.6g} instead of {there:.6g}"]
    return []


def self_test(engine: Engine, timeline: Timeline, load_weights: WeightLoader | None) -> None:
    """Compare one small batch at this topology with the reference on rank 0.

    Every rank must call it, before the first step. A test that cannot be made is a warning.

    Raises:
        GuardError: if losses or gradients differ; on every rank.
    """
    if reason := why_not(engine):
        if engine.topology.is_main:
            logger.warning("no self-test: %s", reason)
            print(f"warning: no self-test: {reason}", file=sys.stderr)
        return
    here = observe_engine(engine, timeline)
    found: list[str] = []
    compared: Mapping[str, float] = {}
    if engine.topology.is_main:
        reference = observe_reference(engine, load_weights)
        compared = reference.experts
        found = differences(here, reference, engine.precision, engine.recipe.train.tf32)
    found = engine.topology.all_gather(found)[0]
    if found:
        more = f" and {len(found) - 1} more differences" if len(found) > 1 else ""
        topology = engine.topology
        shared = shared_sizes(topology.sp_size, topology.tp_size)
        raise GuardError(
            f"the self-test failed: on {topology.world_size} ranks with ep_size {topology.ep_size}"
            f"{shared} and ZeRO {engine.zero_stage}, {found[0]}{more}; train at another topology, "
            "and report this with the versions of torch and DeepSpeed"
        )
    if engine.topology.is_main:
        logger.info(
            "self-test passed: losses, gradient norm %.6g and %d gradients of experts are those of "
            "one rank",
            here.norm,
            len(compared),
        )
