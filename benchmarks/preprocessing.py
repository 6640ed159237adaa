#!/usr/bin/env python
"""JSON lines to .bin/.idx: this pipeline against Megatron-LM's two ways, and our stages' cost.

The corpus is real code and text: the files of the interpreter's library and of all installed
packages, as JSON lines. The tokenizer is a byte-level BPE of 32,768 entries trained on a tenth of
it. Each measurement is a separate process that reports its seconds without imports and start-up,
and the peak of memory that all its processes held (benchmarks/held_memory.py). Rounds alternate, so
that a change of the machine's speed affects all sides.

* newest: as Megatron-LM's preprocess_data_fast.py: gigatoken's encode_files over the whole file,
  then one call of the builder.
* classic: as its preprocess_data.py: a pool of 2 processes, one encode of the tokenizers library
  per document (on a part of the file).

A virtual machine may get memory from its host only at first use, which took two seconds per
gigabyte on the machine of the results: a price that the newest way pays for every token, and that
other machines do not have. So ours and newest are compared a second time with memory that was used
right before the clock started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median
from typing import TypedDict

from held_memory import MEASURE, PeakMemory
from preprocessing_sides import classic, make_corpus, newest, ours, stages
from rich.console import Console
from rich.table import Table

# Line of the table of costs -> what it adds to the plain build, as settings of a recipe.
COSTS: dict[str, dict[str, object]] = {
    "normalize": {"normalize": {}},
    "gopher_quality": {"gopher_quality": {}},
    "gopher_repetition": {"gopher_repetition": {}},
    "c4_quality": {"c4_quality": {}},
    "code_quality": {"code_quality": {}},
    "language": {"language": {"keep": ["en"]}},
    "redact": {"redact": {}},
    "exact_duplicates": {"exact_duplicates": True},
    "near_duplicates": {"near_duplicates": {}},
}


class SideOptions(TypedDict, total=False):
    """Options of one side's process: see :mod:`preprocessing_sides`."""

    workers: int
    cleaning: dict[str, object]
    engine: str | None
    touched: bool


class Sides(TypedDict):
    """Paired rounds of the three sides, by side."""

    corpus_megabytes: float
    tokens: float
    tokens_of_newest: float
    megabytes_per_second: dict[str, float]
    megabytes_per_processor_second: dict[str, float]
    all_rounds: dict[str, list[float]]
    peak_megabytes: dict[str, float]
    ours_over_newest: float
    ours_over_classic: float


class TouchedSides(TypedDict):
    """Paired rounds of ours and newest in memory that was used right before."""

    megabytes_per_second: dict[str, float]
    all_rounds: dict[str, list[float]]
    ours_over_newest: float


class Report(TypedDict):
    """The JSON result; ``stages`` and ``costs`` are in seconds."""

    date: str
    machine: str
    memory: str
    sides: Sides
    touched: TouchedSides
    stages: dict[str, float]
    costs: dict[str, float]


# --- rounds ---------------------------------------------------------------------------------------


def measure(folder: Path, side: str, options: SideOptions | None = None) -> dict[str, float]:
    """The result of one side in a separate process, with its ``peak_bytes`` of held memory."""
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--side",
        side,
        "--options",
        json.dumps(options or {}),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    # The peak covers the side's worker processes too.
    with PeakMemory(process.pid) as memory:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the side {side} failed")
    return json.loads(output.splitlines()[-1]) | {"peak_bytes": memory.peak}


def run_side(folder: Path, side: str, options: SideOptions) -> dict[str, float]:
    """Run one side in this process."""
    match side:
        case "ours":
            return ours(
                folder,
                options.get("workers", 2),
                options.get("cleaning", {}),
                options.get("engine"),
                options.get("touched", False),
            )
        case "newest":
            return newest(folder, options.get("touched", False))
        case "classic":
            return classic(folder)
        case _:
            return stages(folder)


def clear(folder: Path) -> None:
    """Delete the output of all sides."""
    for pattern in ("ours*", "newest*", "classic*"):
        for path in folder.glob(pattern):
            path.unlink()


