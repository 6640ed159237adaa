#!/usr/bin/env python
"""What training, layers and generation cost here and elsewhere: the other's CPU time over ours.

Each measurement is a process of its own, because allocators and kernel caches remember; the sides
of a comparison alternate, and every step has new tokens. A ratio above 1 means that we need less.
Beside each figure is its floor: the FLOPs of its matrix products at the rate of one large product
on the same machine, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from peers import comparisons
from peers.measure import Measured, fast_format
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pretrain.callbacks.environment import hardware
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.files import JsonObject

EXAMPLES = """\
  make bench
  python benchmarks/against_peers.py --only 'step, 8 experts' --rounds 3
  python benchmarks/against_peers.py --quick"""
OURS = "ours"
# What a quick run may differ from the stored ratio before it is pointed out.
BAND = 0.2
# One file for each format of layers and steps: a CPU without bf16 has another table.
STORED = "benchmarks/results/against_peers_{}.json"
# The measurements of each side of each comparison, one a round.
Runs: TypeAlias = dict[str, dict[str, list[Measured]]]


@dataclass(frozen=True)
class Row:
    """One side of a comparison over all rounds; ratios are the side's CPU seconds over ours."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    floor_seconds: float | None
    ratios: list[float]
    goal: float | None

    @property
    def ratio(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.ratios)


def measure(name: str, side: str) -> Measured | None:
    """Measure one side in a new process; None, and the end of its errors are shown, if it fails."""
    command = [sys.executable, __file__, "--here", name, side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tqdm.write(f"the side '{side}' of '{name}' failed:\n{done.stderr[-3000:]}", file=sys.stderr)
        return None
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def rows_of(comparison: comparisons.Comparison, runs: dict[str, list[Measured]]) -> dict[str, Row]:
    """The medians of each side, and the ratios of its rounds to ours."""
    ours = runs[OURS]
    return {
        side: Row(
            statistics.median(run.cpu_seconds for run in found),
            statistics.median(run.wall_seconds for run in found),
            max(run.peak_bytes for run in found),
            min((run.floor_seconds for run in found if run.floor_seconds), default=None),
            [run.cpu_seconds / own.cpu_seconds for run, own in zip(found, ours, strict=True)],
            comparison.goals.get(side),
        )
        for side, found in runs.items()
    }


def print_table(results: dict[str, dict[str, Row]]) -> None:
    """The table of all comparisons on standard error."""
    table = Table("what", "side", "CPU ms", "floor", "peak MB", "side / ours", "goal")
    for name, rows in results.items():
        for side, row in rows.items():
            spread = f"{row.ratio:.2f} [{min(row.ratios):.2f}-{max(row.ratios):.2f}]"
            table.add_row(
                name if side == OURS else "",
                side,
                f"{row.cpu_seconds * 1e3:.1f}",
                f"{row.floor_seconds * 1e3:.1f}" if row.floor_seconds else "",
                f"{row.peak_bytes / 1e6:.0f}",
                "" if side == OURS else spread,
                f"{row.goal:g}" if row.goal else "",
            )
    Console(stderr=True).print(table)


def report(results: dict[str, dict[str, Row]], rounds: int) -> JsonObject:
    """The results as JSON, with where and when they were measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "format": fast_format(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": rounds,
        "comparisons": {
            name: {side: asdict(row) for side, row in rows.items()}
            for name, rows in results.items()
        },
    }


def compare_with_stored(results: dict[str, dict[str, Row]]) -> None:
    """Point out the ratios that differ from the stored ones by more than the band."""
    stored_at = STORED.format(fast_format())
    try:
        with open(stored_at, encoding="utf-8") as file:
            stored = json.load(file)["comparisons"]
    except OSError:
        print(f"{stored_at} is not there: nothing to compare with", file=sys.stderr)
        return
    for name, rows in results.items():
        for side, row in rows.items():
            before = stored.get(name, {}).get(side, {}).get("ratios")
            if before and abs(row.ratio / statistics.median(before) - 1) > BAND:
                print(
                    f"{name}, {side}: {row.ratio:.2f} now, {statistics.median(before):.2f} stored",
                    file=sys.stderr,
                )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: 7)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the comparisons")
    parser.add_argument(
        "--quick", action="store_true", help="one round, compared with the stored ratios"
    )
    parser.add_argument("--list", action="store_true", help="print the comparisons' names")
    parser.add_argument(
        "--store", action="store_true", help=f"write {STORED.format('FORMAT')} after each round"
    )
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    """Run the comparisons in alternating rounds, print a table and write the results."""
    options = parse_arguments()
    known = comparisons.COMPARISONS
    if options.here:
        name, side = options.here
        print(json.dumps(asdict(known[name].sides[side]())))
        return 0
    if options.list:
        print("\n".join(known))
        return 0
    if unknown := set(options.only or ()) - known.keys():
        raise ConfigError(f"--only: there is no {', '.join(sorted(unknown))}: see --list")
    chosen = {name: known[name] for name in options.only or known}
    rounds = 1 if options.quick else options.rounds
    if options.store:
        options.json_path = STORED.format(fast_format())
    runs: Runs = {
        name: {side: [] for side in comparison.sides} for name, comparison in chosen.items()
    }
    failed: set[str] = set()
    with tqdm(total=rounds * sum(map(len, runs.values())), desc="measurements") as progress:
        for number in range(rounds):
            for name, comparison in chosen.items():
                for side in list(comparison.sides)[:: -1 if number % 2 else 1]:
                    measured = measure(name, side) if name not in failed else None
                    if measured is None:
                        failed.add(name)
                    else:
                        runs[name][side].append(measured)
                    progress.update()
            # After each round, so that an interrupted run of hours leaves what it has measured.
            results = {
                name: rows_of(chosen[name], sides)
                for name, sides in runs.items()
                if name not in failed
            }
            if options.json_path != "-" or number + 1 == rounds:
                write_json(report(results, number + 1), options.json_path)
    print_table(results)
    if options.quick:
        compare_with_stored(results)
    if failed:
        raise ConfigError(f"not measured, for the reasons above: {', '.join(sorted(failed))}")
    return 0


if __name__ == "__main__":
    run_command(main)
