"""Sliding windows count each token once; each target is counted for the document, the source and
the length that it belongs to.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loading.batch import NO_LOSS
from data_pipeline.loading.packing import PADDING_WINDOW
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import load_datasets
from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.evaluation.heldout.heldout import WindowPlan
from pretrain.evaluation.heldout.other_tokens import in_tokens_of
from pretrain.evaluation.heldout.text import (
    LENGTH_EDGES,
    Groups,
    HeldoutText,
    SlidingWindows,
    TokensInMemory,
    read_split,
)
from tests.support.data_folder import stream_of


def documents(*lengths: int) -> TokensInMemory:
    """Documents of these lengths, tokens numbered through."""
    ends = np.cumsum(lengths)
    return TokensInMemory(
        [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)], 1000
    )


def scored(windows: SlidingWindows) -> list[tuple[int, int]]:
    """(target, tokens of its window that stand before it) of every label."""
    found = []
    for number in range(windows.num_all):
        sample = windows.read(number)
        found += [
            (int(label), place + 1)
            for place, label in enumerate(sample.labels_S)
            if label != NO_LOSS
        ]
    return found


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 16, 17, 41])
def test_every_token_but_the_first_is_scored_once_with_all_the_context_that_there_is_room_for(
    tokens: int, stride: int
) -> None:
    windows = SlidingWindows(documents(tokens), 8, stride, pad_id=0)
    found = scored(windows)
    assert [target for target, _ in found] == list(range(1, tokens))
    assert all(context >= min(target, 8 - stride + 1) for target, context in found)
    assert all(windows.read(PADDING_WINDOW).labels_S == NO_LOSS)


def test_a_window_without_the_mask_of_what_was_scored_counts_twice() -> None:
    windows = SlidingWindows(documents(41), 8, 3, pad_id=0)
    labels = [
        label
        for number in range(windows.num_all)
        for label in windows.read_at(number * 3).labels_S.tolist()
        if label != NO_LOSS
    ]
    assert max(Counter(labels).values()) == 3


def test_a_stride_that_leaves_targets_out_is_refused() -> None:
    for stride in (0, 9):
        with pytest.raises(ConfigError, match=f"the stride is {stride}"):
            SlidingWindows(documents(30), 8, stride, 0)


def test_document_masks_hold_in_sliding_windows() -> None:
    windows = SlidingWindows(documents(5, 9, 4), 8, 4, pad_id=0, document_mask=True)
    assert [target for target, _ in scored(windows)] == [
        token for token in range(1, 18) if token not in (5, 14)
    ]
    assert windows.read(1).documents_S.tolist()[:2] == [0, 1]


def test_tokens_in_memory_are_a_stream_as_shards_are(tmp_path: Path) -> None:
    parts = [[5, 6, 0], [7, 8, 9, 0], [1, 2]]
    shards, memory = (
        stream_of(tmp_path, [parts], 40),
        TokensInMemory([np.array(part) for part in parts], 40),
    )
    assert memory.num_tokens == shards.num_tokens == 9
    for start in range(9):
        for count in range(9 - start):
            assert memory.read(start, count).tolist() == shards.read(start, count).tolist()
            assert (
                memory.document_starts(start, count).tolist()
                == shards.document_starts(start, count).tolist()
            )


def test_sums_by_source_and_by_length_add_up_and_go_where_they_belong() -> None:
    lengths = [100, 128, 511, 600, 20]
    stream = documents(*lengths)
    starts = stream.document_starts(0, stream.num_tokens)
    text = HeldoutText(
        stream,
        starts,
        ["a", "b"],
        np.array([0, 0, 1, 1, 0]),
        0,
        lambda: iter(["x" * length for length in lengths]),
    )
    groups = Groups(text)
    places = np.arange(1, stream.num_tokens)
    for part in np.array_split(places, 7):
        groups.add(part, part.astype(float), part % 2 == 0)
    expected = {"a": [*range(1, 228), *range(1339, 1359)], "b": range(228, 1339)}
    bytes_D = text.bytes_D()
    by_source = groups.by("source", bytes_D)
    for name, tokens in expected.items():
        assert by_source[name] == [
            sum(tokens),
            len(tokens),
            sum(token % 2 == 0 for token in tokens),
            len(tokens) + (name == "a"),
        ]
    by_length = groups.by("length", bytes_D)
    assert LENGTH_EDGES[:2] == (128, 512)
    assert {name: row[1] for name, row in by_length.items()} == {
        "0 to 127": 119,
        "128 to 511": 639,
        "512 to 2047": 600,
    }
    assert groups.totals() == (float(places.sum()), len(places), int((places % 2 == 0).sum()))
    assert groups.by("source", None)["a"][3] is None


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two corpora by name, of which the first has two sources; each text says which source it is
    of.
    """
    folder = tmp_path_factory.mktemp("sources")
    for source in ("sums", "words", "other"):
        (folder / source).mkdir()
        for number in range(20):
            (folder / source / f"{number}.txt").write_text(f"{source} " * (number + 1) + "ü\n")
    tokenizer = [
        "data.tokenizer.vocab_size=300",
        "data.validation_share=0.5",
        "data.split_by=content",
    ]
    named = ", ".join(
        f"{source}: {{kind: text, input: ['{folder / source}/*.txt']}}"
        for source in ("sums", "words")
    )
    build(
        load_recipe("debug", ["data.source=null", f"data.sources={{{named}}}", *tokenizer]).data,
        Output(folder / "first"),
    )
    same = f"data.tokenizer={{kind: file, path: {folder / 'first' / 'tokenizer.json'}}}"
    other = f"data.source={{kind: text, input: ['{folder / 'other'}/*.txt']}}"
    build(load_recipe("debug", [other, same, *tokenizer[1:]]).data, Output(folder / "second"))
    return {"a": str(folder / "first"), "b": str(folder / "second")}


