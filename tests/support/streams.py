"""Streamed training of documents that are one window each, over any number of ranks in one process.

A document of :mod:`tests.support.hub_server` and its end are 16 tokens of one byte, so the rows of
the batches say which documents were trained on, and how often.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from data_pipeline.loading.factory import open_loader
from data_pipeline.loading.stream_loader import StreamLoader
from data_pipeline.loading.stream_state import merged
from data_pipeline.shards.datasets import Datasets, load_datasets
from pretrain.config.load import load_recipe
from pretrain.config.loader_plan import loader_plan
from pretrain.core.files import JsonObject
from tests.support.data_folder import write_folder
from tests.support.hub_server import WIDTH

S, EOD = WIDTH + 1, 256


def bytes_tokenizer() -> str:
    """Every byte is a token, and 256 ends a document."""
    letters = sorted(ByteLevel.alphabet())
    library = Library(
        BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    )
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevelDecoder()
    library.add_special_tokens(["<|endoftext|>"])
    text: str = library.to_str()
    return text


def data_folder(folder: Path) -> Datasets:
    """A data folder with that tokenizer, as it is built for a stream."""
    write_folder(
        folder, {"a": []}, {"a": [[[1, 2, 3, EOD]]]}, vocab_size=257, tokenizer=bytes_tokenizer()
    )
    return load_datasets({"": str(folder)})


def hub_source(folder: Path | str, **more: Any) -> str:
    """The section of a data set in a folder, for ``--set``."""
    section = {"kind": "datasets", "dataset": str(folder), "split": "train", **more}
    return json.dumps(section)


class Ranks:
    """The loaders of all ranks.

    Args:
        size: number of ranks.
        settings: of the recipe, with its sources.
    """

    def __init__(
        self, datasets: Datasets, size: int, *settings: str, batch: int = 8, micro: int = 1
    ) -> None:
        tokenizer = json.dumps({"kind": "file", "path": str(datasets.tokenizer_path)})
        recipe = load_recipe(
            "debug",
            [
                "data.source=null",
                "data.streaming=true",
                "data.split_by=content",
                f"train.sequence_length={S}",
                f"train.global_batch_size={batch}",
                f"train.micro_batch_size={micro}",
                "data.tokenizer=null",
                f"data.tokenizer={tokenizer}",
                *settings,
            ],
        )
        plan = loader_plan(recipe)
        self.loaders = []
        for rank in range(size):
            loader = open_loader(recipe.data, datasets, plan, rank, size)
            assert isinstance(loader, StreamLoader)
            self.loaders.append(loader)
        self.micro = micro
        library = Library.from_file(str(datasets.tokenizer_path))
        self._decode = library.decode

    @property
    def lanes(self) -> int:
        """Lanes of the stream."""
        return self.loaders[0].lanes

    def step(self, step: int) -> list[str]:
        """The documents of a step in the order of its micro batches."""
        of_ranks = [loader.step_batches(step) for loader in self.loaders]
        # Micro batch j is number j // R of rank j % R.
        batches = [batch for same in zip(*of_ranks, strict=True) for batch in same]
        rows = [row for batch in batches for row in batch.input_ids_BS.tolist()]
        assert all(row[-1] == EOD and EOD not in row[:-1] for row in rows)
        return [str(self._decode(row[:-1])) for row in rows]

    def steps(self, first: int, count: int) -> list[list[str]]:
        """The documents of several steps."""
        return [self.step(step) for step in range(first, first + count)]

    def state(self, step: int) -> JsonObject:
        """What a checkpoint stores, as it comes back from the disk."""
        parts: list[JsonObject] = []

        def keep(mine: JsonObject) -> list[JsonObject]:
            parts.append(json.loads(json.dumps(mine)))
            raise InterruptedError

        for loader in self.loaders:
            try:
                loader.state(step, keep)
            except InterruptedError:
                continue
        content: JsonObject = json.loads(json.dumps(merged(parts).to_dict()))
        return content

    def stop(self) -> None:
        """End all reading in the background."""
        for loader in self.loaders:
            loader.close()

    def resume(self, state: JsonObject, step: int) -> Ranks:
        """Continue on all ranks."""
        for loader in self.loaders:
            loader.resume(state, step)
        return self


def flat(steps: Sequence[Sequence[str]]) -> list[str]:
    """All documents of several steps."""
    return [document for step in steps for document in step]
