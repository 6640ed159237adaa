#!/usr/bin/env python
"""JSON lines to .bin/.idx: this pipeline against Megatron-LM's two ways, side by side on this
machine; and what each stage of ours costs.

The corpus is real code and text: the files of the interpreter's library and of all installed
packages, as JSON lines. The tokenizer is a byte-level BPE of 32,768 entries trained on a tenth of
it. Each measurement is a process of its own that reports its seconds without imports and start-up,
and the most memory that all its processes held (benchmarks/held_memory.py). Rounds alternate, so
that a change of the machine's speed meets all sides.

* newest: what Megatron-LM's preprocess_data_fast.py does: gigatoken's encode_files over the whole
  file, then one call of the builder.
* classic: what its preprocess_data.py does: a pool of 2 processes, one encode of the tokenizers
  library a document (on a part of the file).

A virtual machine may get memory from its host only when it is first used, which took two seconds a
gigabyte on the machine of the results: a price that the newest way pays for every token and that is
not there elsewhere. So ours and newest are compared a second time with memory that was used right
before the clock started.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from held_memory import MEASURE, PeakMemory
from rich.console import Console
from rich.table import Table

CLASSIC_BYTES = 10_000_000
# More than any side needs, files included.
TOUCHED_BYTES = 4_000_000_000
ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cu", ".js", ".json")
# What each line of the table of costs adds to the plain build, as settings of a recipe.
COSTS: dict[str, dict[str, Any]] = {
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


# --- the corpus -----------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """The text files of the interpreter's library and of all installed packages, in a fixed order."""
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - {"__pycache__", "site-packages"})
            for name in sorted(names):
                path = Path(folder, name)
                if name.endswith(ENDINGS) and path.stat().st_size < 2_000_000:
                    try:
                        text = path.read_text(encoding="utf-8")
                    except (UnicodeDecodeError, OSError):
                        continue
                    if text.strip() and "\0" not in text:
                        yield text


def make_corpus(folder: Path, size: int) -> None:
    """corpus.jsonl of ``size`` bytes, part.jsonl of the first of them, tokenizer.json."""
    from data_pipeline.tokenizer.config import TrainBPE
    from data_pipeline.tokenizer.training import train_bpe

    written, sample = 0, []
    with (folder / "corpus.jsonl").open("wb") as stream, (folder / "part.jsonl").open("wb") as part:
        for number, text in enumerate(texts()):
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            stream.write(line)
            if written < CLASSIC_BYTES:
                part.write(line)
            written += len(line)
            if number % 10 == 0:
                sample.append(text)
            if written >= size:
                break
    (folder / "tokenizer.json").write_bytes(train_bpe(sample, TrainBPE(vocab_size=32768)).content)


# --- the sides, each in a process of its own ------------------------------------------------------


def ours(
    folder: Path, workers: int, cleaning: dict[str, Any], engine: str | None, touched: bool
) -> dict[str, float]:
    """This pipeline in Megatron's form: one .bin, no split, an end-of-document token after each
    document.
    """
    from data_pipeline.config import DataConfig
    from data_pipeline.preprocess.coordinator import build
    from data_pipeline.preprocess.pool import local_pool
    from data_pipeline.preprocess.workspace import Output

    config = DataConfig.model_validate(
        {
            "source": {"kind": "jsonl", "input": [str(folder / "corpus.jsonl")]},
            "tokenizer": {"kind": "file", "path": str(folder / "tokenizer.json")},
            "cleaning": cleaning,
            "validation_share": 0.0,
            "max_shard_bytes": None,
        }
    )
    with local_pool(workers) as pool:
        _warm(pool)
        if touched:
            touch_memory()
        started, used = time.perf_counter(), cpu_seconds()
        result = build(config, Output(folder, "ours"), fresh=True, pool=pool, engine=engine)
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": cpu_seconds() - used,
            "tokens": result.manifest.splits["train"].tokens,
        }


