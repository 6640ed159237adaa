#!/usr/bin/env python
"""From shards to batches: this loader against Megatron-Core's GPTDataset, and at a trillion tokens.

The shards hold random tokens in documents of log-normal length. Both sides return sequences with
document boundaries: ours document ids, Megatron's reset position ids and loss masks. Each
measurement is a separate process; its memory is what it holds (benchmarks/held_memory.py) beyond
the imports. The corpus of a trillion tokens is 500 shards with sparse token files: they have their
full size, but use no disk space.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TypedDict

import numpy as np
from held_memory import MEASURE, held_bytes
from rich.console import Console
from rich.table import Table

from data_pipeline.shards.index_header import HEADER, MAGIC, VERSION
from data_pipeline.shards.indexed import IndexedWriter, bin_path, idx_path
from data_pipeline.shards.manifest import (
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)

SEQUENCE_LENGTH = 2048
MICRO_BATCH = 8
VOCAB_SIZE = 32_000
TRILLION_SHARDS = 500
SHARD_TOKENS = 2_000_000_000
SHARD_DOCUMENTS = 2_000_000


class Report(TypedDict):
    """The JSON result; measurements by name."""

    date: str
    machine: str
    memory: str
    tokens: int
    sides: dict[str, dict[str, float]]
    trillion: dict[str, float]
    stalls: dict[str, float]


# --- shards ---------------------------------------------------------------------------------------


def write_manifest(folder: Path, shards: list[ShardEntry]) -> None:
    """A manifest over ``shards``, without checksums: nothing verifies them here."""
    (folder / "tokenizer.json").write_text("{}")
    documents = sum(shard.documents for shard in shards)
    tokens = sum(shard.tokens for shard in shards)
    nothing = "0" * 64
    manifest = Manifest(
        created_by="benchmark",
        request_sha256=nothing,
        inputs_sha256=nothing,
        dtype="uint16",
        tokenizer=TokenizerEntry(
            file="tokenizer.json", sha256=nothing, vocab_size=VOCAB_SIZE, eod_id=0
        ),
        sources={
            "all": SourceEntry(
                kind="jsonl",
                sha256=nothing,
                records=documents,
                documents=documents,
                tokens=tokens,
                utf8_bytes=4 * tokens,
                share=1.0,
            )
        },
        splits={
            "train": SplitEntry(
                documents=documents, tokens=tokens, utf8_bytes=4 * tokens, shards=shards
            )
        },
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def make_small(folder: Path, tokens: int) -> None:
    """Two real shards of random tokens."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    shards = []
    for number in range(2):
        with IndexedWriter(folder / f"train_{number:05}", np.dtype("<u2")) as writer:
            while writer.tokens < tokens // 2:
                lengths = np.maximum(random.lognormal(6.0, 1.2, 1000).astype(np.int64), 2)
                ids = random.integers(1, VOCAB_SIZE, int(lengths.sum()))
                # Every document ends with the end-of-document token.
                ids[np.cumsum(lengths) - 1] = 0
                writer.add(ids, lengths)
            written = writer.finish()
        shards.append(ShardEntry.of(written, f"train_{number:05}", "all"))
    write_manifest(folder, shards)


def make_trillion(folder: Path) -> None:
    """500 shards of two billion tokens.

    They share one index file by hard links, and their token files are sparse.
    """
    folder.mkdir(parents=True)
    length = SHARD_TOKENS // SHARD_DOCUMENTS
    first = idx_path(folder / "train_00000")
    with first.open("wb") as stream:
        # The index format of Megatron-LM: header, lengths, byte offsets, document starts.
        stream.write(HEADER.pack(MAGIC, VERSION, 8, SHARD_DOCUMENTS, SHARD_DOCUMENTS + 1))
        stream.write(np.full(SHARD_DOCUMENTS, length, "<i4").tobytes())
        stream.write((np.arange(SHARD_DOCUMENTS, dtype="<i8") * length * 2).tobytes())
        stream.write(np.arange(SHARD_DOCUMENTS + 1, dtype="<i8").tobytes())
    shards = []
    nothing = "0" * 64
    for number in range(TRILLION_SHARDS):
        prefix = folder / f"train_{number:05}"
        if number:
            os.link(first, idx_path(prefix))
        # A file of this length that is all hole; reading it returns zeros.
        with bin_path(prefix).open("wb") as stream:
            stream.truncate(SHARD_TOKENS * 2)
        sizes = {"bin_bytes": SHARD_TOKENS * 2, "idx_bytes": first.stat().st_size}
        counts = {"documents": SHARD_DOCUMENTS, "tokens": SHARD_TOKENS}
        shards.append(
            ShardEntry(
                prefix=prefix.name,
                source="all",
                bin_sha256=nothing,
                idx_sha256=nothing,
                **sizes,
                **counts,
            )
        )
    write_manifest(folder, shards)


