#!/usr/bin/env python
"""The products of PEER's tokens with their rows, by every kernel and at two table sizes.

Kernels are the plain definition, torch's bags, and on CUDA Triton's. Every token chose 128 of the
rows at random. Each round times all kernels, one after the other, so that a change of the machine's
speed affects them all; the results are the medians of their seconds, of the rows' bytes per second
(each row read once), and of the rounds' ratios to plain.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import psutil
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pretrain.model.moe.tables.interface import Bags, TableKernel
from pretrain.model.moe.tables.products import Factors, SortedFactors, kernel_named

CHOSEN = 128
HIDDEN_SIZE = 768
TABLES = (65_536, 1_048_576)
# The number of rows whose gradients an optimizer holds at once.
GRADIENT_ROWS = 16_384

Work = Callable[[TableKernel], torch.Tensor]


class Report(TypedDict):
    """The JSON result; ``tables`` is by rows of the table, product, kernel and measure."""

    date: str
    device: str
    cores: int | None
    threads: int
    torch: str
    sizes: dict[str, int]
    rounds: int
    tables: dict[str, dict[str, dict[str, dict[str, float]]]]


def works(num_rows: int, tokens: int, device: torch.device) -> dict[str, tuple[Work, int]]:
    """What is timed by name, and the bytes of the rows that it reads."""
    generator = torch.Generator(device).manual_seed(0)
    # 1,048,576 rows of 768 are 3.2 GB: one table exists at a time.
    table_ND = torch.rand(num_rows, HIDDEN_SIZE, generator=generator, device=device)
    x_TD = torch.randn(tokens, HIDDEN_SIZE, generator=generator, device=device)
    c_P = torch.randn(tokens * CHOSEN, generator=generator, device=device)
    row_P = torch.randint(0, num_rows, (tokens * CHOSEN,), generator=generator, device=device)
    bags = Bags(row_P, torch.arange(0, tokens * CHOSEN + 1, CHOSEN, device=device))
    factors = Factors(row_P, bags.owners(), c_P, x_TD)
    row_bytes = HIDDEN_SIZE * table_ND.element_size()
    row_U, pairs_U = row_P.unique(return_counts=True)
    rows = slice(0, min(GRADIENT_ROWS, row_U.numel()))
    # The gradient includes the sort, as in a step; the kernels differ in the rest.
    return {
        "row_dots": (lambda kernel: kernel.row_dots(x_TD, table_ND, bags), c_P.numel() * row_bytes),
        "weighted_rows": (
            lambda kernel: kernel.weighted_rows(c_P, table_ND, bags),
            c_P.numel() * row_bytes,
        ),
        "row_gradients": (
            lambda kernel: SortedFactors(factors, kernel).gradient(rows),
            int(pairs_U[rows].sum()) * row_bytes,
        ),
    }


def seconds(work: Work, kernel: TableKernel, device: torch.device) -> float:
    """Wall seconds of one call, the device's work included."""
    started = time.perf_counter()
    work(kernel)
    # Kernels on CUDA run asynchronously.
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compared(
    work: Work, row_bytes: int, names: list[str], rounds: int, device: torch.device, bar: tqdm[Any]
) -> dict[str, dict[str, float]]:
    """Median seconds, bytes per second and speed relative to plain of each kernel."""
    kernels = {name: kernel_named(name, device) for name in names}
    wanted = work(kernels["plain"])
    # Also the first call of each kernel, which compiles.
    for kernel in kernels.values():
        torch.testing.assert_close(work(kernel), wanted, rtol=1e-4, atol=1e-3)
    # Freed, so that it takes no part in the memory traffic of the rounds.
    del wanted
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, kernel in kernels.items():
            found[name].append(seconds(work, kernel, device))
        bar.update()
    return {
        name: {
            "median_seconds": round(median(times), 6),
            "bytes_per_second": round(row_bytes / median(times)),
            "times_as_fast_as_plain": round(
                median(plain / own for plain, own in zip(found["plain"], times, strict=True)), 3
            ),
        }
        for name, times in found.items()
    }


def print_report(report: Report) -> None:
    """Print one line per table size, product and kernel."""
    table = Table(
        "rows",
        "product",
        "kernel",
        "median ms",
        "GB/s",
        "times as fast as plain",
        title=report["device"],
    )
    for num_rows, products in report["tables"].items():
        for product, kernels in products.items():
            for kernel, measured in kernels.items():
                cells = (
                    f"{measured['median_seconds'] * 1000:.2f}",
                    f"{measured['bytes_per_second'] / 1e9:.2f}",
                    f"{measured['times_as_fast_as_plain']:.2f}",
                )
                table.add_row(num_rows, product, kernel, *cells)
    Console().print(table)


def main() -> None:
    """Time all products at both sizes, print the report and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/peer_kernels.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    names = ["plain", "bags", "triton"] if on_cuda else ["plain", "bags"]
    cpu_name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    report: Report = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_cuda else cpu_name,
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sizes": {"tokens": options.tokens, "rows_a_token": CHOSEN, "hidden_size": HIDDEN_SIZE},
        "rounds": options.rounds,
        "tables": {},
    }
    with tqdm(total=len(TABLES) * 3 * options.rounds, desc="rounds", unit="round") as bar:
        for num_rows in TABLES:
            timed = works(num_rows, options.tokens, device)
            report["tables"][str(num_rows)] = {
                name: compared(work, row_bytes, names, options.rounds, device, bar)
                for name, (work, row_bytes) in timed.items()
            }
            del timed
    print_report(report)
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