def touch_memory() -> None:
    """Writes to memory and gives it back."""
    import numpy as np

    np.ones(min(TOUCHED_BYTES, psutil.virtual_memory().available // 2) // 8)


def cpu_seconds() -> float:
    """Processor time of this process and its children so far."""
    this = psutil.Process()
    return sum(
        times.user + times.system
        for times in (process.cpu_times() for process in (this, *this.children(recursive=True)))
    )


def _warm(pool: Any) -> None:
    """Has every worker import what it needs."""
    if pool.executor is not None:
        list(pool.executor.map(_imports, range(8 * pool.workers)))


def _imports(number: int) -> None:
    import data_pipeline.preprocess.worker  # noqa: F401

    time.sleep(0.02)


def newest(folder: Path, touched: bool) -> dict[str, float]:
    """gigatoken over the whole file, then Megatron-Core's builder."""
    import awkward
    import gigatoken
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if touched:
        touch_memory()
    started, used = time.perf_counter(), cpu_seconds()
    tokenizer = gigatoken.Tokenizer(str(folder / "tokenizer.json"))
    ids = tokenizer.encode_files(gigatoken.JsonlFileSource([str(folder / "corpus.jsonl")]))
    lengths = awkward.to_numpy(awkward.num(ids))
    flat = awkward.to_numpy(awkward.flatten(ids))
    ends = np.cumsum(lengths)
    with_ends = np.insert(flat, ends, 0).astype(np.uint16)
    builder = IndexedDatasetBuilder(str(folder / "newest.bin"), dtype=np.uint16)
    builder.add_document(torch.from_numpy(with_ends), (lengths + 1).tolist())
    builder.finalize(str(folder / "newest.idx"))
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds() - used,
        "tokens": len(with_ends),
    }


_classic_tokenizer: Any = None


def _classic_begin(path: str) -> None:
    import tokenizers

    global _classic_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _classic_tokenizer = tokenizers.Tokenizer.from_file(path)


def _classic_encode(line: str) -> list[int]:
    return [*_classic_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, 0]


def classic(folder: Path) -> dict[str, float]:
    """A pool of two processes, document by document."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "classic.bin"), dtype=np.uint16)
    with multiprocessing.get_context("spawn").Pool(
        2, _classic_begin, (str(folder / "tokenizer.json"),)
    ) as pool:
        pool.map(_classic_encode, ['{"text": "warm"}'] * 4)
        started, used, tokens = time.perf_counter(), cpu_seconds(), 0
        with (folder / "part.jsonl").open(encoding="utf-8") as stream:
            for ids in pool.imap(_classic_encode, stream, 32):
                builder.add_document(torch.IntTensor(ids), [len(ids)])
                tokens += len(ids)
        builder.finalize(str(folder / "classic.idx"))
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": cpu_seconds() - used,
            "tokens": tokens,
        }


def stages(folder: Path) -> dict[str, float]:
    """Seconds of one process and one thread in each stage of the plain build, over the whole file."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    import hashlib

    import numpy as np

    from data_pipeline.shards.split import text_digest
    from data_pipeline.sources.config import JsonlSource
    from data_pipeline.sources.files import open_stream, read_lines
    from data_pipeline.sources.interface import Document, ReadContext, open_source
    from data_pipeline.tokenizer.engines import open_engine
    from data_pipeline.tokenizer.tokenizer import load_tokenizer

    path, clock, result = str(folder / "corpus.jsonl"), time.perf_counter, {}
    started = clock()
    with open_stream(path) as stream:
        for _ in read_lines(stream, 0, None, 1 << 28):
            pass
    result["reading lines"] = clock() - started
    source = open_source(JsonlSource(kind="jsonl", input=[path]), ReadContext("corpus"))
    started = clock()
    documents = [
        found.text
        for unit in source.units(1 << 40)
        for found in source.read(unit)
        if isinstance(found, Document)
    ]
    result["JSON and checks"] = clock() - started - result["reading lines"]
    started = clock()
    for text in documents:
        text_digest(text)
    result["digests"] = clock() - started
    engine = open_engine("fastokens", load_tokenizer(folder / "tokenizer.json"))
    engine.encode_flat(documents[:10])
    started = clock()
    encoded = [
        engine.encode_flat(documents[start : start + 1000])[0]
        for start in range(0, len(documents), 1000)
    ]
    result["BPE"] = clock() - started
    started = clock()
    with (folder / "stages.bin").open("wb") as stream:
        checksum = hashlib.sha256()
        for ids in encoded:
            narrow = ids.astype(np.uint16)
            checksum.update(narrow.data)
            stream.write(narrow.data)
    result["writing and SHA-256"] = clock() - started
    return result


# --- rounds ---------------------------------------------------------------------------------------


def measure(folder: Path, side: str, options: dict[str, Any] | None = None) -> dict[str, float]:
    """Runs one side in a process of its own: its result, with the most that it and its children
    held together, in bytes.
    """
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
    with PeakMemory(process.pid) as memory:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the side {side} failed")
    return json.loads(output.splitlines()[-1]) | {"peak_bytes": memory.peak}


def run_side(folder: Path, side: str, options: dict[str, Any]) -> dict[str, float]:
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
    for pattern in ("ours*", "newest*", "classic*"):
        for path in folder.glob(pattern):
            path.unlink()


def rounds(folder: Path, count: int) -> dict[str, Any]:
    """Paired rounds of the three sides: medians, and the medians of the ratios of each round."""
    whole, part = (
        (folder / "corpus.jsonl").stat().st_size / 1e6,
        (folder / "part.jsonl").stat().st_size / 1e6,
    )
    rates: dict[str, list[float]] = {"ours": [], "newest": [], "classic": []}
    peaks: dict[str, list[int]] = {"ours": [], "newest": [], "classic": []}
    processor: dict[str, list[float]] = {"ours": [], "newest": [], "classic": []}
    tokens = {}
    for _ in range(count):
        for side, megabytes in (("ours", whole), ("newest", whole), ("classic", part)):
            clear(folder)
            result = measure(folder, side)
            rates[side].append(megabytes / result["seconds"])
            processor[side].append(megabytes / result["cpu_seconds"])
            peaks[side].append(int(result["peak_bytes"]))
            tokens[side] = result["tokens"]
    return {
        "corpus_megabytes": whole,
        # Ours are those of the tokenizers library; gigatoken knows another version of Unicode.
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


def touched_rounds(folder: Path, count: int) -> dict[str, Any]:
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


def print_report(report: dict[str, Any]) -> None:
    console, sides = Console(), report["sides"]
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
    for title, rows in (
        ("one process, one thread", report["stages"]),
        ("cleaning, two workers", report["costs"]),
    ):
        table = Table("stage", "seconds", "MB/s", title=title)
        for name, seconds in rows.items():
            table.add_row(
                name, f"{seconds:.2f}", f"{sides['corpus_megabytes'] / max(seconds, 1e-3):.0f}"
            )
        console.print(table)


def main() -> None:
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
    report: dict[str, Any] = {
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
    report["stages"].pop("peak_bytes")
    print_report(report)
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    clear(options.folder)


if __name__ == "__main__":
    main()
