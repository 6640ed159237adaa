#!/usr/bin/env python
"""Memory of activations against the length of a sequence that 1, 2 or 4 ranks share.

Each rank takes a training step of micro batch 1, at each length, and notes the most that the
allocator had given out in it, above what it holds before the step (weights, ZeRO 1's optimizer
state). What remains at length 0, such as gradients, is left out by the slope over the lengths: it
is bytes a token. One process a rank; plain attention kernels of the CPU keep no matrix of scores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from data_pipeline.loading.batch import Batch
from pretrain.callbacks.environment import hardware
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.core.files import JsonObject
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import connect, disconnect, free_port

EXAMPLES = """\
  python benchmarks/sequence_lengths.py
  python benchmarks/sequence_lengths.py --sizes 1 2 --tokens 256 512 --plot lengths.png"""
RECIPE = "quickstart"
SETTINGS = (
    "parallel.ep_size=1",
    "model.vocab_size=4096",
    "model.num_hidden_layers=2",
    "model.attention.num_attention_heads=8",
    "model.attention.num_key_value_heads=4",
    "model.attention.head_dim=32",
    "model.attention.kernel=sdpa",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "train.precision=fp32",
    "logging.tensorboard=false",
)
MEASURE = (
    "the most bytes that torch's CPU allocator had given out at once in a step, above those before"
    " the step; the largest of the ranks"
)


def recipe_of(length: int, sp_size: int) -> Recipe:
    """The measured recipe at one length."""
    sizes = [
        f"model.max_position_embeddings={length}",
        f"train.sequence_length={length}",
        f"train.train_tokens={length * 100}",
        f"parallel.sp_size={sp_size}",
    ]
    return load_recipe(RECIPE, [*SETTINGS, *sizes])


def peak_bytes(profiler: profile) -> int:
    """The largest sum of what was allocated and not freed."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in events
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def measure(lengths: list[int], sp_size: int) -> dict[str, int]:
    """Peak bytes of a step by its length; every rank must call it."""
    found: dict[str, int] = {}
    topology = connect(1, sp_size=sp_size)
    for length in lengths:
        recipe = recipe_of(length, sp_size)
        accumulation = check_topology(recipe, topology.world_size, 1)
        # The default bucket, 2 GB in fp32, would be larger than the activations.
        origin: JsonObject = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000}}
        ds_config = resolve_ds_config(
            origin, "the benchmark", recipe, "fp32", accumulation, topology.world_size
        )
        engine = Engine(recipe, ds_config, "fp32", topology)
        generator = torch.Generator().manual_seed(length)
        tokens_1S = torch.randint(0, 4096, (1, length + 1), generator=generator)
        batch = Batch(tokens_1S[:, :-1].contiguous(), tokens_1S[:, 1:].contiguous())
        # The first step makes what stays: optimizer state and buffers.
        engine.train_step([batch], 1.0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine.train_step([batch], 1.0)
        found[str(length)] = max(topology.all_gather(peak_bytes(profiler)))
    return found


def worker(options: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    found = measure(options.lengths, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        options.worker.write_text(json.dumps(found))
    disconnect()


class Ranks:
    """``size`` processes that share each sequence.

    Args:
        output: gets what they have measured.
    """

    def __init__(self, size: int, lengths: list[int], output: Path) -> None:
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        shared["MASTER_PORT"] = str(free_port())
        command = [sys.executable, __file__, "--worker", str(output), "--lengths"]
        self.output = output
        self.processes = [
            subprocess.Popen(
                [*command, *map(str, lengths)],
                env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in map(str, range(size))
        ]

    def peak_bytes(self) -> dict[str, int]:
        """By length, when all have ended."""
        if any(process.wait() for process in self.processes):
            raise SystemExit(f"one of {len(self.processes)} ranks failed: see above")
        found: dict[str, int] = json.loads(self.output.read_text())
        return found


def measure_all(sizes: list[int], tokens: list[int]) -> dict[int, dict[str, int]]:
    """Peak bytes of a step by sp_size and length.

    All sizes run at the same time: what the allocator gives out does not depend on others.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = {
            size: Ranks(size, [count * size for count in tokens], Path(folder) / f"{size}.json")
            for size in sizes
        }
        try:
            progress = tqdm(started.items(), desc="sp_size", file=sys.stderr)
            return {size: ranks.peak_bytes() for size, ranks in progress}
        finally:
            for ranks in started.values():
                for process in ranks.processes:
                    process.kill()


def line_through(points: dict[str, int]) -> tuple[float, float]:
    """Slope (bytes a token) and value at length 0, by least squares."""
    lengths = torch.tensor([float(length) for length in points], dtype=torch.float64)
    values = torch.tensor([float(value) for value in points.values()], dtype=torch.float64)
    slope = ((lengths - lengths.mean()) * values).sum() / (lengths - lengths.mean()).square().sum()
    return float(slope), float(values.mean() - slope * lengths.mean())


def draw(result: JsonObject, path: Path) -> None:
    """Peak of a step against the length, a curve for each number of ranks."""
    import matplotlib

    # No display is needed to write a file.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for size, measured in result["sp_sizes"].items():
        points = measured["peak_bytes"]
        axes.plot(
            [int(length) for length in points],
            [value / 1e6 for value in points.values()],
            marker="o",
            label=f"sp_size {size}",
        )
    axes.set(xlabel="tokens of a sequence", ylabel="MB of a step on a rank", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[256, 512, 1024],
        metavar="N",
        help="of a rank; a sequence has as many times the ranks (default: 256 512 1024)",
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the curves")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, nargs="+", help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    """Measure all sizes, print the ratios, and write results and plot."""
    options = parse_arguments()
    if options.worker is not None:
        worker(options)
        return 0
    sizes: JsonObject = {}
    for size, points in measure_all(options.sizes, options.tokens).items():
        slope, rest = line_through(points)
        sizes[str(size)] = {"peak_bytes": points, "bytes_a_token": slope, "bytes_at_0": rest}
    first = sizes[str(options.sizes[0])]["bytes_a_token"]
    for measured in sizes.values():
        measured["tokens_in_the_same_memory"] = first / measured["bytes_a_token"]
    result: JsonObject = {
        "recipe": RECIPE,
        "settings": list(SETTINGS),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "memory": MEASURE,
        "sp_sizes": sizes,
    }
    if options.json_path != "-":
        for name, measured in sizes.items():
            print(
                f"sp_size {name}: {measured['bytes_a_token']:,.0f} bytes of activations a token on "
                f"each rank, {measured['tokens_in_the_same_memory']:.2f} times the tokens in the "
                "same memory"
            )
    write_json(result, options.json_path)
    if options.plot is not None:
        draw(result, options.plot)
    return 0


if __name__ == "__main__":
    run_command(main)
