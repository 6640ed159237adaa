"""Compares our loader with Megatron's builder, data sets and sampler; Megatron is imported here.

Started with a file of cases; writes the result of each to standard output, as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.loading.batch import NO_LOSS, Batch
from data_pipeline.loading.factory import open_loader, prepare_files
from data_pipeline.loading.megatron.files import FOLDER
from data_pipeline.loading.plan import LoaderPhase, LoaderPlan
from data_pipeline.preprocess.import_shards import import_shards
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import Datasets, load_datasets
from tests.support.data_folder import EOD, write_folder
from tests.support.megatron_datasets import megatrons_dataset, sampler_batches

MICRO_BATCH = 2
# Token 0 ends a document.
VOCABULARY = 257


def write_data(folder: Path, case: dict[str, Any]) -> dict[str, Path]:
    """Data sets of random documents, as one shard each: their prefixes for Megatron."""
    random = np.random.default_rng(case["documents"])
    prefixes = {}
    for name, documents in zip("abcdef", case["documents"], strict=False):
        # Also documents of nothing but the end, and some longer than a sample.
        texts = [
            [*random.integers(1, VOCABULARY, size).tolist(), EOD]
            for size in random.integers(0, 60, documents).tolist()
        ]
        write_folder(folder / "whole" / name, {"all": [texts]})
        prefixes[name] = folder / "whole" / name / "train-all-00000"
        # For us in several shards: a source is one data set all the same.
        cuts = np.array_split(np.arange(documents), case.get("shards", 1))
        pieces = [[texts[number] for number in cut.tolist()] for cut in cuts]
        write_folder(folder / "ours" / name, {"all": pieces})
    return prefixes


def datasets_of(folder: Path, case: dict[str, Any], prefixes: dict[str, Path]) -> Datasets:
    """Our data folders; with a split they are imported from Megatron's shards."""
    if "split" in case:
        for name, prefix in prefixes.items():
            tokenizer = {"kind": "file", "path": str(folder / "tokenizer.json")}
            config = DataConfig.model_validate({"tokenizer": tokenizer, "validation_share": 0.0})
            output = Output(folder / "imported", name)
            import_shards([str(prefix)], [], config, output, split=case["split"])
        return load_datasets({name: str(folder / "imported" / name) for name in prefixes})
    return load_datasets({name: str(folder / "ours" / name) for name in prefixes})


def data_config(case: dict[str, Any], names: list[str], shift: int) -> tuple[DataConfig, int]:
    """The recipe's data section and seed; ``shift`` changes the seed."""
    mixture: dict[str, Any] = {"kind": "proportional"}
    if case.get("weights"):
        weights = dict(zip(names, case["weights"], strict=True))
        mixture = {"kind": "weights", "weights": weights}
    order = {"kind": "megatron", "eod_mask_loss": case.get("eod_mask_loss", False)}
    content = {
        "corpora": dict.fromkeys(names, "unused"),
        "order": order,
        "mixture": mixture,
        "document_mask": case.get("reset", False),
    }
    return DataConfig.model_validate(content), case["seed"] + shift


def differs(batch: Batch, row: int, item: dict[str, Tensor], is_masked: bool) -> bool:
    """Whether a sequence of ours is not this item of Megatron's data set."""
    labels = item["labels"].clone()
    labels[item["loss_mask"] == 0] = NO_LOSS
    equal = torch.equal(batch.input_ids_BS[row], item["tokens"])
    equal &= torch.equal(batch.labels_BS[row], labels)
    length = len(labels)
    places = torch.arange(length)
    positions = places if batch.position_ids_BS is None else batch.position_ids_BS[row]
    may_see = places[:, None] >= places[None, :]
    if batch.document_ids_BS is not None:
        ids = batch.document_ids_BS[row]
        may_see = may_see & (ids[:, None] == ids[None, :])
    equal &= torch.equal(positions, item["position_ids"])
    equal &= torch.equal(~may_see, item["attention_mask"][0])
    return not equal or (batch.document_ids_BS is not None) != is_masked


def compare(case: dict[str, Any], folder: Path, shift: int = 0) -> dict[str, Any]:
    """Count equal files, and compared and different sequences on 1, 2 and 4 ranks."""
    prefixes = write_data(folder, case)
    names = list(prefixes)
    length, samples, size = case["length"], case["samples"], case.get("batch", 8)
    flags = dict.fromkeys(("reset_position_ids", "reset_attention_mask"), case.get("reset", False))
    theirs = megatrons_dataset(
        list(prefixes.values()),
        case.get("weights"),
        samples,
        folder / "cache",
        random_seed=case["seed"],
        sequence_length=length,
        split=case.get("split", "1,0,0"),
        eod_mask_loss=case.get("eod_mask_loss", False),
        **flags,
    )
    datasets = datasets_of(folder, case, prefixes)
    data, seed = data_config(case, names, shift)
    plan = LoaderPlan([LoaderPhase(data.mixture, size, MICRO_BATCH)], length, seed, samples)
    prepare_files(data, datasets, plan)
    ours = {path.read_bytes() for path in (datasets.first.folder / FOLDER).glob("*.npy")}
    files = sorted((folder / "cache").glob("*-train-*.npy"))
    equal = sorted(path.name.split("-", 1)[1] for path in files if path.read_bytes() in ours)
    compared = different = 0
    for dp_size in (1, 2, 4):
        for rank in range(dp_size):
            loader = open_loader(data, datasets, plan, rank, dp_size)
            for step in range(samples // size):
                batches = loader.step_batches(step)
                expected = sampler_batches(
                    step * size, MICRO_BATCH, rank, dp_size, size // MICRO_BATCH // dp_size
                )
                for batch, numbers in zip(batches, expected, strict=True):
                    for row, number in enumerate(numbers):
                        compared += 1
                        different += differs(batch, row, theirs[number], case.get("reset", False))
    return {
        "files": len(files),
        "equal": equal,
        "compared": compared,
        "different": different,
        "order_size": len(theirs),
    }


def main() -> None:
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_text(case.pop("tokenizer"))
            print(json.dumps(compare(case, Path(folder), case.pop("shift", 0))), flush=True)


if __name__ == "__main__":
    main()