# --- the sides ------------------------------------------------------------------------------------


def timed_steps(step: Callable[[int], object], steps: int) -> dict[str, float]:
    """Milliseconds of a step (median, 99th percentile, maximum), and tokens per second overall."""
    seconds = np.empty(steps)
    for number in range(steps):
        started = time.perf_counter()
        step(number)
        seconds[number] = time.perf_counter() - started
    middle, late, most = (float(np.quantile(seconds, share)) * 1000 for share in (0.5, 0.99, 1.0))
    rate = steps * MICRO_BATCH * SEQUENCE_LENGTH / float(seconds.sum())
    return {"tokens_per_second": rate, "p50_ms": middle, "p99_ms": late, "max_ms": most}


def ours(folder: Path, steps: int, packing: str) -> dict[str, float]:
    """This project's loader, with document ids."""
    from data_pipeline.config import DataConfig, Proportional
    from data_pipeline.loading.packing import prepare_packing, training_samples
    from data_pipeline.loading.plan import LoaderPhase
    from data_pipeline.loading.shard_loader import ShardLoader, TrainingSource
    from data_pipeline.shards.datasets import load_datasets

    config = DataConfig.model_validate({"packing": {"kind": packing}, "document_mask": True})
    result: dict[str, float] = {}
    if packing == "best_fit":
        started = time.perf_counter()
        packed = prepare_packing(load_datasets({"": str(folder)}), config, SEQUENCE_LENGTH)
        assert packed is not None
        result = {
            "packing_seconds": time.perf_counter() - started,
            "padding_share": packed.padding_share,
            "truncated_share": packed.truncated_share,
        }
    # Imports are done by now and do not count as memory.
    before = held_bytes()
    started = time.perf_counter()
    parts = load_datasets({"": str(folder)}).training_shards()
    sources = {
        name: TrainingSource(
            training_samples(found, config, SEQUENCE_LENGTH, 0), found[0].fingerprint
        )
        for name, found in parts.items()
    }
    loader = ShardLoader(sources, [LoaderPhase(Proportional(), MICRO_BATCH, MICRO_BATCH)], 0, 0, 1)
    loader.step_batches(0)
    result |= {
        "first_batch_seconds": time.perf_counter() - started,
        "first_batch_bytes": held_bytes() - before,
    }
    if steps:
        result |= timed_steps(lambda number: loader.step_batches(number + 1), steps) | {
            "bytes": held_bytes() - before
        }
    return result