def test_each_document_of_a_split_has_its_source_and_its_text(two_sources: dict[str, str]) -> None:
    datasets = load_datasets(two_sources)
    text = read_split(datasets, "validation")
    texts = list(text.texts())
    assert len(texts) == len(text.starts_D) == len(text.source_D) > 10 and len(text.sources) == 3
    assert [text.sources[number].partition("/")[2] for number in text.source_D][: len(texts)] == [
        {"other": "all"}.get(one.split()[0], one.split()[0]) for one in texts
    ]
    assert {name.partition("/")[0] for name in text.sources} == {"a", "b"}
    assert int(text.bytes_D().sum()) == text.utf8_bytes == sum(len(one.encode()) for one in texts)
    alone = read_split(load_datasets({"": two_sources["a"]}), "validation")
    assert alone.sources == ["sums", "words"]


class ByteModel:
    """A model whose tokens are bytes; it counts what it encodes."""

    eod_id, vocab_size, tokenizer, encoded = 256, 258, None, 0

    def __init__(self, bos_ids: list[int] | None = None) -> None:
        self.bos_ids = bos_ids or []

    def encode(self, text: str) -> list[int]:
        self.encoded += len(text.encode())
        return list(text.encode())


def test_another_tokenizer_s_tokens_are_of_the_same_documents(two_sources: dict[str, str]) -> None:
    text = read_split(load_datasets(two_sources), "validation")
    again = in_tokens_of(ByteModel(), text, 16, None)
    assert again.stream.num_tokens == text.utf8_bytes + len(text.starts_D)
    assert (again.source_D == text.source_D).all() and (
        again.lengths_D() == text.bytes_D() + 1
    ).all()
    assert again.stream.read(int(again.starts_D[1]) - 1, 1).tolist() == [256]
    begun = in_tokens_of(ByteModel([257]), text, 16, None)
    assert (
        begun.stream.read(0, 1).tolist() == [257]
        and (begun.lengths_D() == text.bytes_D() + 2).all()
    )
    assert begun.stream.read(int(begun.starts_D[1]) - 1, 2).tolist() == [256, 257]


@pytest.mark.parametrize("bos_ids", [[], [257]])
def test_a_few_windows_in_another_tokenizer_s_tokens_are_all_that_is_encoded(
    two_sources: dict[str, str], bos_ids: list[int]
) -> None:
    """Sections of the whole text in the model's tokens, spread evenly over it, each with the
    sources and lengths of its documents.
    """
    text = read_split(load_datasets(two_sources), "validation")
    whole = in_tokens_of(ByteModel(bos_ids), text, 16, None)
    model, window, count = ByteModel(bos_ids), 40, 5
    few = in_tokens_of(model, text, window, count)
    assert model.encoded < text.utf8_bytes / 2 and few.stream.num_tokens == count * (window + 1)
    everything = whole.stream.read(0, whole.stream.num_tokens).tolist()
    source_T = np.repeat(whole.source_D, whole.lengths_D())
    length_T = np.repeat(text.lengths_D(), whole.lengths_D())
    own_source_T, own_length_T = (
        np.repeat(of_D, np.diff(few.starts_D, append=few.stream.num_tokens))
        for of_D in (few.source_D, few.lengths_D())
    )
    ends = 0
    for number in range(count):
        section = few.stream.read(number * (window + 1), window + 1).tolist()
        matches = [
            start
            for start in range(len(everything) - window)
            if everything[start : start + window + 1] == section
        ]
        own = slice(number * (window + 1), (number + 1) * (window + 1))
        assert any(
            (source_T[start : start + window + 1] == own_source_T[own]).all()
            and (length_T[start : start + window + 1] == own_length_T[own]).all()
            for start in matches
        )
        ends += section.count(256)
    assert ends > 0 and len(set(few.source_D.tolist())) > 1


def test_a_window_begins_at_the_beginning_of_each_section(two_sources: dict[str, str]) -> None:
    few = in_tokens_of(ByteModel(), read_split(load_datasets(two_sources), "validation"), 40, 5)
    plan = WindowPlan(40, 10, 2, 0, False, 5)
    windows = plan.windows(few)
    assert windows.num_all == 5 and not plan.is_complete(windows)
    tokens = few.stream.read(0, few.stream.num_tokens)
    for number in range(5):
        sample, section = windows.read(number), tokens[number * 41 : number * 41 + 41]
        assert sample.inputs_S.tolist() == section[:40].tolist()
        assert (
            sample.labels_S.tolist()[30 if number else 0 :]
            == section[31 if number else 1 :].tolist()
        )
        assert not number or (sample.labels_S[:30] == NO_LOSS).all()
    assert np.concatenate(list(plan.places(windows)))[:, 0].tolist() == [
        number * 41 + 1 for number in range(5)
    ]


def test_where_windows_would_run_into_each_other_everything_is_encoded(
    two_sources: dict[str, str],
) -> None:
    text = read_split(load_datasets(two_sources), "validation")
    all_of_it = in_tokens_of(ByteModel(), text, 40, text.stream.num_tokens // 20)
    assert all_of_it.section is None and all_of_it.stream.num_tokens == text.utf8_bytes + len(
        text.starts_D
    )
