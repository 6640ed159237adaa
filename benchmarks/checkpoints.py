"""What a checkpoint costs: seconds that training waits, and bytes a second beside other writers.

Every round saves the same engine's state (fp32 weights and AdamW's moments) in each way, in changing
order, to the same disk with ``fsync``; medians and the range over the rounds are printed and written
as JSON:

    python benchmarks/checkpoints.py --rounds 5 --hidden-size 512
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import checkpoint as distributed_checkpoint

from data_pipeline.loading.batch import Batch
from pretrain.checkpoint.engine_state import weight_tensors
from pretrain.checkpoint.optimizer_state import optimizer_tensors
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.load import load_recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.files import fsync_path
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import connect, disconnect

TENSORS = dict[str, torch.Tensor]


def synced(folder: Path) -> None:
    """Flush all files below a folder, as our own save does."""
    for path in sorted(folder.rglob("*"), reverse=True):
        fsync_path(path)


def torch_save(tensors: TENSORS, folder: Path) -> None:
    """``torch.save`` of everything in one file."""
    folder.mkdir()
    torch.save(tensors, folder / "state.pt")
    synced(folder)


def torch_distributed(tensors: TENSORS, folder: Path) -> None:
    """torch's distributed checkpoint."""
    distributed_checkpoint.save(tensors, checkpoint_id=str(folder))
    synced(folder)


def main() -> None:
    """Run the rounds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_checkpoints"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    width = arguments.hidden_size
    recipe = load_recipe(
        "debug",
        [
            "model.vocab_size=8192",
            f"model.hidden_size={width}",
            f"model.moe.moe_intermediate_size={width}",
            "model.moe.num_experts=16",
            "train.micro_batch_size=1",
            "train.global_batch_size=1",
        ],
    )
    topology = connect(1)
    check_topology(recipe, 1, 1)
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 1}}, "-", recipe, "fp32", 1, 1)
    engine = Engine(recipe, ds_config, "fp32", topology)
    tokens = torch.randint(0, 8192, (1, recipe.train.sequence_length + 1))
    engine.train_step([Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())], 1.0)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    tokenizer = arguments.folder / "tokenizer.json"
    tokenizer.write_text("{}")
    store = CheckpointStore(arguments.folder / "ours", engine, ds_config, tokenizer)
    tensors: TENSORS = {
        f"{kind}{stored.name}": stored.values
        for kind, stream in (("w/", weight_tensors(engine)), ("o/", optimizer_tensors(engine)))
        for stored in stream
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    step = 1

    def ours() -> None:
        nonlocal step
        step += 1
        store.save(step, {"step": step})

    def in_background() -> None:
        nonlocal step
        step += 1
        store.save(step, {"step": step}, background=True)

    ways: dict[str, Callable[[], None]] = {
        "ours, with SHA-256 and read back": ours,
        "ours in the background: training waits": in_background,
        "torch.save": lambda: torch_save(tensors, arguments.folder / "torch"),
        "torch.distributed.checkpoint": lambda: torch_distributed(
            tensors, arguments.folder / "dcp"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            for other in ("torch", "dcp"):
                shutil.rmtree(arguments.folder / other, ignore_errors=True)
            os.sync()
            began, used = time.perf_counter(), time.process_time()
            ways[name]()
            taken = time.perf_counter() - began
            store.finish()
            # The first round allocates the snapshot's memory.
            if number:
                seconds[name].append(taken)
                cpu[name].append(time.process_time() - used)
    rows = {
        name: {
            "seconds": statistics.median(taken),
            "range": [min(taken), max(taken)],
            "cpu_seconds": statistics.median(cpu[name]),
            "gigabytes_a_second": size / 1e9 / statistics.median(taken),
        }
        for name, taken in seconds.items()
    }
    print(f"{size / 1e6:.0f} MB, {arguments.rounds} rounds, {os.cpu_count()} cores")
    for name, row in rows.items():
        low, high = row["range"]
        print(
            f"{name:40} {row['seconds']:7.3f} s ({low:.3f} to {high:.3f}), "
            f"CPU {row['cpu_seconds']:.3f} s, {row['gigabytes_a_second']:.2f} GB/s"
        )
    if arguments.json:
        content = {"machine": platform.processor(), "bytes": size, "ways": rows}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    shutil.rmtree(arguments.folder)
    disconnect()


if __name__ == "__main__":
    main()
