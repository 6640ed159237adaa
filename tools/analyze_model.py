#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Sizes a recipe's model before it is built: parameters, number formats, FLOPs, memory, cache."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console
from rich.table import Table

from pretrain.config.epochs import with_known_length
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline, has_known_length
from pretrain.core.cli import add_json_option, add_recipe_options, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.figures import save_figure
from pretrain.core.registry import kind_name
from pretrain.core.shipped import recipe_names
from pretrain.engine.part_precision import PartPrecision, part_precisions
from pretrain.model.config import ModelConfig
from pretrain.model.sizes import ModelSize, cache_bytes, model_size
from pretrain.optim.config import Optimizer
from pretrain.run.capacity import check_world_size
from pretrain.run.memory import activation_bytes, state_bytes_per_rank
from pretrain.run.plan_report import formats_table

EXAMPLES = """\
  python tools/analyze_model.py --recipe h64lm
  python tools/analyze_model.py --recipe olmoe_1b_7b --world-size 64 --set train.micro_batch_size=1
  python tools/analyze_model.py --recipe peer_mla_16b --set train.precision=fp8
  python tools/analyze_model.py --recipe gpt_oss_20b --plot sizes.png --json -"""
ZERO_STAGES = (0, 1, 2, 3)
CACHE_WIDTH = 2  # bytes of a cached element: bf16
# Bytes a rank by ZeRO stage, then by ep_size, then by what they are for.
MemoryByLayout = dict[str, dict[str, dict[str, int]]]


class Analysis(TypedDict):
    """The command's result as JSON: counts of parameters, bytes and FLOPs.

    The tokens and FLOPs of the whole run are null if the recipe gives its length in epochs, and its
    data are not there. The memory of ``memory`` is for weights, gradients and optimizer;
    activations come on top.
    """

    recipe: str
    kinds: dict[str, str]
    parameters_total: int
    parameters_active: int
    active_share: float
    parameters_padding: int
    parameters_experts: int
    experts_total: int
    experts_per_token: int
    components: dict[str, int]
    components_active: dict[str, int]
    sequence_length: int
    flops_per_token: float
    train_tokens: int | None
    train_flops: float | None
    precision: str
    number_formats: list[dict[str, Any]]
    world_size: int
    ep_size: int
    sp_size: int
    tp_size: int
    optimizer: str
    memory: MemoryByLayout
    activation_bytes_per_rank: int
    kv_cache_bytes_per_token: int
    max_position_embeddings: int
    kv_cache_bytes_full_context: int


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(f"{__doc__} Needs neither data nor a tokenizer.", EXAMPLES)
    add_recipe_options(parser)
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="ranks that the memory is planned for (default: the fewest that parallel needs)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="draw total against active parameters of all shipped recipes, this one marked",
    )
    add_json_option(parser)
    return parser.parse_args()


def sized_model(recipe: Recipe) -> ModelConfig:
    """The model section with the size of its vocabulary, from the tokenizer's section if needed.

    Raises:
        ConfigError: if neither section has it.
    """
    vocab_size = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    if vocab_size is None:
        raise ConfigError(
            f"{recipe.name}: the vocabulary's size is missing, and it decides how large embedding"
            " and head are: add --set model.vocab_size=N, or give model.vocab_size in the recipe"
        )
    return recipe.model.model_copy(update={"vocab_size": vocab_size})


def memory_by_layout(
    size: ModelSize, model: ModelConfig, precision: str, world_size: int, optimizer: Optimizer
) -> MemoryByLayout:
    """Bytes a rank for every ZeRO stage, and for every ep_size that divides ranks and experts."""
    ep_sizes = [
        count
        for count in range(1, world_size + 1)
        if world_size % count == 0 and model.total_experts % count == 0
    ]
    stages = ZERO_STAGES if model.moe is None else model.moe.zero_stages
    return {
        str(stage): {
            str(ep): state_bytes_per_rank(size, precision, stage, world_size, ep, optimizer)
            for ep in ep_sizes
        }
        for stage in stages
    }


