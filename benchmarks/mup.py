#!/usr/bin/env python
"""Whether the best learning rate stays when a model becomes wider: standard against muP.

A grid of learning rates for each width. The models are mixtures of experts of one form
(quickstart's, with fewer layers and experts) on the quickstart's data; depth, head size and the
number of experts are constant, and at the smallest width, the base, both kinds are the same model.
Every run sees the same tokens in the same order; its result is the mean loss of its last steps.
"""

from __future__ import annotations

import datetime
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple, TypedDict

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_pipeline.loading.shard_loader import open_shard_loader
from data_pipeline.shards.datasets import data_folders, load_datasets
from pretrain.analysis.coordinates import KINDS, Kind, PlainTraining, recipe_at, with_vocabulary
from pretrain.config.load import load_recipe
from pretrain.config.loader_plan import loader_plan
from pretrain.core.cli import add_json_option, add_set_option, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command

EXAMPLES = """\
  python benchmarks/mup.py --data data/quickstart --json benchmarks/results/mup.json
  python benchmarks/mup.py --data data/quickstart --widths 32 64 --powers -9 -8 -7 --steps 20 \\
    --set model.initializer_range=0.06

exit codes: 0 done, 2 widths that do not fit, 3 data that are not there,
            5 a result that cannot be written"""
SETTINGS = (
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.attention.num_attention_heads=2",
    "model.attention.num_key_value_heads=1",
    "model.attention.head_dim=16",
    "model.moe.num_experts=4",
    "model.moe.moe_intermediate_size=64",
    "train.sequence_length=128",
    "train.micro_batch_size=4",
    "train.global_batch_size=4",
    "train.precision=fp32",
    "parallel.ep_size=1",
    "optimizer.embedding_learning_rate=null",
    "schedule={kind: linear, warmup_steps: 10, min_learning_rate_ratio: 0.0}",
)
# Share of a run's steps, at its end, whose mean loss is its result.
LAST_SHARE = 0.2


class Job(NamedTuple):
    """One run: a kind, a width, and the learning rate as a power of two."""

    kind: Kind
    width: int
    power: int


class WidthResult(TypedDict):
    """All losses of one kind at one width; None if a loss is not finite.

    ``steps_from_base`` is in steps of the grid; ``loss_at_base_best`` is that of the base's best
    learning rate.
    """

    width: int
    losses: dict[str, float | None]
    best: str
    steps_from_base: int
    loss: float
    loss_at_base_best: float


def train(job: Job, data: str, base: int, steps: int, overrides: list[str]) -> float:
    """The mean loss of the last fifth of a run's steps, nats per token."""
    # Runs share the machine, one core each.
    torch.set_num_threads(1)
    rate = f"optimizer.learning_rate={2.0**job.power}"
    recipe = load_recipe(
        "quickstart",
        [*SETTINGS, *overrides, rate, f"data.path={data}", f"train.train_tokens={steps * 512}"],
    )
    datasets = load_datasets(data_folders(recipe.data, recipe.data_path))
    recipe = with_vocabulary(recipe, datasets.tokenizer.vocab_size)
    loader = open_shard_loader(recipe.data, datasets, loader_plan(recipe), 0, 1)
    training = PlainTraining(recipe_at(recipe, job.width, base, job.kind, "heads"))
    losses = [
        training.step(loader.step_batches(step), recipe.schedule.factor(step, steps))
        for step in range(steps)
    ]
    last = losses[-max(1, round(LAST_SHARE * steps)) :]
    return sum(last) / len(last)


def all_jobs(widths: list[int], powers: list[int]) -> list[Job]:
    """All runs, the longest ones first; at the base both kinds are the same model."""
    # The longest first, so that no long run starts last on an otherwise idle machine.
    jobs = [Job(kind, width, power) for kind in KINDS for width in widths for power in powers]
    return sorted(
        (job for job in jobs if job.kind == "standard" or job.width != min(widths)),
        key=lambda job: -job.width,
    )


def conclusions(
    losses: dict[Job, float], widths: list[int], powers: list[int]
) -> dict[str, list[WidthResult]]:
    """For each kind, the result at each width."""
    base = min(widths)
    result: dict[str, list[WidthResult]] = {}
    # muP claims that this power is best at every width.
    base_best = min(powers, key=lambda power: losses[Job("standard", base, power)])
    for kind in KINDS:
        results: list[WidthResult] = []
        for width in widths:
            found = {
                power: losses[Job("standard" if width == base else kind, width, power)]
                for power in powers
            }
            best = min(powers, key=lambda power: found[power])
            results.append(
                {
                    "width": width,
                    "losses": {
                        f"2^{power}": round(loss, 4) if math.isfinite(loss) else None
                        for power, loss in found.items()
                    },
                    "best": f"2^{best}",
                    "steps_from_base": powers.index(best) - powers.index(base_best),
                    "loss": round(found[best], 4),
                    "loss_at_base_best": round(found[base_best], 4),
                }
            )
        result[kind] = results
    return result


def print_table(rates: list[str], found: dict[str, list[WidthResult]]) -> None:
    """Print one table per kind, with a column per learning rate."""
    for kind in KINDS:
        table = Table(
            "width",
            *rates,
            "best",
            "grid steps from the base",
            "cost of the base's best",
            title=kind,
        )
        for of_width in found[kind]:
            cells = [
                f"{loss:.3f}" if loss is not None else "not finite"
                for loss in of_width["losses"].values()
            ]
            table.add_row(
                str(of_width["width"]),
                *cells,
                of_width["best"],
                f"{of_width['steps_from_base']:+d}",
                f"{of_width['loss_at_base_best'] - of_width['loss']:.3f}",
            )
        Console().print(table)


def main() -> None:
    """Train the grid, print the tables and write the result."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="shards of the quickstart")
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[32, 64, 128, 256],
        metavar="D",
        help="hidden sizes; the smallest is the base",
    )
    parser.add_argument(
        "--powers",
        type=int,
        nargs="+",
        default=list(range(-10, -3)),
        metavar="P",
        help="learning rates are 2^P",
    )
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="optimizer steps of 512 tokens a run"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="runs at a time, a core each"
    )
    add_set_option(parser, "of the recipe at its base; may be repeated")
    add_json_option(parser)
    options = parser.parse_args()
    widths = sorted(set(options.widths))
    powers = sorted(set(options.powers))
    if options.steps < 1 or options.processes < 1:
        raise ConfigError("--steps and --processes are 1 or more")
    jobs = all_jobs(widths, powers)
    losses: dict[Job, float] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        running = {
            pool.submit(train, job, options.data, widths[0], options.steps, options.overrides): job
            for job in jobs
        }
        for done in tqdm(as_completed(running), total=len(jobs), desc="runs", unit="run"):
            losses[running[done]] = done.result()
    rates = [f"2^{power}" for power in powers]
    found = conclusions(losses, widths, powers)
    result = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "steps": options.steps,
        "settings": [*SETTINGS, *options.overrides],
        "tokens_a_step": 512,
        "rates": rates,
        **found,
    }
    if options.json_path != "-":
        print_table(rates, found)
    write_json(result, options.json_path)


if __name__ == "__main__":
    run_command(main)
