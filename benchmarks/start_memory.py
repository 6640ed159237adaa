#!/usr/bin/env python
"""Memory of each rank while an engine is built: its peak, and what it holds afterwards.

A rank imports everything and connects first, and what it holds then is taken off. The engine is
built and takes no step, so the optimizer has no state yet. `--before` repeats it with the code of
another checkout, such as one of an older commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# About a billion parameters, of which the experts are four fifths.
MODEL = (
    "model.vocab_size=32768",
    "model.hidden_size=1024",
    "model.num_hidden_layers=16",
    "model.attention={kind: gqa, num_attention_heads: 16, num_key_value_heads: 16, head_dim: 64}",
    "model.moe={kind: dropless, num_experts: 32, top_k: 4, moe_intermediate_size: 512}",
    "model.layer_pattern={kind: all_moe}",
    "train.precision=bf16",
)
SAMPLED_SECONDS = 0.005


def status(field: str) -> int:
    """Bytes of a field of this process' status in Linux, such as VmHWM or RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Sampler(threading.Thread):
    """The peak of this process' anonymous pages; one between two samples may be missed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            self.peak = max(self.peak, status("RssAnon"))
            self.ended.wait(SAMPLED_SECONDS)


def worker(settings: list[str], zero: int) -> None:
    """Build the engine on this rank, and print what it took as a line of JSON."""
    import torch

    from pretrain.config.load import load_recipe
    from pretrain.config.rules.sections import check_topology
    from pretrain.engine import engine as engine_module
    from pretrain.engine.ds_config import resolve_ds_config
    from pretrain.engine.topology import connect, disconnect

    torch.set_num_threads(1)
    world_size = int(os.environ["WORLD_SIZE"])
    recipe = load_recipe(
        "debug", [*settings, "train.micro_batch_size=1", f"train.global_batch_size={world_size}"]
    )
    topology = connect(recipe.parallel.ep_size)
    accumulation = check_topology(recipe, world_size, zero)
    precision = recipe.train.precision
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": zero}},
        "the benchmark",
        recipe,
        precision,
        accumulation,
        world_size,
    )
    topology.barrier()
    anonymous, resident = status("RssAnon"), status("VmRSS")
    # 5 sets the peak of the resident set to what it is now.
    Path("/proc/self/clear_refs").write_text("5")
    sampler = Sampler()
    sampler.start()
    built_bytes = 0
    build_model = engine_module.build_model

    def build(*arguments: Any) -> Any:
        nonlocal built_bytes
        model = build_model(*arguments)
        built_bytes = status("VmHWM") - resident
        return model

    engine_module.build_model = build  # type: ignore[assignment]
    start = time.perf_counter()
    engine = engine_module.Engine(recipe, ds_config, precision, topology)
    seconds = time.perf_counter() - start
    sampler.ended.set()
    sampler.join()
    parameters = [
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.model.parameters()
    ]
    row = {
        "rank": topology.rank,
        "parameters": sum(parameters),
        "largest_parameter": max(parameters),
        "built_peak_resident_bytes": built_bytes,
        "peak_resident_bytes": status("VmHWM") - resident,
        "peak_anonymous_bytes": sampler.peak - anonymous,
        "held_anonymous_bytes": status("RssAnon") - anonymous,
        "seconds": round(seconds, 1),
    }
    print("row " + json.dumps(row), flush=True)
    topology.barrier()
    disconnect()


def measure(code: Path, ranks: int, zero: int, settings: list[str]) -> list[dict[str, int]]:
    """Rows of all ranks, in their order.

    Raises:
        RuntimeError: with the end of a rank's output, if it fails.
    """
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--rank", "--zero", str(zero)]
    command += [argument for setting in settings for argument in ("--set", setting)]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "PYTHONPATH": str(code),
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    rows = []
    for process in processes:
        output, _ = process.communicate()
        found = [line for line in output.splitlines() if line.startswith("row ")]
        if process.returncode or not found:
            raise RuntimeError(f"a rank has ended with {process.returncode}: {output[-3000:]}")
        rows.append(json.loads(found[0].removeprefix("row ")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/start_memory.py --ranks 2 4 --before ../older_checkout",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks")
    parser.add_argument("--zero", type=int, default=3, help="the ZeRO stage (default: 3)")
    parser.add_argument("--before", type=Path, help="another checkout, measured first")
    parser.add_argument("--set", action="append", default=[], help="change the model (section.x=y)")
    parser.add_argument("--output", type=Path, help="add the result to this JSON file")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = [*MODEL, *options.set]
    if options.rank:
        worker(options.set, options.zero)
        return
    sides = {} if options.before is None else {"before": options.before.resolve()}
    sides["now"] = ROOT
    results = []
    for ranks in options.ranks:
        for side, code in sides.items():
            rows = measure(code, ranks, options.zero, settings)
            run = {"side": side, "ranks": ranks, "zero": options.zero, "changed": options.set}
            results.append(run | {"rows": rows})
            built, peak, held = (
                max(row[field] for row in rows) / 1e9
                for field in (
                    "built_peak_resident_bytes",
                    "peak_resident_bytes",
                    "held_anonymous_bytes",
                )
            )
            print(
                f"{side}, {ranks} ranks: up to {built:.2f} GB a rank until the model is built, up "
                f"to {peak:.2f} GB until the engine is, {held:.2f} GB held then",
                flush=True,
            )
    if options.output is not None:
        known = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
        report = {
            "date": date.today().isoformat(),
            "model": list(MODEL),
            "memory": "bytes of this process above what it held before the engine was built: "
            "resident by VmHWM, anonymous by samples of RssAnon",
            "runs": known + results,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
