#!/usr/bin/env python
"""How the cost of a training step grows: experts, tokens, sequence, vocabulary, layers and ranks.

Each point is a step of this project's engine (ZeRO 1; bf16, or fp32 on a CPU that emulates bf16)
with the settings for CPUs, in processes of its own with one thread each: the median CPU seconds of
a step, added up over its ranks, and the largest peak of resident memory. Along each axis all other
sizes stay as they are; experts have equal active FLOPs, sequences and ranks equal tokens a step.

Next to each point is a floor, measured in the same process:

    floor = F / r + [P_d (n g + 24) + P_e (g + 24)] / b        with g = 4 w m + w

F: FLOPs of a step's matrix products and attention. r: the rate of one large product.
P_d, P_e: dense and expert parameters. n: ranks, each with all dense parameters and its share of the
experts. w: bytes of an element. m: micro batches of a rank. g: weights are read in both passes
and gradients are added to in each micro batch; then gradients are read and weights written once.
24: fp32 weights and two moments, read and written by the one rank that has them. b: the rate of a
large copy. Activations and communication are not in it.

A cost c that grows as x^a has the slope a in log c over log x. A cost grows faster than its floor
if its slope is larger, over all points or between the last two; the table then says why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peers.measure import fast_format, seconds_of_bytes
from peers.models import recipe_of
from peers.train_step import our_step, step_side
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pretrain.callbacks.environment import hardware
from pretrain.config.recipe import Recipe
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.figures import save_figure
from pretrain.engine.precision import DTYPES

EXAMPLES = """\
  make bench-growth
  python benchmarks/cost_growth.py --only experts ranks --json - --plot growth.png
  python benchmarks/cost_growth.py --quick"""
# Slopes of a few noisy points differ by so much without a reason.
TOLERANCE = 0.1
STATE_BYTES = 24
BASE = (
    "model.num_hidden_layers=2",
    "model.max_position_embeddings=2048",
    "model.moe.moe_intermediate_size=256",
)
STEP_TOKENS = 4096


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        reason: why its cost may grow faster than its floor.
    """

    values: tuple[int, ...]
    reason: str

    def shown(self, quick: bool) -> tuple[int, ...]:
        """The values to measure."""
        return self.values[:2] if quick else self.values


AXES = {
    "experts": Axis(
        (8, 16, 32, 64, 128, 256),
        "an expert's rows become few, and a product of few rows reads its weights for less work",
    ),
    "tokens": Axis(
        (512, 1024, 2048, 4096, 8192),
        "activations outgrow the caches, and their traffic is not in the floor",
    ),
    "sequence": Axis(
        (128, 256, 512, 1024, 2048),
        "attention's softmax is no product: it grows with the keys, but is not in the floor",
    ),
    "vocabulary": Axis(
        (4096, 8192, 16384, 32768, 65536),
        "the loss makes passes over fp32 logits, whose traffic is not in the floor",
    ),
    "layers": Axis((1, 2, 4, 8), "activations outgrow the caches"),
    "ranks": Axis(
        (1, 2, 4), "each rank launches all operations of its step, and exchanges rows and gradients"
    ),
}


def overrides(axis: str, value: int) -> list[str]:
    """The settings of the quickstart's recipe at one point."""
    if axis not in AXES:
        raise ConfigError(f"there is no axis '{axis}': take one of {', '.join(AXES)}")
    length, micro, of_step, ranks = 256, 4, 8, 1
    found: list[str] = []
    match axis:
        case "experts":
            found.append(f"model.moe.num_experts={value}")
        case "tokens":
            of_step = value // length
            micro = of_step // 2
        case "sequence":
            length, of_step = value, STEP_TOKENS // value
            micro = of_step // 2
        case "vocabulary":
            found.append(f"model.vocab_size={value}")
        case "layers":
            found.append(f"model.num_hidden_layers={value}")
        case _:
            micro, ranks = 2, value
    return [
        f"train.precision={fast_format()}",
        *BASE,
        f"train.sequence_length={length}",
        f"train.micro_batch_size={micro}",
        f"train.global_batch_size={of_step}",
        f"parallel.ep_size={ranks}",
        *found,
    ]