def rounds(folder: Path, count: int) -> Sides:
    """Paired rounds of the three sides: medians, and the medians of each round's ratios."""
    whole = (folder / "corpus.jsonl").stat().st_size / 1e6
    part = (folder / "part.jsonl").stat().st_size / 1e6
    rates: dict[str, list[float]] = {"ours": [], "newest": [], "classic": []}
    peaks: dict[str, list[int]] = {"ours": [], "newest": [], "classic": []}
    processor: dict[str, list[float]] = {"ours": [], "newest": [], "classic": []}
    tokens: dict[str, float] = {}
    for _ in range(count):
        for side, megabytes in (("ours", whole), ("newest", whole), ("classic", part)):
            # Every side starts without output of an earlier round.
            clear(folder)
            result = measure(folder, side)
            rates[side].append(megabytes / result["seconds"])
            processor[side].append(megabytes / result["cpu_seconds"])
            peaks[side].append(int(result["peak_bytes"]))
            tokens[side] = result["tokens"]
    return {
        "corpus_megabytes": whole,
        # Ours equal those of the tokenizers library; gigatoken has another version of Unicode.
        "tokens": tokens["ours"],
        "tokens_of_newest": tokens["newest"],
        "megabytes_per_second": {side: median(values) for side, values in rates.items()},
        "megabytes_per_processor_second": {
            side: median(values) for side, values in processor.items()
        },
        "all_rounds": rates,
        "peak_megabytes": {side: max(values) / 1e6 for side, values in peaks.items()},
        "ours_over_newest": median(
            a / b for a, b in zip(rates["ours"], rates["newest"], strict=True)
        ),
        "ours_over_classic": median(
            a / b for a, b in zip(rates["ours"], rates["classic"], strict=True)
        ),
    }


def touched_rounds(folder: Path, count: int) -> TouchedSides:
    """Paired rounds of ours and newest in memory that was used right before."""
    megabytes = (folder / "corpus.jsonl").stat().st_size / 1e6
    rates: dict[str, list[float]] = {"ours": [], "newest": []}
    for _ in range(count):
        for side, values in rates.items():
            clear(folder)
            values.append(megabytes / measure(folder, side, {"touched": True})["seconds"])
    return {
        "megabytes_per_second": {side: median(values) for side, values in rates.items()},
        "all_rounds": rates,
        "ours_over_newest": median(
            a / b for a, b in zip(rates["ours"], rates["newest"], strict=True)
        ),
    }


def costs(folder: Path) -> dict[str, float]:
    """Seconds that each cleaning stage adds to the plain build."""
    clear(folder)
    plain = measure(folder, "ours")["seconds"]
    result = {"plain build": plain}
    for name, cleaning in COSTS.items():
        clear(folder)
        result[name] = measure(folder, "ours", {"cleaning": cleaning})["seconds"] - plain
    return result


def print_report(report: Report) -> None:
    """Print the sides, their ratios, and the tables of stages and of cleaning."""
    console = Console()
    sides = report["sides"]
    table = Table(
        "side",
        "MB/s",
        "MB a processor second",
        "peak memory MB",
        title=f"{sides['corpus_megabytes']:.0f} MB of JSON lines, BPE 32K, {os.cpu_count()} cores",
    )
    for side, rate in sides["megabytes_per_second"].items():
        processor = sides["megabytes_per_processor_second"][side]
        table.add_row(
            side, f"{rate:.1f}", f"{processor:.1f}", f"{sides['peak_megabytes'][side]:.0f}"
        )
    console.print(table)
    console.print(
        f"ours / newest {sides['ours_over_newest']:.2f}, ours / classic"
        f" {sides['ours_over_classic']:.0f} (medians of the rounds' ratios)"
    )
    touched = report["touched"]
    console.print(
        f"in memory that was used right before: ours {touched['megabytes_per_second']['ours']:.1f}"
        f" MB/s, newest {touched['megabytes_per_second']['newest']:.1f} MB/s, ours / newest"
        f" {touched['ours_over_newest']:.2f}"
    )
    console.print(f"tokens: ours {sides['tokens']:,}, newest {sides['tokens_of_newest']:,}")
    for title, timed in (
        ("one process, one thread", report["stages"]),
        ("cleaning, two workers", report["costs"]),
    ):
        table = Table("stage", "seconds", "MB/s", title=title)
        for name, seconds in timed.items():
            table.add_row(
                name, f"{seconds:.2f}", f"{sides['corpus_megabytes'] / max(seconds, 1e-3):.0f}"
            )
        console.print(table)


def main() -> None:
    """Build the corpus, measure all sides, print the report and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("data/benchmark"),
        help="for the corpus and all output (default: data/benchmark)",
    )
    parser.add_argument("--megabytes", type=int, default=200, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/preprocessing.json"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.folder, options.side, json.loads(options.options))))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "tokenizer.json").exists():
        make_corpus(options.folder, options.megabytes * 1_000_000)
    report: Report = {
        "date": date.today().isoformat(),
        "machine": (
            f"{os.cpu_count()} x {platform.processor() or platform.machine()}, Python"
            f" {platform.python_version()}"
        ),
        "memory": MEASURE,
        "sides": rounds(options.folder, options.rounds),
        "touched": touched_rounds(options.folder, options.rounds),
        "stages": measure(options.folder, "stages"),
        "costs": costs(options.folder),
    }
    # Of no interest for stages of one process.
    report["stages"].pop("peak_bytes")
    print_report(report)
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    clear(options.folder)


if __name__ == "__main__":
    main()