def chosen_kinds(recipe: Recipe) -> dict[str, str]:
    """The kind of each part of the model and of its optimizer, by the field that chooses it."""
    model = recipe.model
    kinds: dict[str, str] = {"optimizer": recipe.optimizer.kind}
    for name in ("attention", "position", "norm", "feed_forward", "layer_pattern", "moe"):
        part = getattr(model, name)
        if part is not None:
            kinds[f"model.{name}"] = part.kind
    kinds["model.attention.kernel"] = model.attention.kernel
    if model.routing is not None:
        kinds["model.moe.router"] = kind_name(type(model.routing.router))
    return dict(sorted(kinds.items()))


def train_flops(model: ModelConfig, timeline: Timeline) -> float:
    """FLOPs of a whole run, whose phases may have sequences of different lengths."""
    # Attention's FLOPs grow with the sequence, so that each phase is counted with its own.
    phases = (
        (phase, model_size(model, phase.recipe.train.sequence_length)) for phase in timeline.phases
    )
    return sum(size.flops_per_token * phase.num_tokens for phase, size in phases)


def analyze(recipe: Recipe, world_size: int) -> Analysis:
    """All figures of a recipe's model on ``world_size`` ranks."""
    model = sized_model(recipe)
    train = recipe.train
    recipe = with_known_length(recipe)
    timeline = Timeline(recipe) if has_known_length(recipe) else None
    size = model_size(model, train.sequence_length, recipe.parallel.tp_size)
    precision = "bf16" if train.precision == "auto" else train.precision
    context = model.max_position_embeddings
    return {
        "recipe": recipe.name,
        "kinds": chosen_kinds(recipe),
        "parameters_total": size.parameters_total,
        "parameters_active": size.parameters_active,
        "active_share": size.parameters_active / size.parameters_total,
        "parameters_padding": size.parameters_padding,
        "parameters_experts": size.parameters_experts,
        "experts_total": model.total_experts,
        "experts_per_token": 0 if model.moe is None else model.moe.experts_per_token,
        "components": size.components,
        "components_active": size.components_active,
        "sequence_length": train.sequence_length,
        "flops_per_token": size.flops_per_token,
        "train_tokens": None if timeline is None else timeline.num_tokens,
        "train_flops": None if timeline is None else train_flops(model, timeline),
        "precision": precision,
        "number_formats": [asdict(part) for part in part_precisions(model, precision)],
        "world_size": world_size,
        "ep_size": recipe.parallel.ep_size,
        "sp_size": recipe.parallel.sp_size,
        "tp_size": recipe.parallel.tp_size,
        "optimizer": recipe.optimizer.kind,
        "memory": memory_by_layout(size, model, precision, world_size, recipe.optimizer),
        "activation_bytes_per_rank": activation_bytes(
            model, train, precision, recipe.parallel.token_parts
        ),
        "kv_cache_bytes_per_token": cache_bytes(model, 1, CACHE_WIDTH),
        "max_position_embeddings": context,
        "kv_cache_bytes_full_context": cache_bytes(model, context, CACHE_WIDTH),
    }


def print_tables(result: Analysis) -> None:
    """Prints kinds, parameters by component, number formats, costs, and memory by layout."""
    console = Console()
    parts = Table(
        "component", "parameters", "of all", "active", title=f"{result['recipe']}: parameters"
    )
    rows = [
        (name, count, result["components_active"][name])
        for name, count in result["components"].items()
        if count
    ]
    rows.append(("total", result["parameters_total"], result["parameters_active"]))
    for name, count, active in rows:
        parts.add_row(
            name.replace("_", " "),
            f"{count:,}",
            f"{count / result['parameters_total']:.1%}",
            f"{active:,}",
        )
    kinds = Table("part", "kind", title="kinds")
    for field, kind in result["kinds"].items():
        kinds.add_row(field, kind)
    costs = Table("what", "value", title="costs")
    for name, value in cost_rows(result).items():
        costs.add_row(name, value)
    memory = result["memory"]
    ep_sizes = list(next(iter(memory.values())))
    title = f"weights, gradients and {result['optimizer']} on each of {result['world_size']} ranks"
    state = Table("ZeRO", *(f"ep_size {ep}" for ep in ep_sizes), title=title)
    for stage, layouts in memory.items():
        state.add_row(stage, *(f"{layout['total'] / 1e9:.2f} GB" for layout in layouts.values()))
    formats = formats_table(PartPrecision(**part) for part in result["number_formats"])
    for table in (kinds, parts, formats, costs, state):
        console.print(table)


