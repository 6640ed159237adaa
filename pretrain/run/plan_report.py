"""Prints a plan: the resolved configuration, a table of the run, and one of its phases."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import shared_sizes
from pretrain.engine.part_precision import PartPrecision
from pretrain.run.estimate import duration
from pretrain.run.plan import PhasePlan, Plan


def print_plan(plan: Plan) -> None:
    """Print the plan on the terminal."""
    console = Console()
    recipe = recipe_to_yaml(plan.config.recipe)
    console.print("[bold]recipe[/bold]", recipe, sep="\n", highlight=False)
    ds_config = json.dumps(plan.config.ds_config, indent=2)
    console.print("[bold]ds_config[/bold]", ds_config, sep="\n", highlight=False)
    table = Table("what", "value", title="plan")
    for name, value in _plan_lines(plan).items():
        table.add_row(name, value)
    console.print(table)
    # In the other formats all parts but routers are in the one that the recipe names.
    if plan.config.recipe.train.precision == "fp8":
        console.print(formats_table(plan.formats))
    for note in plan.weight_notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if plan.phases:
        console.print(_phase_table(plan.phases))


def formats_table(parts: Iterable[PartPrecision]) -> Table:
    """Return a table of the format that each part computes in."""
    table = Table("part", "computes in", "parameters", "why", title="number formats")
    for part in parts:
        table.add_row(part.part, part.precision, f"{part.parameters:,}", part.reason)
    return table


def _plan_lines(plan: Plan) -> dict[str, str]:
    """Return the table's values by the names of its lines."""
    config = plan.config
    train = config.recipe.train
    tokens = f"{config.timeline.num_tokens:,} in {config.timeline.num_steps:,} steps"
    if train.epoch_samples is not None:
        tokens = f"{train.epochs:g} epochs of {train.epoch_samples:,} sequences: {tokens}"
    if not plan.has_length:
        tokens = (
            f"{train.epochs:g} epochs; tokens, steps and phases are not known before there are "
            f"data in {config.recipe.data_path}, each step is"
        )
    if not plan.phases:
        tokens += f" of {train.tokens_per_step:,}"
    if plan.first_step:
        tokens += f", the first {plan.first_step:,} of them the parent run's"
    parallel = config.recipe.parallel
    shared = shared_sizes(parallel.sp_size, parallel.tp_size)
    layout = f"ep_size {parallel.ep_size}{shared}, ZeRO {config.zero_stage}, {train.precision}"
    time = plan.estimate.basis
    if plan.estimate.seconds is not None:
        time = f"about {duration(plan.estimate.seconds)}, {time}"
    size = plan.size
    return {
        "ranks": f"{config.world_size} ({layout})",
        "parameters": f"{size.parameters_total:,} total, {size.parameters_active:,} active",
        "tokens": tokens,
        "gradient accumulation": (
            f"{plan.accumulation_steps} micro batches of "
            f"{train.micro_batch_size} x {train.sequence_length}"
        ),
        "computes by": f"attention kernel {plan.attention_kernel}, compiled: {plan.compiled}",
        "memory a rank": _memory_line(plan),
        "before the first step": f"{plan.start_bytes / 1e9:.2f} GB a rank at most",
        "time": time,
    }


def _memory_line(plan: Plan) -> str:
    total = plan.state_bytes["total"] + plan.activation_bytes
    parts = ", ".join(
        f"{name} {plan.state_bytes[name] / 1e9:.2f}"
        for name in ("weights", "gradients", "optimizer")
    )
    line = f"{total / 1e9:.2f} GB: {parts}, activations about {plan.activation_bytes / 1e9:.2f}"
    gpu = plan.hardware.gpu
    if gpu is None:
        return line
    zero = plan.config.ds_config.get("zero_optimization", {})
    # How much of it is offloaded, DeepSpeed decides.
    if zero.get("offload_optimizer") or zero.get("offload_param"):
        return f"{line}; a part of it is offloaded to the host"
    # Buffers of ZeRO, of communication and of the allocator are in no estimate.
    verdict = "does not fit" if total > gpu.memory_bytes else "fits"
    return f"{line}; {verdict} in the {gpu.memory_bytes / 1e9:.0f} GB of one {gpu.name}"


def _phase_table(phases: list[PhasePlan]) -> Table:
    table = Table(
        "phase", "tokens", "steps", "batch", "length", "learning rate", "what else", title="phases"
    )
    for phase in phases:
        table.add_row(
            phase.name,
            f"{phase.tokens:,}",
            f"{phase.steps:,}",
            f"{phase.global_batch_size:,} ({phase.gradient_accumulation_steps} passes)",
            f"{phase.sequence_length:,}",
            f"{phase.first_learning_rate:.3g} to {phase.last_learning_rate:.3g}",
            "; ".join(_changes(phase)),
        )
    return table


def _changes(phase: PhasePlan) -> list[str]:
    """Return a phase's positions, mixture and frozen parts, in words."""
    fields = {name: value for name, value in phase.position.items() if name != "kind"}
    positions = ", ".join(f"{name} {value}" for name, value in fields.items())
    mixture = phase.mixture["kind"]
    if "weights" in phase.mixture:
        mixture = ", ".join(f"{name} {share:g}" for name, share in phase.mixture["weights"].items())
    frozen = [f"frozen: {', '.join(phase.frozen)}"] if phase.frozen else []
    return [f"{phase.position['kind']} {positions}", mixture, *frozen]
