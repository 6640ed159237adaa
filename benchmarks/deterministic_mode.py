#!/usr/bin/env python
"""Cost of train.deterministic: the same steps of one model in alternating modes, in one process."""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import UTC, datetime

import torch
from tqdm import trange

from data_pipeline.loading.batch import Batch
from pretrain.callbacks.environment import hardware
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.cli import add_json_option, add_recipe_options, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.engine.determinism import be_deterministic
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.precision import resolve_precision
from pretrain.engine.topology import connect, disconnect
from pretrain.run.resolve import resolve_recipe

EXAMPLES = """\
  python benchmarks/deterministic_mode.py
  python benchmarks/deterministic_mode.py --recipe quickstart --set parallel.ep_size=1 \\
    --steps 10 --json benchmarks/results/deterministic_mode.json"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_options(parser, default="debug")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="pairs of steps (default: 20)"
    )
    add_json_option(parser)
    return parser.parse_args()


def random_batch(recipe: Recipe, seed: int) -> Batch:
    """A micro batch of uniform tokens, whose values do not matter for the time."""
    vocab_size = recipe.model.vocab_size
    train = recipe.train
    assert vocab_size is not None
    tokens_BS = torch.randint(
        vocab_size,
        (train.micro_batch_size, train.sequence_length),
        generator=torch.Generator().manual_seed(seed),
    )
    return Batch(tokens_BS, tokens_BS)


def timed_pairs(engine: Engine, batches: list[Batch], pairs: int) -> list[tuple[float, float]]:
    """CPU seconds of the same batches in the plain and in the deterministic mode.

    Which of the two comes first alternates.
    """
    found = []
    for number in trange(pairs + 1, desc="pairs"):
        times = {}
        # Process time, not wall time: other programs on the machine do not count.
        for deterministic in (False, True) if number % 2 else (True, False):
            if deterministic:
                be_deterministic()
            else:
                torch.use_deterministic_algorithms(False)
            started = time.process_time()
            engine.train_step(batches, 0.0)
            times[deterministic] = time.process_time() - started
        found.append((times[False], times[True]))
    # The first pair also compiles and allocates.
    return found[1:]


def main() -> int:
    """Time the pairs, print their median ratio and write the result."""
    options = parse_arguments()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, options.overrides)
    precision = resolve_precision(recipe.train.precision)
    recipe = resolve_recipe(recipe, precision, None)
    accumulation = check_topology(recipe, 1, 1)
    resolved = resolve_ds_config(
        {"zero_optimization": {"stage": 1}}, "ZeRO 1", recipe, precision, accumulation, 1
    )
    # Nothing but the steps is timed.
    resolved["tensorboard"]["enabled"] = False
    engine = Engine(recipe, resolved, precision, connect(recipe.parallel.ep_size))
    pairs = timed_pairs(
        engine, [random_batch(recipe, number) for number in range(accumulation)], options.steps
    )
    ratios = sorted(with_mode / plain for plain, with_mode in pairs)
    result = {
        "recipe": recipe.name,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "precision": precision,
        "pairs": len(pairs),
        "plain_cpu_seconds_median": statistics.median(plain for plain, _ in pairs),
        "deterministic_cpu_seconds_median": statistics.median(with_mode for _, with_mode in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
    }
    if options.json_path != "-":
        print(
            f"a deterministic step takes {result['ratio_median']:.3f} of the CPU time of a plain"
            f" one (median of {len(pairs)} pairs)"
        )
    write_json(result, options.json_path)
    disconnect()
    return 0


if __name__ == "__main__":
    run_command(main)