def cost_rows(result: Analysis) -> dict[str, str]:
    """The rows of the table of costs."""
    per_token = result["kv_cache_bytes_per_token"]
    full = result["kv_cache_bytes_full_context"]
    experts = "none"
    if used := result["experts_per_token"]:
        total = result["experts_total"]
        experts = f"at most {used:,} of {total:,} a token in each such layer ({used / total:.2%})"
    return {
        "active share": f"{result['active_share']:.1%} of all parameters",
        "routed experts": experts,
        "vocabulary padding": f"{result['parameters_padding']:,} parameters more in memory",
        "FLOPs a token": (
            f"{result['flops_per_token']:.4g}, forward and backward, in sequences of"
            f" {result['sequence_length']:,}"
        ),
        "whole run": (
            "not known before there are data: its length is given in epochs"
            if result["train_flops"] is None
            else f"{result['train_flops']:.4g} FLOPs over {result['train_tokens']:,} tokens"
        ),
        "activations": (
            f"about {result['activation_bytes_per_rank'] / 1e9:.2f} GB a rank for a micro batch in"
            f" {result['precision']}"
        ),
        "cache": (
            f"{per_token:,} bytes a token in bf16, {full / 1e6:,.1f} MB for all"
            f" {result['max_position_embeddings']:,} tokens of a sequence"
        ),
    }


def shipped_points() -> dict[str, tuple[int, int]]:
    """Total and active parameters of every shipped recipe whose vocabulary is known."""
    recipes = {name: load_recipe(name) for name in recipe_names()}
    known = {
        name: sized_model(recipe)
        for name, recipe in recipes.items()
        if recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    }
    sizes = {name: model_size(model, sequence_length=1) for name, model in known.items()}
    return {name: (size.parameters_total, size.parameters_active) for name, size in sizes.items()}


def plot(result: Analysis, path: Path) -> None:
    """Plots total against active parameters of all shipped recipes, both logarithmic.

    Raises:
        StorageError: if the plot cannot be written.
    """
    import matplotlib

    # Draws into memory: the default backend may ask for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 7), layout="constrained")
    draw(axes, result, shipped_points())
    save_figure(figure, path)


def draw(axes: Any, result: Analysis, points: dict[str, tuple[int, int]]) -> None:
    """Draws the shipped recipes, and marks the analyzed one.

    Args:
        axes: of matplotlib.
        points: total and active parameters of each shipped recipe.
    """
    axes.loglog(
        *zip(*points.values(), strict=True),
        "o",
        color="tab:gray",
        markersize=4,
        label="shipped recipes",
    )
    analyzed = (result["parameters_total"], result["parameters_active"])
    axes.loglog(*analyzed, "*", color="tab:red", markersize=15, label=result["recipe"])
    # The small copies for tests are close together: only the real sizes get a name, alternating
    # between the lower right and the upper left of their point.
    named = sorted((point, name) for name, point in points.items() if not name.endswith("_mini"))
    for index, (point, name) in enumerate(named):
        offset, side = ((5, -9), "left") if index % 2 == 0 else ((-5, 5), "right")
        axes.annotate(name, point, xytext=offset, ha=side, textcoords="offset points", fontsize=7)
    ends = [
        min(active for _, active in points.values()),
        max(total for total, _ in points.values()),
    ]
    axes.loglog(ends, ends, "--", color="tab:gray", linewidth=0.8, label="all active")
    axes.set(xlabel="parameters in all", ylabel="active parameters a token")
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    world_size = (
        arguments.world_size if arguments.world_size is not None else recipe.parallel.fewest_ranks
    )
    check_world_size(world_size)
    result = analyze(recipe, world_size)
    if arguments.json_path != "-":
        print_tables(result)
    if arguments.plot is not None:
        plot(result, arguments.plot)
    write_json(result, arguments.json_path)


command = partial(run_command, main)  # moe-analyze

if __name__ == "__main__":
    command()