def megatron(folder: Path, steps: int) -> dict[str, float]:
    """Megatron-Core's GPTDataset, with its index built anew, in batches of the same size."""
    # It warns about every optional CUDA package that is missing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.megatron_tokenizer import MegatronLegacyTokenizer

    class Tokenizer(MegatronLegacyTokenizer):
        vocab: dict[str, int] = {}
        inv_vocab: dict[int, str] = {}
        vocab_size = VOCAB_SIZE
        eod = 0
        pad = 0

        def tokenize(self, text: str) -> np.ndarray:
            raise NotImplementedError("the shards hold tokens")

    # GPTDataset asks for a rank even in a single process.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    before = held_bytes()
    started = time.perf_counter()
    prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("train_*.bin"))
    cache = folder / "megatron-cache"
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQUENCE_LENGTH,
        blend=(prefixes, None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer("none"),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    dataset = BlendedMegatronDatasetBuilder(
        GPTDataset, [max(steps, 1) * MICRO_BATCH + MICRO_BATCH, 0, 0], lambda: True, config
    ).build()[0]

    def step(number: int) -> object:
        samples = [dataset[number * MICRO_BATCH + row] for row in range(MICRO_BATCH)]
        return {
            name: torch.stack([sample[name] for sample in samples])
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }

    # The first batch includes building the index.
    step(0)
    result: dict[str, float] = {
        "first_batch_seconds": time.perf_counter() - started,
        "first_batch_bytes": held_bytes() - before,
    }
    result |= timed_steps(lambda number: step(number + 1), steps) | {"bytes": held_bytes() - before}
    shutil.rmtree(cache)
    return result


def trained_steps(folder: Path, steps: int) -> dict[str, float]:
    """How long training steps of 10 milliseconds wait for their batches."""
    from data_pipeline.config import DataConfig, Proportional
    from data_pipeline.loading.packing import training_samples
    from data_pipeline.loading.plan import LoaderPhase
    from data_pipeline.loading.shard_loader import ShardLoader, TrainingSource
    from data_pipeline.shards.datasets import load_datasets

    config = DataConfig.model_validate({"packing": {"kind": "best_fit"}, "document_mask": True})
    parts = load_datasets({"": str(folder)}).training_shards()
    sources = {
        name: TrainingSource(
            training_samples(found, config, SEQUENCE_LENGTH, 0), found[0].fingerprint
        )
        for name, found in parts.items()
    }
    loader = ShardLoader(sources, [LoaderPhase(Proportional(), MICRO_BATCH, MICRO_BATCH)], 0, 0, 1)
    loader.step_batches(0)
    loader.prefetch_wait.seconds = 0.0
    started = time.perf_counter()
    for number in range(1, steps + 1):
        loader.step_batches(number)
        # The step itself: the loader prefetches meanwhile.
        time.sleep(0.010)
    return {
        "steps": steps,
        "stall_seconds": loader.prefetch_wait.seconds,
        "stall_share": loader.prefetch_wait.seconds / (time.perf_counter() - started),
    }


def measure(folder: Path, side: str, steps: int) -> dict[str, float]:
    """Run one side in a separate process and return its result."""
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--side",
        side,
        "--steps",
        str(steps),
    ]
    # The last line is the result: libraries print before it.
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def run_side(folder: Path, side: str, steps: int) -> dict[str, float]:
    """Run one side in this process."""
    match side:
        case "concatenate" | "best_fit":
            return ours(folder, steps, side)
        case "megatron":
            return megatron(folder, steps)
        case _:
            return trained_steps(folder, steps)


def print_report(report: Report) -> None:
    """Print the report as a table and three sentences."""
    console = Console()
    table = Table(
        "side",
        "first batch s",
        "held memory MB",
        "tokens/s",
        "p50 ms",
        "p99 ms",
        "max ms",
        title=f"{report['tokens'] / 1e6:.0f} M tokens",
    )
    for side, measured in report["sides"].items():
        cells = [
            f"{measured['first_batch_seconds']:.2f}",
            f"{measured['bytes'] / 1e6:.0f}",
            f"{measured['tokens_per_second'] / 1e6:.1f} M",
        ]
        table.add_row(
            side, *cells, *(f"{measured[name]:.2f}" for name in ("p50_ms", "p99_ms", "max_ms"))
        )
    console.print(table)
    packed = report["sides"]["best_fit"]
    trillion = report["trillion"]
    stalls = report["stalls"]
    console.print(
        f"best fit: {packed['padding_share']:.4%} padding, {packed['truncated_share']:.1%} of the"
        " documents cut"
    )
    first = (
        f"first batch after {trillion['first_batch_seconds']:.2f} s and"
        f" {trillion['first_batch_bytes'] / 1e6:.0f} MB"
    )
    console.print(
        f"a trillion tokens in {TRILLION_SHARDS} shards: {first}; {trillion['bytes'] / 1e6:.0f} MB"
        " after 300 steps"
    )
    console.print(
        f"{stalls['steps']:,} steps of 10 ms with best-fit packing and document ids:"
        f" {stalls['stall_share']:.3%} of the time waiting"
    )


def main() -> None:
    """Measure all sides, print the report and write it; or run one side for ``measure``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark-loading"))
    parser.add_argument("--megatokens", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loading.json"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # A child process of measure().
    if options.side:
        print(json.dumps(run_side(options.folder, options.side, options.steps)))
        return
    small, large = options.folder / "small", options.folder / "trillion"
    if not (small / "manifest.json").exists():
        make_small(small, options.megatokens * 1_000_000)
    if not (large / "manifest.json").exists():
        make_trillion(large)
    report: Report = {
        "date": date.today().isoformat(),
        "machine": (
            f"{os.cpu_count()} x {platform.processor() or platform.machine()}, Python"
            f" {platform.python_version()}"
        ),
        "memory": MEASURE,
        "tokens": sum(
            shard["tokens"]
            for shard in json.loads((small / "manifest.json").read_text())["splits"]["train"][
                "shards"
            ]
        ),
        "sides": {
            side: measure(small, side, options.steps)
            for side in ("concatenate", "best_fit", "megatron")
        },
        "trillion": measure(large, "concatenate", 300),
        "stalls": measure(small, "stalls", options.steps),
    }
    print_report(report)
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