def parameter_traffic(
    dense: int, experts: int, ranks: int, micro_batches: int, width: int
) -> float:
    """Bytes of parameters, gradients and optimizer state that a step moves, by the formula above.

    Args:
        dense: parameters that are on every rank.
        experts: parameters that ranks share.
        micro_batches: of each rank.
        width: bytes of an element.
    """
    each_rank = 4 * width * micro_batches + width
    return float(dense * (ranks * each_rank + STATE_BYTES) + experts * (each_rank + STATE_BYTES))


def traffic_of(recipe: Recipe) -> float:
    """:func:`parameter_traffic` of a recipe whose ep_size is the number of ranks."""
    from pretrain.model.sizes import model_size

    train, ranks = recipe.train, recipe.parallel.ep_size
    size = model_size(recipe.model, train.sequence_length)
    micro_batches = train.global_batch_size // (train.micro_batch_size * ranks)
    experts = size.parameters_sharded
    width = DTYPES[fast_format()].itemsize
    dense = size.parameters_stored - experts
    return parameter_traffic(dense, experts, ranks, micro_batches, width)


@dataclass(frozen=True)
class Point:
    """One measured size.

    Attributes:
        cpu_seconds: of a step, of all ranks.
        product_seconds, byte_seconds: the two parts of the floor.
        peak_bytes: resident, of the rank that has most.
    """

    value: int
    cpu_seconds: float
    product_seconds: float
    byte_seconds: float
    peak_bytes: int

    @property
    def floor_seconds(self) -> float:
        """CPU seconds that the step needs at least."""
        return self.product_seconds + self.byte_seconds

    @property
    def ratio(self) -> float:
        """The cost over its floor."""
        return self.cpu_seconds / self.floor_seconds


def slope(values: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent of a power law through the points: least squares of log cost over log value.

    Raises:
        ValueError: for fewer than two different values.
    """
    if len(set(values)) < 2:
        raise ValueError("a slope needs two different values")
    x, y = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    pairs = list(zip(x, y, strict=True))
    return sum((a - middle_x) * (b - middle_y) for a, b in pairs) / sum(
        (a - middle_x) ** 2 for a in x
    )


@dataclass(frozen=True)
class Growth:
    """Exponents along an axis, over all points and between the last two."""

    cost: float
    floor: float
    last_cost: float
    last_floor: float
    reason: str

    @property
    def is_faster(self) -> bool:
        """Whether the cost grows faster than its floor."""
        return self.cost > self.floor + TOLERANCE or self.last_cost > self.last_floor + TOLERANCE


def growth_of(points: Sequence[Point], reason: str) -> Growth:
    """Fit an axis's points, in ascending order."""
    values = [float(point.value) for point in points]
    costs = [point.cpu_seconds for point in points]
    floors = [point.floor_seconds for point in points]
    return Growth(
        slope(values, costs),
        slope(values, floors),
        slope(values[-2:], costs[-2:]),
        slope(values[-2:], floors[-2:]),
        reason,
    )


# --- measuring ------------------------------------------------------------------------------------


def measure_here(axis: str, value: int, warm_up: int, steps: int) -> dict[str, float]:
    """Measure this process's part of a point."""
    settings = overrides(axis, value)
    recipe = recipe_of(*settings)
    measured = step_side(
        our_step, *settings, ranks=recipe.parallel.ep_size, warm_up=warm_up, steps=steps
    )()
    return {
        "cpu_seconds": measured.cpu_seconds,
        "product_seconds": measured.floor_seconds or 0.0,
        "byte_seconds": seconds_of_bytes(traffic_of(recipe)),
        # Taken before the bytes were measured.
        "peak_bytes": measured.peak_bytes,
    }


def measure(axis: str, value: int, quick: bool) -> Point:
    """Measure a point in new processes, one a rank."""
    from pretrain.engine.topology import free_port

    ranks = value if axis == "ranks" else 1
    warm_up, steps = (1, 2) if quick else (4, 9)
    port = free_port()
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        launched = {name: str(number) for name, number in place.items()} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, "--here", axis, *map(str, (value, warm_up, steps))],
                env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"} | launched,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = [(process, *process.communicate()) for process in processes]
    for process, _, errors in done:
        if process.returncode:
            raise ConfigError(f"{axis} {value} failed:\n{errors[-3000:]}")
    found = [json.loads(output.splitlines()[-1]) for _, output, _ in done]
    return Point(
        value,
        sum(each["cpu_seconds"] for each in found),
        found[0]["product_seconds"],
        found[0]["byte_seconds"],
        max(each["peak_bytes"] for each in found),
    )


