"""data.order=megatron keeps the loader's promises: any step, any ranks, the exact position."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.loading.batch import Batch
from data_pipeline.loading.epoch import epoch_samples
from data_pipeline.loading.factory import open_loader, prepare_files
from data_pipeline.loading.megatron.files import FOLDER
from data_pipeline.loading.megatron.loader import MegatronLoader
from data_pipeline.loading.megatron.order import plan_order
from data_pipeline.loading.plan import LoaderPhase, LoaderPlan
from data_pipeline.shards.datasets import Datasets, load_datasets
from pretrain.config.load import load_recipe
from pretrain.core.errors import CheckpointError, ConfigError, DataError
from tests.support.data_folder import EOD, write_folder

LENGTH, BATCH, SAMPLES = 8, 8, 64
WEIGHTS = {"kind": "weights", "weights": {"web": 3, "code": 1}}


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 20, 60).tolist()
    texts = [[*random.integers(1, 999, size).tolist(), EOD] for size in sizes]
    write_folder(tmp_path / "data", {"web": [texts[:20], texts[20:40]], "code": [texts[40:]]})
    return load_datasets({"": str(tmp_path / "data")})


def config(**content: Any) -> DataConfig:
    return DataConfig.model_validate({"order": "megatron", "mixture": WEIGHTS, **content})


def plan_of(
    data: DataConfig, samples: int = SAMPLES, seed: int = 1, micro_batch: int = 2
) -> LoaderPlan:
    return LoaderPlan([LoaderPhase(data.mixture, BATCH, micro_batch)], LENGTH, seed, samples)


def opened(
    datasets: Datasets,
    data: DataConfig | None = None,
    rank: int = 0,
    ranks: int = 1,
    **plan: int,
) -> MegatronLoader:
    data = data or config()
    loader = open_loader(data, datasets, plan_of(data, **plan), rank, ranks)
    assert isinstance(loader, MegatronLoader)
    return loader


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.input_ids_BS.tolist()]


def test_a_checkpoint_continues_at_any_step_on_any_ranks_and_from_files_or_memory(
    datasets: Datasets,
) -> None:
    straight = opened(datasets)
    expected = [rows(straight.step_batches(step)) for step in range(8)]
    assert len({tuple(row) for step in expected for row in step}) > 50
    prepare_files(config(), datasets, plan_of(config()))
    for step in (0, 3, 7):
        state = json.loads(json.dumps(straight.state(step)))
        assert state["samples"] == step * BATCH
        for ranks in (1, 2, 4):
            loaders = [opened(datasets, rank=rank, ranks=ranks) for rank in range(ranks)]
            for loader in loaders:
                loader.resume(state, step)
            for later in range(step, 8):
                parts = [loader.step_batches(later) for loader in loaders]
                by_micro_batch = [batch for group in zip(*parts, strict=True) for batch in group]
                assert rows(by_micro_batch) == expected[later]


def test_what_was_consumed_is_counted_by_source(datasets: Datasets) -> None:
    loader = opened(datasets)
    names = [name for step in range(5) for name, _ in loader.sample_numbers(step)]
    consumed = loader.consumed(5)
    assert consumed.samples == 40
    assert consumed.by_source == {name: names.count(name) for name in ("web", "code")}
    seen = loader.seen_samples(5)
    assert {name: len(numbers) for name, numbers in seen.items()} == consumed.by_source
    assert loader.epochs(5) == 40 / epoch_samples(datasets, config(), LENGTH)


def test_origins_name_the_documents_of_each_sequence(datasets: Datasets) -> None:
    loader = opened(datasets)
    for origin, (name, number) in zip(loader.origins(2), loader.sample_numbers(2), strict=True):
        assert origin.source == name
        samples = loader.sources[name].samples
        sample = samples.read(number)
        text = [*sample.inputs_S.tolist(), int(sample.labels_S[-1])]
        found = []
        for place, first, last in origin.documents:
            assert f"train-{name}" in place
            stream = datasets.training_shards()[name][0].stream
            before = sum(s.entry.documents for s in stream.shards if str(s.prefix) < place)
            offset = next(s.first_document for s in stream.shards if str(s.prefix) == place)
            for document in range(first, last + 1):
                begin, end = stream.document_span(document - offset + before)
                found += stream.read(begin, end - begin).tolist()
        # Whole documents, of which the sample has a part at both ends.
        assert any(
            found[start : start + len(text)] == text for start in range(len(found) - len(text) + 1)
        )


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        ({"samples": 72}, r"made for 64 samples, and would now be made for 72.*order\.samples=64"),
        ({"seed": 2}, r"made with seed 1, and the recipe now gives 2"),
        ({"data": {"order": {"kind": "megatron", "surplus": 0.5}}}, r"surplus 0\.005.* 0\.5"),
        ({"data": {"order": {"kind": "megatron", "eod_mask_loss": True}}}, r"masks_eod_loss"),
        ({"data": {"mixture": {"kind": "proportional"}}}, r"weights \[0\.75, 0\.25\]"),
        (
            {"data": {"mixture": {**WEIGHTS, "weights": {"web": 1, "code": 0}}}},
            r"blends the sources",
        ),
    ],
)
def test_a_resume_into_another_order_is_refused(
    datasets: Datasets, now: dict[str, Any], sentence: str
) -> None:
    state = opened(datasets).state(2)
    data = config(**now.pop("data", {}))
    with pytest.raises(DataError, match=sentence):
        opened(datasets, data, **now).resume(state, 2)


def test_a_kept_order_serves_a_shorter_run(datasets: Datasets) -> None:
    long = opened(datasets)
    pinned = config(order={"kind": "megatron", "samples": SAMPLES})
    short = opened(datasets, pinned, samples=32)
    short.resume(long.state(2), 2)
    assert rows(short.step_batches(2)) == rows(long.step_batches(2))
    short.require(8)
    with pytest.raises(DataError, match=r"needs 72 samples, and Megatron's order has"):
        short.require(9)


def test_other_data_and_other_checkpoints_are_refused(datasets: Datasets, tmp_path: Path) -> None:
    loader = opened(datasets)
    state = loader.state(2)
    write_folder(tmp_path / "other", {"web": [[[5] * 30] * 40], "code": [[[6] * 30] * 40]})
    other = opened(load_datasets({"": str(tmp_path / "other")}))
    with pytest.raises(DataError, match=r"source 'web' is not what it was"):
        other.resume(state, 2)
    shuffled = DataConfig.model_validate({"mixture": WEIGHTS})
    plain = open_loader(shuffled, datasets, plan_of(shuffled), 0, 1)
    with pytest.raises(DataError, match=r"another data\.order"):
        loader.resume(plain.state(2), 2)
    with pytest.raises(CheckpointError, match=r"a wrong 'samples'"):
        loader.resume(state | {"samples": -1}, 2)
    with pytest.raises(CheckpointError):
        plain.resume(state, 2)


def test_samples_that_are_passed_over_are_not_read_and_the_order_begins_again(
    datasets: Datasets, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, skipping = opened(datasets), opened(datasets)
    size = straight.order.plan.num_samples
    skipping.pass_over(2, skipping.consumed(5))
    assert rows(skipping.step_batches(2)) == rows(straight.step_batches(5))
    skipping.require(8)
    assert "24 samples were passed over" in capsys.readouterr().err
    last = skipping.sample_numbers(7)
    numbers = np.arange(10 * BATCH, 11 * BATCH) % size
    assert last == straight.order.samples(numbers)
    again = opened(datasets)
    again.resume(json.loads(json.dumps(skipping.state(4))), 4)
    assert rows(again.step_batches(4)) == rows(skipping.step_batches(4))


def test_sources_without_weights_are_read_once_at_most(datasets: Datasets) -> None:
    data = config(mixture={"kind": "proportional"})
    total = epoch_samples(datasets, data, LENGTH)
    loader = opened(datasets, data, samples=1000)
    assert loader.order.plan.num_samples == total
    loader.require(total // BATCH)
    with pytest.raises(DataError, match=r"kind=weights"):
        loader.require(total // BATCH + 1)


def test_a_damaged_index_is_found_and_built_again(datasets: Datasets) -> None:
    data = config()
    prepare_files(data, datasets, plan_of(data))
    expected = rows(opened(datasets).step_batches(0))
    (path, *_) = sorted((datasets.first.folder / FOLDER).glob("*document_index.npy"))
    index = np.load(path)
    # Replaced, not written over: a loader's thread still maps the old file.
    np.save(path.with_suffix(".other.npy"), index + 10**6)
    path.with_suffix(".other.npy").replace(path)
    with pytest.raises(DataError, match=r"damaged: it names the document"):
        for step in range(8):
            opened(datasets).step_batches(step)
    prepare_files(data, datasets, plan_of(data))
    assert (np.load(path) == index).all() and rows(opened(datasets).step_batches(0)) == expected


def test_a_folder_that_cannot_be_written_is_a_warning(
    datasets: Datasets, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = rows(opened(datasets).step_batches(0))
    # A file in the folder's place: root writes into folders without permission.
    (datasets.first.folder / FOLDER).write_text("")
    prepare_files(config(), datasets, plan_of(config()))
    assert "every rank builds them in its memory" in capsys.readouterr().err
    assert rows(opened(datasets).step_batches(0)) == expected


def test_a_mask_needs_the_token_that_ends_documents(datasets: Datasets) -> None:
    manifest = datasets.first
    without = manifest.tokenizer.model_copy(update={"eod_id": None})
    changed = manifest.model_copy(update={"tokenizer": without}).at(manifest.folder)
    with pytest.raises(DataError, match=r"finds the ends of documents"):
        opened(replace(datasets, manifests={"": changed}), config(document_mask=True))
    opened(replace(datasets, manifests={"": changed}))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("data.streaming=true", r"data\.streaming, which reads documents as they come"),
        ("data.packing.kind=best_fit", r"data\.packing\.kind=best_fit, because"),
        ("data.mixture={kind: temperature, temperature: 2}", r"kind=temperature, because"),
        ("data.mixture={kind: proportional, max_epochs: {all: 1}}", r"max_epochs, because"),
        (
            "phases=[{name: one, mixture: {kind: proportional}, tokens: 2560}, {name: rest}]",
            r"phases\.one\.mixture does not go with data\.order=megatron",
        ),
        ("data.order=megatrom", r"data\.order"),
    ],
)
def test_what_megatron_does_not_have_is_refused(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_recipe("debug", ["data.order=megatron", setting])


def test_a_seed_that_megatron_does_not_take_is_refused(datasets: Datasets) -> None:
    with pytest.raises(ConfigError, match=r"seed \(4294967296\) is none that Megatron takes"):
        plan_order(config(), datasets, plan_of(config(), seed=2**32))


def test_tokens_without_loss_are_counted_out(datasets: Datasets) -> None:
    data = config(order={"kind": "megatron", "eod_mask_loss": True})
    assert data.leaves_out_labels and not config().leaves_out_labels
    batches = [batch for step in range(8) for batch in opened(datasets, data).step_batches(step)]
    ends = torch.cat([batch.input_ids_BS for batch in batches]) == EOD
    labels = torch.cat([batch.labels_BS for batch in batches])
    assert ends.any() and ((labels == -100) == ends).all()
