"""A split with an exact number of held-out documents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.exact_split import lowest_places
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.split import position, text_digest
from pretrain.core.errors import DataError
from tests.unit.data_pipeline.preprocess.test_build import jsonl, section, texts

DOCUMENTS = [
    f"document {number} " + " ".join(str(number * step % 97) for step in range(30))
    for number in range(200)
]


def held_out(folder: Path, documents: list[Any], name: str, **settings: Any) -> list[str]:
    path = jsonl(folder / f"{name}.jsonl", documents)
    config = section(path, unit_bytes=1000, **settings)
    manifest = build(config, Output(folder / name), workers=1).manifest
    assert sum(split.documents for split in manifest.splits.values()) <= len(documents)
    return sorted(texts(manifest, "validation"))


@pytest.mark.parametrize("wanted", [1, 37, 199])
def test_so_many_documents_with_the_lowest_hashes_are_held_out_in_any_order(
    wanted: int, tmp_path: Path
) -> None:
    lowest = sorted(DOCUMENTS, key=lambda text: position(text_digest(text)))[:wanted]
    assert held_out(tmp_path, DOCUMENTS, "one", validation_documents=wanted) == sorted(lowest)
    mixed = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    path = jsonl(tmp_path / "two.jsonl", mixed)
    config = section(path, validation_documents=wanted, unit_bytes=3000)
    manifest = build(config, Output(tmp_path / "two"), workers=2).manifest
    assert sorted(texts(manifest, "validation")) == sorted(lowest)
    assert manifest.splits["validation"].documents == wanted
    assert manifest.splits["train"].documents == 200 - wanted


def test_a_share_holds_out_about_so_many_and_an_exact_number_exactly(tmp_path: Path) -> None:
    """The counterpart: what the number replaces is not exact."""
    by_share = held_out(tmp_path, DOCUMENTS, "share", validation_share=0.2)
    assert len(by_share) != 40
    assert len(held_out(tmp_path, DOCUMENTS, "exact", validation_documents=40)) == 40


def test_equal_documents_are_held_out_together_or_the_number_is_refused(tmp_path: Path) -> None:
    order = sorted(DOCUMENTS, key=lambda text: position(text_digest(text)))
    copies = [*DOCUMENTS, order[9], order[9]]
    with pytest.raises(DataError, match="3 documents have one text .*: hold out 9 or 12, or remo"):
        held_out(tmp_path, copies, "copies", validation_documents=10)
    assert len(held_out(tmp_path, copies, "nine", validation_documents=9)) == 9
    assert len(held_out(tmp_path, copies, "twelve", validation_documents=12)) == 12
    distinct = {"cleaning": {"exact_duplicates": True}}
    found = held_out(tmp_path, copies, "distinct", validation_documents=10, **distinct)
    assert found == sorted(order[:10])


def test_files_are_held_out_whole(tmp_path: Path) -> None:
    for number in range(10):
        jsonl(tmp_path / f"file_{number}.jsonl", DOCUMENTS[number * 4 : number * 4 + 4])
    source = {"kind": "jsonl", "input": [f"{tmp_path}/file_*.jsonl"]}
    settings = {"source": source, "split_by": "path", "split_root": str(tmp_path)}
    config = section(tmp_path, **settings, validation_documents=8)
    manifest = build(config, Output(tmp_path / "whole"), workers=1).manifest
    assert manifest.splits["validation"].documents == 8
    config = section(tmp_path, **settings, validation_documents=9)
    with pytest.raises(DataError, match="4 documents have one path .*: hold out 8 or 12"):
        build(config, Output(tmp_path / "torn"), workers=1)


def test_more_than_there_are_is_refused_and_a_killed_build_continues(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is 200, and there are 200 documents to choose from"):
        held_out(tmp_path, DOCUMENTS, "all", validation_documents=200)
    # The places of the units are found again by the next command.
    path = tmp_path / "all.jsonl"
    config = section(path, unit_bytes=1000, validation_documents=20)
    manifest = build(config, Output(tmp_path / "all"), workers=1).manifest
    assert manifest.splits["validation"].documents == 20
    assert build(config, Output(tmp_path / "all"), workers=1).reused


def test_what_removes_documents_later_is_refused() -> None:
    given = {"validation_documents": 5, "source": {"kind": "jsonl", "input": ["x"]}}
    for more, sentence in (
        ({"streaming": True}, "streaming_validation_documents"),
        ({"cleaning": {"near_duplicates": {}}}, "near_duplicates"),
        ({"cleaning": {"exact_duplicates": True}, "split_by": "path"}, "split_by: path"),
        (
            {"source": {"kind": "jsonl", "input": ["x"], "split": "validation"}},
            "held out already",
        ),
    ):
        with pytest.raises(ValidationError, match=sentence):
            DataConfig.model_validate(given | more)


def test_data_from_before_the_field_are_still_known() -> None:
    assert "validation_documents" not in DataConfig().model_dump(mode="json")


def test_of_the_lowest_places_no_equal_one_is_lost() -> None:
    import numpy as np

    source = random.Random(3)
    for _ in range(200):
        places = [source.randrange(20) / 20 for _ in range(source.randrange(1, 40))]
        wanted = source.randrange(1, 20)
        cut = source.randrange(len(places) + 1)
        parts = [np.array(places[:cut]), np.array(places[cut:])]
        plain = sorted(places)
        expected = [place for place in plain if len(plain) <= wanted or place <= plain[wanted]]
        assert lowest_places(parts, wanted, False).tolist() == expected
        partly = [lowest_places([part], wanted, False) for part in parts]
        assert lowest_places(partly, wanted, False).tolist() == expected
        distinct = sorted(set(places))[: wanted + 1]
        assert lowest_places(parts, wanted, True).tolist() == distinct
