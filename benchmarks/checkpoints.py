"""What a checkpoint costs: seconds that training waits, and bytes a second beside other writers.

Every round saves the same engine's state (fp32 weights and AdamW's moments) in each way, in
changing order, to the same disk with ``fsync``; medians and the range over the rounds are printed
and written as JSON:

    python benchmarks/checkpoints.py --rounds 5 --hidden-size 512
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import torch
from torch.distributed import checkpoint as distributed_checkpoint

from data_pipeline.loading.batch import Batch
from pretrain.callbacks.environment import hardware
from pretrain.checkpoint.engine_state import weight_tensors
from pretrain.checkpoint.optimizer_state import optimizer_tensors
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.load import load_recipe
from pretrain.core.files import JsonObject, fsync_path
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import connect, disconnect

TENSORS = dict[str, torch.Tensor]
# Seconds of a save: their median, least and most, of the processor; and its speed.
Row = dict[str, float]


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


def trained_engine(overrides: list[str], precision: str = "fp32") -> tuple[Engine, JsonObject]:
    """An engine of the debug recipe whose optimizer has state, and its ds_config."""
    recipe = load_recipe("debug", ["model.vocab_size=8192", *overrides])
    topology = connect(1)
    zero = {"zero_optimization": {"stage": 1}}
    ds_config = resolve_ds_config(zero, "-", recipe, precision, 1, 1)
    engine = Engine(recipe, ds_config, precision, topology)
    tokens = torch.randint(0, 8192, (1, recipe.train.sequence_length + 1))
    engine.train_step([Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())], 1.0)
    return engine, ds_config


def ways_of(store: CheckpointStore, folder: Path) -> tuple[dict[str, Callable[[], None]], int]:
    """The ways to save, by name, and the bytes that each of them writes."""
    engine = store.engine
    tensors: TENSORS = {
        f"{kind}/{stored.name}": stored.values
        for kind, stream in (("w", weight_tensors(engine)), ("o", optimizer_tensors(engine)))
        for stored in stream
    }
    steps = count(1)

    def save(background: bool) -> None:
        step = next(steps)
        store.save(step, {"step": step}, background=background)

    ways: dict[str, Callable[[], None]] = {
        "ours, with SHA-256 and checks": lambda: save(background=False),
        "ours in the background: training waits": lambda: save(background=True),
        "torch.save": lambda: torch_save(tensors, folder / "torch"),
        "torch.distributed.checkpoint": lambda: torch_distributed(tensors, folder / "dcp"),
    }
    return ways, sum(tensor.nbytes for tensor in tensors.values())


def measure(store: CheckpointStore, folder: Path, rounds: int) -> tuple[dict[str, Row], int]:
    """Seconds of each way over the rounds, and the bytes of a save."""
    ways, size = ways_of(store, folder)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            for other in ("torch", "dcp"):
                shutil.rmtree(folder / other, ignore_errors=True)
            os.sync()
            began, used = time.perf_counter(), time.process_time()
            ways[name]()
            taken = time.perf_counter() - began
            store.finish()
            # The first round allocates the memory of the copy.
            if number:
                seconds[name].append(taken)
                cpu[name].append(time.process_time() - used)
    rows: dict[str, Row] = {
        name: {
            "seconds": statistics.median(taken),
            "least": min(taken),
            "most": max(taken),
            "cpu_seconds": statistics.median(cpu[name]),
            "gigabytes_a_second": size / 1e9 / statistics.median(taken),
        }
        for name, taken in seconds.items()
    }
    return rows, size


def main() -> None:
    """Run the rounds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_checkpoints"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    overrides = [
        f"model.hidden_size={arguments.hidden_size}",
        f"model.moe.moe_intermediate_size={arguments.hidden_size}",
        "model.moe.num_experts=16",
        "train.micro_batch_size=1",
        "train.global_batch_size=1",
    ]
    engine, ds_config = trained_engine(overrides)
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    store = CheckpointStore(folder / "ours", engine, ds_config, folder / "tokenizer.json")
    rows, size = measure(store, folder, arguments.rounds)
    print(f"{size / 1e6:.0f} MB, {arguments.rounds} rounds, {os.cpu_count()} cores")
    for name, row in rows.items():
        print(
            f"{name:40} {row['seconds']:7.3f} s ({row['least']:.3f} to {row['most']:.3f}), "
            f"CPU {row['cpu_seconds']:.3f} s, {row['gigabytes_a_second']:.2f} GB/s"
        )
    if arguments.json:
        content = {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": hardware(),
            "torch": torch.__version__,
            "bytes": size,
            "rounds": arguments.rounds,
            "ways": rows,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    shutil.rmtree(folder)
    disconnect()


if __name__ == "__main__":
    main()
