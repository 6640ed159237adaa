"""--dry-run: what a run would be, without starting it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
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
from pretrain.engine.precision import DTYPES
from pretrain.model.sizes import model_size, peak_flops
from pretrain.optim.frozen import frozen_parameters
from pretrain.run.folder import CHECKPOINTS, check_branch
from pretrain.run.memory import activation_bytes, state_bytes_per_rank
from pretrain.training.schedules import run_learning_rate_factor

# Share of the rate of a large matrix product that a whole step reaches. Small models on CPUs reached 0.05; for GPUs it is a cautious guess.
ASSUMED_EFFICIENCY = {"cpu": 0.05, "cuda": 0.25}


def planned_start(recipe: Recipe) -> int:
    """The step that a run starts at, before there is anything of it: that of ``branch_from``, else 0. What the recipe leaves open is as in the trunk.

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
    """A sentence about each field in which ``initial_weights`` differ from the recipe, and about what does not fit; none without them.

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
) -> dict[str, Any]:
    """Sizes, memory and time of a run, from its resolved recipe and ds_config.

    Args:
        first_step: steps that a branch has of its trunk; they take no time.
        weight_notes: of :func:`planned_weights`.
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
    seconds, basis = _estimate_seconds(recipe, precision, world_size, tokens, flops / tokens)
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
        "gradient_accumulation_steps": train.global_batch_size
        // (train.micro_batch_size * world_size),
        "state_bytes_per_rank": state,
        "activation_bytes_per_rank": max(
            activation_bytes(recipe.model, stage.recipe.train, precision)
            for stage in timeline.stages
        ),
        "estimated_seconds": seconds,
        "estimate_basis": basis,
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
    state, train, accumulation = (
        plan["state_bytes_per_rank"],
        recipe.train,
        plan["gradient_accumulation_steps"],
    )
    rows = {
        "ranks": f"{plan['world_size']} (ep_size {recipe.parallel.ep_size}, ZeRO {plan['zero_stage']}, {plan['precision']})",
        "parameters": f"{plan['parameters_total']:,} total, {plan['parameters_active']:,} active",
        "tokens": f"{plan['train_tokens']:,} in {plan['steps']:,} steps"
        + ("" if plan["phases"] else f" of {recipe.train.tokens_per_step:,}")
        + (f", the first {plan['first_step']:,} of them the trunk's" if plan["first_step"] else ""),
        "gradient accumulation": f"{accumulation} micro batches of {train.micro_batch_size} x {train.sequence_length}",
        "memory a rank": f"{(state['total'] + plan['activation_bytes_per_rank']) / 1e9:.2f} GB: weights {state['weights'] / 1e9:.2f}, gradients "
        f"{state['gradients'] / 1e9:.2f}, optimizer {state['optimizer'] / 1e9:.2f}, activations about {plan['activation_bytes_per_rank'] / 1e9:.2f}",
        "time": f"about {_duration(plan['estimated_seconds'])} ({plan['estimate_basis']})",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for note in plan["initial_weights"]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if plan["phases"]:
        print_phases(plan["phases"], console)


def _estimate_seconds(
    recipe: Recipe, precision: str, world_size: int, tokens: int, flops_per_token: float
) -> tuple[float, str]:
    rates = [
        row["tokens_per_second"]
        for row in read_rows(Path(recipe.output_path) / "metrics.jsonl")
        if row["kind"] == "train"
    ]
    if rates:
        return tokens / sorted(rates)[len(rates) // 2], "from the speed of this run so far"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, precision)
    rate = peak or _measured_flops(device, precision)
    basis = "data-sheet peak" if peak else "matrix product measured here"
    efficiency = ASSUMED_EFFICIENCY[device.type]
    return tokens * flops_per_token / (
        rate * efficiency * world_size
    ), f"from the {basis}, at {efficiency:.0%} of it"


def _measured_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a 1024^3 product in one thread on a CPU, where each rank gets about one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.randn(1024, 1024, device=device).to(DTYPES[precision])
        times = []
        for _ in range(4):
            started = time.perf_counter()
            (a @ a).sum().item()
            times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * 1024**3 / min(times)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return (
        f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
        if seconds < 172800
        else f"{seconds / 86400:.1f} days"
    )