# --- showing --------------------------------------------------------------------------------------


def table_of(results: dict[str, list[Point]]) -> Table:
    """A row for each point, and the exponents behind each axis."""
    table = Table("axis", "value", "CPU ms", "floor", "ratio", "peak MB", "growth")
    for axis, points in results.items():
        for point in points:
            table.add_row(
                axis if point is points[0] else "",
                f"{point.value:,}",
                f"{point.cpu_seconds * 1e3:.0f}",
                f"{point.floor_seconds * 1e3:.0f}",
                f"{point.ratio:.2f}",
                f"{point.peak_bytes / 1e6:.0f}",
            )
        growth = growth_of(points, AXES[axis].reason)
        table.add_row(*[""] * 6, growth_text(growth), end_section=True)
    return table


def growth_text(growth: Growth) -> str:
    """The exponents in words, with the reason if the cost grows faster."""
    text = (
        f"x^{growth.cost:.2f}, floor x^{growth.floor:.2f}; at the end x^{growth.last_cost:.2f},"
        f" floor x^{growth.last_floor:.2f}"
    )
    return f"{text}: {growth.reason}" if growth.is_faster else text


def draw(results: dict[str, list[Point]], path: Path) -> None:
    """Plot cost and floor above, peak memory below, all logarithmic."""
    import matplotlib

    # Draws into memory: the default backend may ask for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        2, len(results), figsize=(2.6 * len(results), 5), layout="constrained", squeeze=False
    )
    for column, (axis, points) in enumerate(results.items()):
        values = [point.value for point in points]
        upper: Any = rows[0][column]
        lower: Any = rows[1][column]
        upper.loglog(values, [point.cpu_seconds for point in points], "o-", label="measured")
        upper.loglog(values, [point.floor_seconds for point in points], "--", label="floor")
        lower.loglog(values, [point.peak_bytes / 1e6 for point in points], "o-", color="tab:green")
        upper.set_title(axis)
        for each in (upper, lower):
            each.set_xticks(values, [f"{value:,}" for value in values], rotation=60, fontsize=7)
            each.minorticks_off()
    rows[0][0].set_ylabel("CPU seconds a step")
    rows[1][0].set_ylabel("peak memory, MB")
    rows[0][0].legend(fontsize=8)
    save_figure(figure, path, dpi=80)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--only", nargs="+", choices=AXES, metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--quick", action="store_true", help="two points an axis, few steps")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw all axes")
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    """Measure all points, print the table, and write results and plot."""
    options = parse_arguments()
    if options.here:
        axis, *numbers = options.here
        print(json.dumps(measure_here(axis, *map(int, numbers))))
        return 0
    chosen = options.only or list(AXES)
    jobs = [(axis, value) for axis in chosen for value in AXES[axis].shown(options.quick)]
    results: dict[str, list[Point]] = {axis: [] for axis in chosen}
    for axis, value in tqdm(jobs, desc="points"):
        results[axis].append(measure(axis, value, options.quick))
    Console(stderr=True).print(table_of(results))
    growths = {axis: growth_of(points, AXES[axis].reason) for axis, points in results.items()}
    write_json(
        {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": hardware(),
            "format": fast_format(),
            "threads": 1,
            "load": round(os.getloadavg()[0], 1),
            "points": {
                axis: [asdict(point) | {"ratio": point.ratio} for point in points]
                for axis, points in results.items()
            },
            "growth": {
                axis: asdict(growth) | {"is_faster": growth.is_faster}
                for axis, growth in growths.items()
            },
        },
        options.json_path,
    )
    if options.plot:
        draw(results, options.plot)
    return 0


if __name__ == "__main__":
    run_command(main)
