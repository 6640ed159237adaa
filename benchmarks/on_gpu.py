#!/usr/bin/env python
"""What an MoE layer, a whole training step and each fused kernel reach on one GPU.

One call measures one part, each side in a process of its own, and is meant to take less than ten
minutes on an H100 or H200. It needs no network. Without --quick a GPU is needed; with it, tiny
sizes show on any machine that the script works. Exit code 1: a side failed, or a fused kernel
differs from the plain code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from types import ModuleType

from gpu.timing import Bench, check_device
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pretrain.callbacks.environment import hardware, packages
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.files import JsonObject
from pretrain.core.startup import quiet_libraries

EXAMPLES = """\
  python benchmarks/on_gpu.py layer --json layer.json
  python benchmarks/on_gpu.py step --json step.json
  TRITON_INTERPRET=1 python benchmarks/on_gpu.py kernels --device cpu --quick"""
PARTS = ("layer", "step", "kernels")
PACKAGES = ("torch", "triton", "transformers", "deepspeed")


def print_tables(found: dict[str, dict[str, JsonObject]]) -> None:
    """A row for each model and side, and the operations of a profile below."""
    console = Console(stderr=True, width=140)
    for model, sides in found.items():
        names = {name: None for side in sides.values() for name in side if name != "profile"}
        table = Table(model, *names)
        for side, values in sides.items():
            table.add_row(side, *(_shown(values.get(name)) for name in names))
        console.print(table)
        for side, values in sides.items():
            if "profile" in values:
                table = Table(f"{model}, {side}", "us", "calls")
                for row in values["profile"]:
                    table.add_row(
                        row["name"][:80], f"{row['microseconds']:,.0f}", str(row["calls"])
                    )
                console.print(table)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few calls")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the models or sides")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args()


def measure(options: argparse.Namespace, model: str, side: str) -> dict[str, JsonObject]:
    """Measure in a new process; one that fails, for lack of memory maybe, says why instead."""
    command = [sys.executable, __file__, options.part, "--device", options.device]
    command += [*["--quick"] * options.quick, "--here", model, side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {side: {"failed": done.stderr.strip()[-300:]}}
    found: dict[str, JsonObject] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure one part, print its tables and write the results."""
    quiet_libraries()
    options = parse_arguments()
    bench = Bench(check_device(options.device, options.quick), options.quick)
    # After the check: the parts import DeepSpeed.
    part: ModuleType = importlib.import_module(f"gpu.{options.part}")
    if options.here:
        print(json.dumps(part.measure(bench, *options.here)))
        return 0
    jobs = [job for job in part.jobs() if not options.only or set(options.only) & set(job)]
    if not jobs:
        names = ", ".join(dict.fromkeys(name for job in part.jobs() for name in job))
        raise ConfigError(f"--only {' '.join(options.only)}: choose of {names}")
    found: dict[str, dict[str, JsonObject]] = {model: {} for model, _ in jobs}
    for model, side in tqdm(jobs, desc=options.part):
        found[model] |= measure(options, model, side)
    print_tables(found)
    installed = packages()
    result: JsonObject = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "packages": {name: installed.get(name) for name in PACKAGES},
        "part": options.part,
        "quick": options.quick,
        "results": found,
    }
    write_json(result, options.json_path)
    rows = [row for sides in found.values() for row in sides.values()]
    return int(any("failed" in row or row.get("close") is False for row in rows))


if __name__ == "__main__":
    run_command(main)
