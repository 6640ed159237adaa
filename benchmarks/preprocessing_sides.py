"""The sides of benchmarks/preprocessing.py, and their corpus.

Each side runs in a process of its own and returns its seconds, without imports and start-up.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

# Size of the part of the corpus that the classic side encodes, in bytes.
CLASSIC_BYTES = 10_000_000
# More than any side needs, files included.
TOUCHED_BYTES = 4_000_000_000
ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cu", ".js", ".json")


# --- the corpus -----------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """The text files of the interpreter's library and installed packages, in a fixed order."""
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        for folder, subfolders, names in os.walk(root):
            # In place: os.walk descends into what is left here, in this order.
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
    """Write corpus.jsonl of ``size`` bytes, part.jsonl with its beginning, and tokenizer.json."""
    from data_pipeline.tokenizer.config import TrainBPE
    from data_pipeline.tokenizer.training import train_bpe

    written = 0
    sample = []
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


# --- the sides, each in a separate process ---


def ours(
    folder: Path, workers: int, cleaning: Mapping[str, object], engine: str | None, touched: bool
) -> dict[str, float]:
    """This pipeline in Megatron's form: one .bin, no split, and a token after each document."""
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
        # Workers are started and have imported everything before the clock starts.
        _warm(pool)
        if touched:
            touch_memory()
        started = time.perf_counter()
        used = cpu_seconds()
        result = build(config, Output(folder, "ours"), fresh=True, pool=pool, engine=engine)
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": cpu_seconds() - used,
            "tokens": result.manifest.splits["train"].tokens,
        }


def touch_memory() -> None:
    """Write to memory and free it, so that the host has provided it before the clock starts."""
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
    """Let every worker import what it needs."""
    if pool.executor is not None:
        # Several calls per worker, each slow enough that no worker serves them all.
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
    started = time.perf_counter()
    used = cpu_seconds()
    tokenizer = gigatoken.Tokenizer(str(folder / "tokenizer.json"))
    ids = tokenizer.encode_files(gigatoken.JsonlFileSource([str(folder / "corpus.jsonl")]))
    lengths = awkward.to_numpy(awkward.num(ids))
    flat = awkward.to_numpy(awkward.flatten(ids))
    ends = np.cumsum(lengths)
    # An end-of-document token after each document, as the other sides write it.
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
        # Both workers have loaded the tokenizer before the clock starts.
        pool.map(_classic_encode, ['{"text": "warm"}'] * 4)
        started = time.perf_counter()
        used = cpu_seconds()
        tokens = 0
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
    """Seconds in each stage of the plain build, in one process and thread, over the whole file."""
    # The tokenizer's Rust threads; read when it is imported.
    os.environ["RAYON_NUM_THREADS"] = "1"
    import hashlib

    import numpy as np

    from data_pipeline.shards.split import text_digest
    from data_pipeline.sources.config import JsonlSource
    from data_pipeline.sources.files import open_stream, read_lines
    from data_pipeline.sources.interface import Document, ReadContext, open_source
    from data_pipeline.tokenizer.engines import open_engine
    from data_pipeline.tokenizer.tokenizer import load_tokenizer

    path = str(folder / "corpus.jsonl")
    clock = time.perf_counter
    result = {}
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
