"""From a sequence back to its documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loading.batch import Documents
from data_pipeline.loading.best_fit import pack_stream
from data_pipeline.loading.packing import Joined, PackedSamples, Windows
from data_pipeline.loading.shard_loader import open_shard_loader
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.inspection import documents
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.token_stream import open_split
from pretrain.config.load import load_recipe
from pretrain.config.loader_plan import loader_plan
from tests.support.data_folder import EOD, write_folder


def data(folder: Path) -> Manifest:
    """Two sources with two shards each; the thousands of a token are its document, and a
    document without a token is among them.
    """
    random, number = np.random.default_rng(0), 0
    sources: dict[str, list[list[list[int]]]] = {}
    for name in ("web", "code"):
        for size in (7, 5):
            shard = []
            for length in random.integers(0, 9, size).tolist():
                shard.append([1000 * number + place for place in range(length)])
                number += 1
            sources.setdefault(name, []).append(shard)
    return write_folder(folder, sources, vocab_size=30_000)


def tokens_of(manifest: Manifest, found: list[Documents]) -> set[int]:
    numbers = [number for _, first, last in found for number in range(first, last + 1)]
    return {
        token
        for document in documents(manifest, "train", numbers)
        for token in document.tokens.tolist()
    }


@pytest.mark.parametrize("source", [None, "web", "code"])
def test_a_window_names_exactly_the_documents_of_its_tokens(
    tmp_path: Path, source: str | None
) -> None:
    manifest = data(tmp_path)
    windows = Windows(open_split(manifest, "train", source), 6, EOD)
    assert windows.num_all > 5
    for number in range(windows.num_all):
        inputs, labels, _ = windows.read(number)
        own = {*inputs[labels >= 0].tolist(), *labels[labels >= 0].tolist()}
        found = windows.documents(number)
        assert own <= tokens_of(manifest, found)
        ends = {token // 1000 for token in own}
        assert (min(first for _, first, _ in found), max(last for *_, last in found)) == (
            min(ends),
            max(ends),
        )
        assert all(str(tmp_path / f"train-{source or ''}") in place for place, *_ in found)


def test_a_packed_sequence_names_the_document_of_each_piece(tmp_path: Path) -> None:
    manifest = data(tmp_path)
    stream = open_split(manifest, "train")
    pack_stream(stream, 8)
    packed = PackedSamples(stream, 8, pad_id=29_999)
    joined = Joined([packed, packed])
    for number in range(len(packed)):
        own = {token // 1000 for token in packed.read(number).inputs_S.tolist() if token != 29_999}
        found = packed.documents(number)
        assert {first for _, first, _ in found} == {last for *_, last in found} == own
        assert joined.documents(number + len(packed)) == found


def test_a_step_names_the_source_of_each_sequence_also_behind_data_that_was_passed_over(
    tmp_path: Path,
) -> None:
    manifest = data(tmp_path)
    sizes = [
        "train.sequence_length=4",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        f"data.path={tmp_path}",
    ]
    recipe = load_recipe("debug", sizes)
    datasets = load_datasets({"": str(tmp_path)})
    loader = open_shard_loader(recipe.data, datasets, loader_plan(recipe), 0, 1)
    later = [batch.input_ids_BS.tolist() for batch in loader.step_batches(5)]
    for step in (0, 2):
        if step == 2:
            loader.pass_over(2, loader.consumed(5))
            assert [batch.input_ids_BS.tolist() for batch in loader.step_batches(2)] == later
        inputs = [row for batch in loader.step_batches(step) for row in batch.input_ids_BS.tolist()]
        origins = loader.origins(step)
        assert len(origins) == len(inputs) == 4
        for origin, row in zip(origins, inputs, strict=True):
            assert set(row) <= tokens_of(manifest, origin.documents)
            assert all(f"train-{origin.source}" in place for place, *_ in origin.documents)


def test_data_that_was_passed_over_stays_passed_over_after_a_resume(tmp_path: Path) -> None:
    data(tmp_path)
    sizes = [
        "train.sequence_length=4",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        f"data.path={tmp_path}",
    ]
    recipe, datasets = load_recipe("debug", sizes), load_datasets({"": str(tmp_path)})
    first, second, third = (
        open_shard_loader(recipe.data, datasets, loader_plan(recipe), 0, 1) for _ in range(3)
    )
    first.pass_over(2, first.consumed(5))
    second.resume(first.state(4), 4)
    third.resume(third.state(4), 4)
    numbers = [first.sample_numbers(4), second.sample_numbers(4), third.sample_numbers(7)]
    assert numbers[0] == numbers[1] == numbers[2] != third.sample_numbers(4)
