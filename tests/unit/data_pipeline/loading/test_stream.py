"""Streaming: the documents in their order, resumable to the token, the same for any number of
ranks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from data_pipeline.loading.batch import NO_LOSS, Batch
from data_pipeline.loading.factory import open_loader
from data_pipeline.loading.stream_loader import STEPS_AHEAD, StreamLoader
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import Datasets, load_datasets
from data_pipeline.shards.split import position, text_digest
from data_pipeline.shards.token_stream import open_split
from pretrain.config.load import load_recipe
from pretrain.config.loader_plan import loader_plan
from pretrain.core.errors import CheckpointError, ConfigError, DataError
from tests.support.data_folder import write_folder
from tests.support.json_damage import damaged

S, STEPS, EOD = 16, 9, 256
SHARE = 0.3


@pytest.fixture(scope="module")
def bytes_tokenizer() -> str:
    """Every byte is a token, and 256 ends a document."""
    library = Library(
        BPE(
            vocab={
                character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))
            },
            merges=[],
        )
    )
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<|endoftext|>"])
    return library.to_str()


@pytest.fixture
def datasets(tmp_path: Path, bytes_tokenizer: str) -> Datasets:
    write_folder(
        tmp_path / "data",
        {"a": []},
        {"a": [[[1, 2, 3, EOD]]]},
        vocab_size=257,
        tokenizer=bytes_tokenizer,
    )
    return load_datasets({"": str(tmp_path / "data")})


def write_lines(folder: Path, name: str, count: int) -> list[str]:
    """A source of one document a line; those that are trained on."""
    folder.mkdir(exist_ok=True)
    texts = [f"{name} {number} " + "word " * (number * 7 % 11) + "end" for number in range(count)]
    (folder / f"{name}.txt").write_text("\n".join(texts) + "\n")
    return [text for text in texts if position(text_digest(text)) >= SHARE]


def loader_of(
    folder: Path,
    datasets: Datasets,
    *overrides: str,
    names: str = "a",
    dp_rank: int = 0,
    dp_size: int = 1,
) -> StreamLoader:
    sources = ", ".join(
        f"{name}: {{kind: text, document: line, input: [{folder}/{name}.txt]}}" for name in names
    )
    settings = [
        "data.source=null",
        f"data.sources={{{sources}}}",
        "data.streaming=true",
        "data.split_by=content",
        f"data.validation_share={SHARE}",
        "data.shuffle_buffer_documents=0",
    ]
    sizes = [
        f"train.sequence_length={S}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "data.tokenizer=null",
    ]
    tokenizer = f"data.tokenizer={{kind: file, path: {datasets.tokenizer_path}}}"
    recipe = load_recipe("debug", [*settings, *sizes, tokenizer, *overrides])
    loader = open_loader(recipe.data, datasets, loader_plan(recipe), dp_rank, dp_size)
    assert isinstance(loader, StreamLoader)
    return loader


def numbers_of(batches: list[Batch]) -> list[list[list[int]]]:
    return [[batch.input_ids_BS.tolist(), batch.labels_BS.tolist()] for batch in batches]


def tokens_of(datasets: Datasets, texts: list[str]) -> list[int]:
    from data_pipeline.tokenizer.tokenizer import load_tokenizer

    return [
        token
        for ids in load_tokenizer(datasets.tokenizer_path).encode(texts)
        for token in [*ids.tolist(), EOD]
    ]


def test_documents_come_in_order_without_the_held_out_ones_and_begin_again_at_the_end(
    tmp_path: Path, datasets: Datasets
) -> None:
    texts = write_lines(tmp_path, "a", 40)
    assert 10 < len(texts) < 40
    loader = loader_of(tmp_path, datasets)
    expected = tokens_of(datasets, texts) * 3
    steps = len(expected) // (4 * S) - 1
    inputs = (
        torch.cat(
            [batch.input_ids_BS for step in range(steps) for batch in loader.step_batches(step)]
        )
        .flatten()
        .tolist()
    )
    labels = torch.cat([batch.labels_BS for batch in loader.step_batches(steps)])
    assert inputs == expected[: len(inputs)] and steps * 4 * S > len(expected) // 3
    assert labels.flatten().tolist() == expected[len(inputs) + 1 : len(inputs) + 4 * S + 1]
    assert loader.prefetch_wait.seconds > 0


def test_document_mask_takes_no_loss_across_ends(tmp_path: Path, datasets: Datasets) -> None:
    write_lines(tmp_path, "a", 40)
    plain, masked = (
        loader_of(tmp_path, datasets),
        loader_of(tmp_path, datasets, "data.document_mask=true"),
    )
    masked_labels = 0
    for step in range(4):
        for one, other in zip(plain.step_batches(step), masked.step_batches(step), strict=True):
            ends = one.input_ids_BS == EOD
            masked_labels += int(ends.sum())
            assert torch.equal(other.labels_BS, one.labels_BS.masked_fill(ends, NO_LOSS))
            assert one.document_ids_BS is None and other.document_ids_BS is not None
            assert torch.equal(other.document_ids_BS, ends.cumsum(1) - ends.long())
    assert masked_labels > 3


@pytest.mark.parametrize("names,weights", [("a", "null"), ("ab", "{a: 2, b: 1}")])
def test_stopped_at_every_step_and_resumed_the_batches_are_bitwise_the_same(
    tmp_path: Path, datasets: Datasets, names: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.loading.document_groups.UNIT_BYTES", 200)
    monkeypatch.setattr("data_pipeline.loading.source_stream.BATCH_DOCUMENTS", 3)
    for name in names:
        write_lines(tmp_path, name, 25)
    mixture = [] if weights == "null" else [f"data.mixture={{kind: weights, weights: {weights}}}"]
    straight = loader_of(tmp_path, datasets, *mixture, names=names)
    expected, states = [], [straight.state(0)]
    for step in range(STEPS):
        expected.append(numbers_of(straight.step_batches(step)))
        states.append(json.loads(json.dumps(straight.state(step + 1))))
    assert len({str(state) for state in states}) == STEPS + 1
    for stop in range(STEPS):
        resumed = loader_of(tmp_path, datasets, *mixture, names=names)
        resumed.resume(states[stop], stop)
        assert [
            numbers_of(resumed.step_batches(step)) for step in range(stop, min(stop + 3, STEPS))
        ] == expected[stop : stop + 3]
        assert resumed.state(min(stop + 3, STEPS)) == states[min(stop + 3, STEPS)]
    wrong = loader_of(tmp_path, datasets, *mixture, names=names)
    wrong.resume(states[3], 4)
    assert numbers_of(wrong.step_batches(4)) != expected[4]


def test_batches_do_not_depend_on_the_number_of_ranks(tmp_path: Path, datasets: Datasets) -> None:
    write_lines(tmp_path, "a", 25)
    alone = loader_of(tmp_path, datasets)
    ranks = [loader_of(tmp_path, datasets, dp_rank=rank, dp_size=2) for rank in range(2)]
    for step in range(3):
        assert numbers_of(alone.step_batches(step)) == numbers_of(
            [batch for rank in ranks for batch in rank.step_batches(step)]
        )


def test_shares_follow_the_weights_and_each_source_keeps_its_order(
    tmp_path: Path, datasets: Datasets
) -> None:
    texts = {name: write_lines(tmp_path, name, 60) for name in "ab"}
    loader = loader_of(
        tmp_path, datasets, "data.mixture={kind: weights, weights: {a: 3, b: 1}}", names="ab"
    )
    windows = [
        row
        for step in range(8)
        for batch in loader.step_batches(step)
        for row in batch.input_ids_BS.tolist()
    ]
    streams = {name: tokens_of(datasets, texts[name]) for name in "ab"}
    taken = {"a": 0, "b": 0}
    for window in windows:
        name = next(name for name in "ab" if streams[name][taken[name] : taken[name] + S] == window)
        taken[name] += S
    assert taken == {"a": 24 * S, "b": 8 * S}


def test_changed_weights_hold_from_the_resumed_step_and_each_source_goes_on(
    tmp_path: Path, datasets: Datasets
) -> None:
    for name in "abc":
        write_lines(tmp_path, name, 60)
    first = loader_of(
        tmp_path, datasets, "data.mixture={kind: weights, weights: {a: 3, b: 1}}", names="ab"
    )
    for step in range(4):
        first.step_batches(step)
    second = loader_of(
        tmp_path, datasets, "data.mixture={kind: weights, weights: {a: 1, c: 1}}", names="ac"
    )
    second.resume(first.state(4), 4)
    second.step_batches(4)
    places = second.state(5)["sources"]
    assert (
        places["b"] == first.state(4)["sources"]["b"]
        and places["a"] != first.state(4)["sources"]["a"]
    )
    assert places["c"]["places"] != [[0] * 5] and second.state(5)["start_sample"] == 16
    third = loader_of(
        tmp_path, datasets, "data.mixture={kind: weights, weights: {a: 3, b: 1}}", names="ab"
    )
    third.resume(second.state(5), 5)
    assert third.state(5)["sources"]["b"] == places["b"]


def test_changed_files_of_a_source_are_refused(tmp_path: Path, datasets: Datasets) -> None:
    write_lines(tmp_path, "a", 25)
    loader = loader_of(tmp_path, datasets)
    loader.step_batches(0)
    state = loader.state(1)
    loader_of(tmp_path, datasets).resume(state, 1)
    with pytest.raises(
        DataError, match="files of its source 'a', or how they are read, are not what they were"
    ):
        loader_of(tmp_path, datasets, "data.cleaning.normalize={}").resume(state, 1)
    write_lines(tmp_path, "a", 26)
    with pytest.raises(DataError, match="files of its source 'a'"):
        loader_of(tmp_path, datasets).resume(state, 1)


def test_steps_are_read_one_after_the_other(tmp_path: Path, datasets: Datasets) -> None:
    write_lines(tmp_path, "a", 25)
    loader = loader_of(tmp_path, datasets)
    with pytest.raises(ValueError, match="step 1 of a stream that is at step 0"):
        loader.step_batches(1)
    with pytest.raises(ConfigError, match="no multiple"):
        loader_of(tmp_path, datasets, dp_size=4)


def test_a_stream_without_a_document_to_train_on_is_told(
    tmp_path: Path, datasets: Datasets
) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(DataError, match="source 'a' has no document to train on"):
        loader_of(tmp_path, datasets).step_batches(0)


def test_cleaning_applies(tmp_path: Path, datasets: Datasets) -> None:
    (tmp_path / "a.txt").write_text("a plain line\u0007\n" * 50)
    loader = loader_of(tmp_path, datasets, "data.cleaning.normalize={}", "data.validation_share=0")
    (batch, _) = loader.step_batches(0)
    assert (
        batch.input_ids_BS.flatten().tolist()
        == (tokens_of(datasets, ["a plain line"]) * 3)[: 2 * S]
    )


def test_reading_goes_on_in_the_background(
    tmp_path: Path, datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path, "a", 25)
    loader = loader_of(tmp_path, datasets)
    loader.step_batches(0)
    read: list[int] = []
    whole = loader._read

    def noted(step: int) -> object:
        read.append(step)
        return whole(step)

    monkeypatch.setattr(loader, "_read", noted)
    loader.step_batches(1)
    loader._reader.submit(lambda: None).result()
    assert read == [STEPS_AHEAD]


def test_a_stream_gives_the_tokens_that_a_build_would_write(
    tmp_path: Path, datasets: Datasets
) -> None:
    write_lines(tmp_path, "a", 60)
    middle = [
        "data.fill_in_the_middle={rate: 0.5, prefix_token: x, middle_token: y, suffix_token: z}"
    ]
    source = f"data.source={{kind: text, document: line, input: [{tmp_path}/a.txt]}}"
    tokenizer = f"data.tokenizer={{kind: file, path: {datasets.tokenizer_path}}}"
    for overrides in ([], middle):
        settings = [
            f"data.validation_share={SHARE}",
            "data.split_by=content",
            "data.tokenizer=null",
            tokenizer,
            *overrides,
        ]
        built = build(
            load_recipe("debug", [*settings, source]).data,
            Output(tmp_path / f"built{len(overrides)}"),
        )
        expected = open_split(built.manifest, "train")
        loader = loader_of(tmp_path, datasets, *overrides)
        steps = expected.num_tokens // (4 * S)
        read = torch.cat(
            [batch.input_ids_BS for step in range(steps) for batch in loader.step_batches(step)]
        ).flatten()
        assert len(read) > 500 and read.tolist() == expected.read(0, len(read)).tolist()


@pytest.mark.parametrize("names,weights", [("a", "null"), ("ab", "{a: 2, b: 1}")])
def test_steps_that_are_passed_over_are_left_out_and_stay_so_after_a_resume(
    tmp_path: Path, datasets: Datasets, names: str, weights: str
) -> None:
    for name in names:
        write_lines(tmp_path, name, 25)
    mixture = [] if weights == "null" else [f"data.mixture={{kind: weights, weights: {weights}}}"]
    straight, back, resumed = (
        loader_of(tmp_path, datasets, *mixture, names=names) for _ in range(3)
    )
    batches = [numbers_of(straight.step_batches(step)) for step in range(9)]
    early = back.state(0)
    for step in range(4):
        back.step_batches(step)  # what is read ahead of it has to be forgotten
    back.resume(early, 0)
    assert numbers_of(back.step_batches(0)) == batches[0]
    back.resume(early, 0)
    back.pass_over(0, back.consumed(3))
    assert [numbers_of(back.step_batches(step)) for step in range(3)] == batches[3:6]
    state = json.loads(json.dumps(back.state(3)))
    resumed.resume(state, 3)
    assert [
        numbers_of(loader.step_batches(step)) for loader in (back, resumed) for step in (3, 4)
    ] == [*batches[6:8], *batches[6:8]]
    forgetful = loader_of(tmp_path, datasets, *mixture, names=names)
    forgetful.resume(state | {"samples_passed_over": 1}, 3)
    assert (
        names == "a"
        or [numbers_of(forgetful.step_batches(step)) for step in (3, 4)] != batches[6:8]
    )


def test_a_step_names_the_documents_of_its_sequences_while_they_are_remembered(
    tmp_path: Path, datasets: Datasets
) -> None:
    write_lines(tmp_path, "a", 25)
    lines = (tmp_path / "a.txt").read_text().splitlines()
    loader = loader_of(tmp_path, datasets)
    assert loader.origins(0) == []
    for step in range(STEPS_AHEAD + 3):
        inputs = [row for batch in loader.step_batches(step) for row in batch.input_ids_BS.tolist()]
        origins = loader.origins(step)
        assert len(origins) == 4
        for origin, row in zip(origins, inputs, strict=True):
            assert origin.source == "a" and all(
                place == str(tmp_path / "a.txt") for place, *_ in origin.documents
            )
            ranges = [lines[first : last + 1] for _, first, last in origin.documents]
            named = tokens_of(datasets, [line for part in ranges for line in part])
            assert row in [named[start : start + S] for start in range(len(named))]
    assert loader.origins(0) == [] and loader.origins(STEPS_AHEAD) != []


def test_a_saved_place_with_any_value_of_another_type_is_a_sentence(
    tmp_path: Path, datasets: Datasets
) -> None:
    write_lines(tmp_path, "a", 25)
    first = loader_of(tmp_path, datasets)
    first.step_batches(0)
    state, loader = json.loads(json.dumps(first.state(1))), loader_of(tmp_path, datasets)
    for what, changed in damaged(state):
        try:
            loader.resume(changed, 1)
            loader.step_batches(1)
        except (CheckpointError, DataError) as error:
            assert "\n" not in str(error), what
