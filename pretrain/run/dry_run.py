"""--dry-run: what a run would be, without starting it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pretrain.callbacks.metrics import read_rows
from pretrain.checkpoint.initialize_from import starting_point
from pretrain.checkpoint.layout import (
    complete_checkpoints,
    read_run_recipe,
    read_state,
    resolve_checkpoint,
)
from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.core.accelerators import (
    ACCELERATORS,
    Accelerator,
    accelerator,
    accelerator_of_device,
)
from pretrain.core.errors import ConfigError
from pretrain.engine.precision import resolve_precision
from pretrain.model.sizes import model_size
from pretrain.optim.frozen import frozen_parameters
from pretrain.run.folder import CHECKPOINTS, check_branch
from pretrain.run.memory import activation_bytes, state_bytes_per_rank
from pretrain.training.schedules import run_learning_rate_factor

# Mixtures of experts lose more to communication and small matrix products than dense models, which
# reach 0.4 to 0.5 on large clusters.
ASSUMED_MFU = 0.35
ESTIMATE_OPTIONS = (
    "for an estimate of the time give --gpu NAME "
    f"({', '.join(known.name for known in ACCELERATORS)}) and, if you know it, --mfu"
)


@dataclass(frozen=True)
class Hardware:
    """What the estimate of the time assumes.

    Attributes:
        gpu: of every rank; None is the one of this machine.
        mfu: model FLOPs utilization (Chowdhery et al. 2022): FLOP/s of the model / peak of the
            GPUs.
    """

    gpu: Accelerator | None = None
    mfu: float = ASSUMED_MFU


@dataclass(frozen=True)
class Estimate:
    """Time of the steps ahead: ``seconds`` is None if nothing is known of the speed."""

    seconds: float | None
    basis: str


def add_estimate_options(parser: argparse.ArgumentParser) -> None:
    """Add --gpu and --mfu, which :func:`hardware_of` reads."""
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="with --dry-run: estimate the time on this GPU: "
        + ", ".join(known.name for known in ACCELERATORS),
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=ASSUMED_MFU,
        metavar="SHARE",
        help=(
            "with --dry-run: the share of the GPUs' peak FLOP/s that training reaches "
            f"(default: {ASSUMED_MFU})"
        ),
    )


def hardware_of(options: argparse.Namespace) -> Hardware:
    """The hardware that the options name.

    Raises:
        ConfigError: if the GPU is not in the table, or --mfu is no share.
    """
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu:g} is no share of the peak: give 0.35 for example")
    return Hardware(None if options.gpu is None else accelerator(options.gpu), options.mfu)


def planned_precision(asked: str, hardware: Hardware) -> str:
    """The number format of the run that is planned; on a named GPU "auto" is bf16, as it is there.

    Raises:
        ConfigError: if the GPU, or without one this machine, cannot compute in that format.
    """
    if hardware.gpu is None:
        return resolve_precision(asked)
    if asked == "fp8" and not hardware.gpu.has_fp8:
        raise ConfigError(f"train.precision=fp8: {hardware.gpu.name} has no fp8 matrix products")
    return "bf16" if asked == "auto" else asked


def planned_start(recipe: Recipe) -> int:
    """The step that a run starts at, before there is anything of it: that of ``branch_from``, else
    0.

    What the recipe leaves open is as in the trunk.

    Raises:
        CheckpointError: where ``branch_from`` names no checkpoint.
        ConfigError: see :func:`pretrain.run.folder.check_branch`.
    """
    if recipe.branch_from is None or complete_checkpoints(Path(recipe.output_path) / CHECKPOINTS):
        return 0
    checkpoint = resolve_checkpoint(recipe.branch_from)
    trunk, state = read_run_recipe(checkpoint), read_state(checkpoint)
    model, train = recipe.model, recipe.train
    model = (
        model
        if model.vocab_size
        else model.model_copy(update={"vocab_size": trunk.model.vocab_size})
    )
    train = (
        train
        if train.precision != "auto"
        else train.model_copy(update={"precision": trunk.train.precision})
    )
    check_branch(
        recipe.model_copy(update={"model": model, "train": train}), trunk, {}, state, checkpoint
    )
    return int(state["step"])


def planned_weights(recipe: Recipe, tokenizer_sha256: str | None) -> list[str]:
    """A sentence about each field in which ``initial_weights`` differ from the recipe, and about
    what does not fit; none without them.

    Args:
        tokenizer_sha256: of the data's tokenizer; None before there are data.

    Raises:
        CheckpointError: as the run would.
    """
    start = starting_point(recipe, tokenizer_sha256, Path(recipe.output_path) / CHECKPOINTS)
    if start is None:
        return []
    return (
        start.notes
        if start.found.is_whole
        else [*start.notes, f"{start.where} fits in part: {start.found.counts}"]
    )


def make_plan(
    recipe: Recipe,
    ds_config: dict[str, Any],
    precision: str,
    world_size: int,
    zero_stage: int,
    first_step: int = 0,
    weight_notes: Sequence[str] = (),
    hardware: Hardware | None = None,
) -> dict[str, Any]:
    """Sizes, memory and time of a run, from its resolved recipe and ds_config.

    Args:
        first_step: steps that a branch has of its trunk; they take no time.
        weight_notes: of :func:`planned_weights`.
        hardware: what the time is estimated for; this machine's by default.
    """
    train, timeline = recipe.train, Timeline(recipe)
    size = model_size(recipe.model, train.sequence_length)
    state = state_bytes_per_rank(
        size, precision, zero_stage, world_size, recipe.parallel.ep_size, recipe.optimizer
    )
    done = timeline.tokens_after(first_step)
    ahead = [
        (stage, min(stage.num_tokens, stage.first_tokens + stage.num_tokens - done))
        for stage in timeline.stages
        if stage.end_step > first_step
    ]
    flops = sum(
        model_size(recipe.model, stage.recipe.train.sequence_length).flops_per_token * tokens
        for stage, tokens in ahead
    )
    tokens = timeline.num_tokens - done
    hardware = hardware or Hardware()
    estimate = _estimate(recipe, precision, world_size, tokens, flops / tokens, hardware)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "ds_config": ds_config,
        "world_size": world_size,
        "zero_stage": zero_stage,
        "precision": precision,
        "parameters_total": size.parameters_total,
        "parameters_active": size.parameters_active,
        "parameters_padding": size.parameters_padding,
        "components": size.components,
        "flops_per_token": size.flops_per_token,
        "steps": timeline.num_steps,
        "first_step": first_step,
        "train_tokens": timeline.num_tokens,
        "gradient_accumulation_steps": (
            train.global_batch_size // (train.micro_batch_size * world_size)
        ),
        "state_bytes_per_rank": state,
        "activation_bytes_per_rank": max(
            activation_bytes(recipe.model, stage.recipe.train, precision)
            for stage in timeline.stages
        ),
        "gpu": None if hardware.gpu is None else asdict(hardware.gpu),
        "estimated_seconds": estimate.seconds,
        "estimate_basis": estimate.basis,
        "phases": phase_rows(recipe, timeline, world_size),
        "initial_weights": list(weight_notes),
    }


def phase_rows(recipe: Recipe, timeline: Timeline, world_size: int) -> list[dict[str, Any]]:
    """A row for each phase; none for a run without phases.

    Raises:
        ConfigError: where a phase freezes what the model has not.
    """
    if not recipe.phases:
        return []
    dense, experts = tensor_shapes(recipe.model)
    rows = []
    for stage in timeline.stages:
        train, last = stage.recipe.train, stage.end_step - 1
        factors = [
            run_learning_rate_factor(step, timeline, recipe.schedule)
            for step in (stage.first_step, last)
        ]
        frozen_parameters(
            [*dense, *experts], stage.frozen, recipe.model, f"phases.{stage.name}.frozen"
        )
        rows.append({
            "name": stage.name,
            "tokens": stage.num_tokens,
            "steps": stage.num_steps,
            "global_batch_size": train.global_batch_size,
            "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * world_size),
            "sequence_length": train.sequence_length,
            "first_learning_rate": factors[0] * recipe.optimizer.learning_rate,
            "last_learning_rate": factors[1] * recipe.optimizer.learning_rate,
            "position": stage.recipe.model.position.model_dump(mode="json", exclude_none=True),
            "mixture": stage.recipe.data.mixture.model_dump(mode="json"),
            "frozen": list(stage.frozen),
        })  # fmt: skip
    return rows


def print_phases(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        "phase", "tokens", "steps", "batch", "length", "learning rate", "what else", title="phases"
    )
    for row in rows:
        rates = f"{row['first_learning_rate']:.3g} to {row['last_learning_rate']:.3g}"
        position, mixture = row["position"], row["mixture"]
        other = [
            f"{position.pop('kind')} "
            + ", ".join(f"{name} {value}" for name, value in position.items())
        ]
        other += (
            [", ".join(f"{name} {share:g}" for name, share in mixture["weights"].items())]
            if "weights" in mixture
            else [mixture["kind"]]
        )
        other += ["frozen: " + ", ".join(row["frozen"])] if row["frozen"] else []
        batch = f"{row['global_batch_size']:,} ({row['gradient_accumulation_steps']} passes)"
        table.add_row(
            row["name"],
            f"{row['tokens']:,}",
            f"{row['steps']:,}",
            batch,
            f"{row['sequence_length']:,}",
            rates,
            "; ".join(other),
        )
    console.print(table)


def print_plan(plan: dict[str, Any], recipe: Recipe) -> None:
    console = Console()
    console.print("[bold]recipe[/bold]", recipe_to_yaml(recipe), sep="\n", highlight=False)
    console.print(
        "[bold]ds_config[/bold]", json.dumps(plan["ds_config"], indent=2), sep="\n", highlight=False
    )
    table = Table("what", "value", title="plan")
    for name, value in _plan_lines(plan, recipe).items():
        table.add_row(name, value)
    console.print(table)
    for note in plan["initial_weights"]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if plan["phases"]:
        print_phases(plan["phases"], console)


def _plan_lines(plan: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """What the table of a plan says, by the names of its lines."""
    train = recipe.train
    tokens = f"{plan['train_tokens']:,} in {plan['steps']:,} steps"
    if not plan["phases"]:
        tokens += f" of {train.tokens_per_step:,}"
    if plan["first_step"]:
        tokens += f", the first {plan['first_step']:,} of them the parent run's"
    layout = f"ep_size {recipe.parallel.ep_size}, ZeRO {plan['zero_stage']}, {plan['precision']}"
    time = plan["estimate_basis"]
    if plan["estimated_seconds"] is not None:
        time = f"about {_duration(plan['estimated_seconds'])}, {time}"
    return {
        "ranks": f"{plan['world_size']} ({layout})",
        "parameters": f"{plan['parameters_total']:,} total, {plan['parameters_active']:,} active",
        "tokens": tokens,
        "gradient accumulation": (
            f"{plan['gradient_accumulation_steps']} micro batches of "
            f"{train.micro_batch_size} x {train.sequence_length}"
        ),
        "memory a rank": _memory_line(plan),
        "time": time,
    }


def _memory_line(plan: dict[str, Any]) -> str:
    state = plan["state_bytes_per_rank"]
    activations = plan["activation_bytes_per_rank"]
    total = state["total"] + activations
    parts = ", ".join(
        f"{name} {state[name] / 1e9:.2f}" for name in ("weights", "gradients", "optimizer")
    )
    line = f"{total / 1e9:.2f} GB: {parts}, activations about {activations / 1e9:.2f}"
    if plan["gpu"] is None:
        return line
    gpu, memory = plan["gpu"]["name"], plan["gpu"]["memory_bytes"]
    zero = plan["ds_config"].get("zero_optimization", {})
    if zero.get("offload_optimizer") or zero.get("offload_param"):
        return f"{line}; a part of it is offloaded to the host"
    # Buffers of ZeRO, of communication and of the allocator are in no estimate.
    verdict = "does not fit" if total > memory else "fits"
    return f"{line}; {verdict} in the {memory / 1e9:.0f} GB of one {gpu}"


def _estimate(
    recipe: Recipe,
    precision: str,
    world_size: int,
    tokens: int,
    flops_per_token: float,
    hardware: Hardware,
) -> Estimate:
    rates = [
        row["tokens_per_second"]
        for row in read_rows(Path(recipe.output_path) / "metrics.jsonl")
        if row["kind"] == "train"
    ]
    if rates and hardware.gpu is None:
        seconds = tokens / sorted(rates)[len(rates) // 2]
        return Estimate(seconds, "from the speed of this run so far")
    gpu = hardware.gpu or _gpu_of_this_machine()
    if gpu is None:
        return Estimate(None, f"no GPU here that has a known peak: {ESTIMATE_OPTIONS}")
    if precision == "fp32" and recipe.train.tf32:
        return Estimate(None, "no estimate: TF32 peaks are not in the table of GPUs")
    peak = gpu.peak_flops(precision)
    seconds = tokens * flops_per_token / (peak * hardware.mfu * world_size)
    basis = (
        f"assuming an MFU of {hardware.mfu:g} on {world_size} x {gpu.name}, "
        f"peak {peak / 1e12:,.0f} TFLOP/s in {'bf16' if precision == 'fp8' else precision}"
    )
    return Estimate(seconds, basis)


def _gpu_of_this_machine() -> Accelerator | None:
    if not torch.cuda.is_available():
        return None
    return accelerator_of_device(torch.cuda.get_device_name())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} days"
